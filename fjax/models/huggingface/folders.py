"""The folder of a model: here or on the hub, and the family that its config.json is of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fjax.models.base import Family, ModelConfig

__all__ = ["ADAPTER_CONFIG", "Opened", "open_folder", "read_json"]

ADAPTER_CONFIG = "adapter_config.json"
"""Its folder holds adapters, in PEFT's format, of a base model that it names."""

# What is read first, since it says whether the rest is worth a download; and all that has a part in
# model and tokenizer.
_KIND = ["config.json", ADAPTER_CONFIG]
_FILES = [
    *_KIND,
    "adapter_model.safetensors",
    "generation_config.json",
    "model*.safetensors*",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
]


class Opened(NamedTuple):
    """The folder of a model.

    Attributes:
        folder: with its weights.
        family: of the model.
        config: of the model.
        adapters: the folder of adapters to be added to the weights; None if there are none.
    """

    folder: Path
    family: Family
    config: ModelConfig
    adapters: Path | None = None


def open_folder(name_or_path: str | Path, families: Sequence[Family]) -> Opened:
    """What is in a folder; of one with adapters, what their base model is.

    Of a name on the hub, config.json is had and looked at before the other files.
    """
    folder = _begin(name_or_path)
    if not (folder / ADAPTER_CONFIG).is_file():
        return _open(name_or_path, folder, families)
    base = _base_of(folder)
    try:
        opened = _open(base, _begin(base), families)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds adapters, whose base model is not there: {error} Its {ADAPTER_CONFIG} "
            f"names it (base_model_name_or_path)."
        ) from error
    return opened._replace(adapters=_complete(name_or_path, folder))


def _begin(name_or_path: str | Path) -> Path:
    """The folder, or so much of it that it is known what is in it."""
    local = _local(name_or_path)
    return _download(str(name_or_path), _KIND) if local is None else local


def _complete(name_or_path: str | Path, folder: Path) -> Path:
    """With all files; of a name on the hub by the commit, so that they are of one."""
    if _local(name_or_path) is not None:
        return folder
    return _download(str(name_or_path), _FILES, revision=folder.name)


def _open(name_or_path: str | Path, folder: Path, families: Sequence[Family]) -> Opened:
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder} is the base model of adapters, and has an {ADAPTER_CONFIG} itself. Merge "
            f"those first: from_pretrained(folder) is then a whole model, whose save writes one."
        )
    family, config = _read_config(folder, families)
    return Opened(_complete(name_or_path, folder), family, config)


def _base_of(folder: Path) -> str:
    """The base model of adapters."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{folder} holds adapters, and its {ADAPTER_CONFIG} names no base model "
            f"(base_model_name_or_path). Write the folder of the model there, or its name on the "
            f"hub."
        )
    return base


def _local(name_or_path: str | Path) -> Path | None:
    """A folder that is there; None for what must be a name on the hub."""
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    if name == "built-in":
        return _built_in()
    if name and folder.is_dir():  # the path of no name is the current folder
        return folder
    # Names on the hub are `model` or `owner/model`; all else is meant as a path.
    if (
        isinstance(name_or_path, Path)
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or not name
    ):
        raise FileNotFoundError(
            f"There is no folder {name or repr(name)}; give the folder of a model, or a name on "
            f"the hub."
        )
    return None


def _built_in() -> Path:
    """The model that comes along: in the package, or in a copy of the repository beside it."""
    package = Path(__file__).parents[2]
    for place in (package, package.parent):
        folder = place / "experiments" / "assets" / "reviews-gpt2"
        if folder.is_dir():
            return folder
    raise FileNotFoundError("The built-in model is not there: install fjax as a whole.")


def _download(name: str, files: list[str], *, revision: str | None = None) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=files, revision=revision)
        )
    # the hub's client has a dozen of its own kinds, all of which mean the same here
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is neither a local folder nor a model that the Hugging Face hub gave "
            f"({type(error).__name__}). Check the "
            "spelling and the connection, or download it where there is one and give its folder."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a model's folder, or an error that names the file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}, so it is not the folder of a model."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is a JSON {type(found).__name__}, not an object.")
    return found


def _read_config(folder: Path, families: Sequence[Family]) -> tuple[Family, ModelConfig]:
    raw = read_json(folder / "config.json")
    found = raw.get("model_type")
    family = next((family for family in families if found in family.model_types), None)
    if family is None:
        known = sorted(name for family in families for name in family.model_types)
        raise ValueError(
            f"{folder} holds a model of type {found!r}, which is none of those that are known: "
            f"{', '.join(known)}. A family of your own is passed as "
            f"families=(mine, *fjax.models.FAMILIES)."
        )
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"{folder} holds quantised weights, which fjax does not read: "
            f"quantization_config={raw['quantization_config']!r:.80}. Save the model dequantised."
        )
    try:
        return family, family.read_config(raw)
    except ValueError as error:
        raise ValueError(
            f"The config.json in {folder} is of no {family.name} that fjax computes: {error}"
        ) from error
