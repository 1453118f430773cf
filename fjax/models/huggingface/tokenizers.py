"""The tokenizer of a model, the tokens that end a sequence, and padding that no text can end in."""

import copy
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from fjax.models.base import ModelConfig
from fjax.models.huggingface.folders import read_json

__all__ = ["end_ids", "import_transformers", "load_tokenizer", "some", "with_padding"]


def import_transformers() -> Any:
    """The package, without what it says on import where there is no torch.

    Nothing here needs that.
    """
    if "transformers" in sys.modules:
        return import_module("transformers")
    before = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        return import_module("transformers")
    finally:
        if before is None:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
        else:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = before


def load_tokenizer(folder: Path, config: ModelConfig) -> Any:
    """The tokenizer of the folder, of which every token of a text has a row in the embedding."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json with merges.txt)."
        )
    tokenizer = _read_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer in {folder} has no end-of-sequence token, so no sequence could ever "
            f"end."
        )
    beyond = _beyond(tokenizer, config.vocab_size)
    if beyond:
        raise ValueError(
            f"The tokenizer in {folder} has ids beyond the vocab_size={config.vocab_size} of the "
            f"model: {some(beyond)}."
        )
    return tokenizer


def _read_tokenizer(folder: Path) -> Any:
    transformers = import_transformers()
    # Of a kind that transformers does not know it would say so, at every loading.
    known = read_json(folder / "config.json").get("model_type") in transformers.CONFIG_MAPPING
    options = {} if known else {"config": transformers.PretrainedConfig()}
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    # whatever its files may have in them, each reader of theirs has errors of its own
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The tokenizer in {folder} cannot be read, {type(error).__name__}: {reason:.200}"
        ) from error


def _beyond(tokenizer: Any, vocab_size: int) -> list[str]:
    # Other special tokens than the end may lie beyond the embedding, such as padding: no text has
    # them.
    special = {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    } - {tokenizer.eos_token_id}
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= vocab_size}
    return [f"{beyond[index]!r} is {index}" for index in sorted(beyond.keys() - special)]


def end_ids(folder: Path, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Every token that ends a sequence, the tokenizer's first.

    Then those of generation_config.json or, where it names none, of config.json.

    These are the tokens at which transformers' ``generate`` stops, and the tokenizer's. An id that
    the vocabulary has not can never be drawn, and is left out.
    """
    listed = None
    for name in ("generation_config.json", "config.json"):
        if listed is None and (folder / name).is_file():
            listed = read_json(folder / name).get("eos_token_id")
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    wrong = [each for each in listed if isinstance(each, bool) or not isinstance(each, int)]
    if wrong:
        raise ValueError(
            f"eos_token_id in {folder} must be a token id or a list of them, got {wrong[0]!r:.80}."
        )
    known = [each for each in listed if 0 <= each < vocab_size]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *known]))


def with_padding(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it with a padding token that no text can end in."""
    if tokenizer.pad_token_id not in (
        None,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.unk_token_id,
    ):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def some(items: list[str]) -> str:
    """The first five, and how many there are beside them."""
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
