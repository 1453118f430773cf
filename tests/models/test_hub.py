"""Models that are not here: what is asked of the hub, and what is said when nothing comes."""

import fnmatch
import json
import shutil

import jax
import pytest

from fjax import from_pretrained
from fjax.adapters import init_lora, merge_lora
from fjax.models import save_adapters
from tests.models.folders import assert_same, edit_config, save_adapter


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"There is no folder \./nowhere"):
        from_pretrained("./nowhere")

    with pytest.raises(FileNotFoundError, match=r"There is no folder ''"):
        from_pretrained("")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Names whose files lie in folders here, each of one commit; and what was asked of them."""
    import huggingface_hub

    remote, asked = {}, []

    def snapshot_download(name, *, allow_patterns, revision=None):
        asked.append((name, revision))
        if name not in remote:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
        commit = tmp_path / "cache" / name / "0123abc"
        assert revision in (None, commit.name)
        for file in remote[name].rglob("*"):
            path = file.relative_to(remote[name])
            if file.is_file() and any(
                fnmatch.fnmatch(path.as_posix(), pattern) for pattern in allow_patterns
            ):
                (commit / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, commit / path)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    remote["cache"], remote["asked"] = tmp_path / "cache", asked
    return remote


def test_a_name_that_the_hub_does_not_give_is_named(hub):
    with pytest.raises(FileNotFoundError, match="gpt-2 is neither a local folder nor a model"):
        from_pretrained("gpt-2")


def test_a_model_of_the_hub_is_that_of_its_whole_folder(hub, folder):
    """Slow tokenizers have tokens in a file of their own, the end among them: without it, another
    token ends."""
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(
        json.dumps({word: index for word, index in words.items() if index < 59})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(json.dumps({"<|stop|>": 59, "<|endoftext|>": 60}))
    described = {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<|stop|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "chat_template.jinja").write_text("one")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("two")
    hub["owner/tiny"] = folder
    whole, had = from_pretrained(folder), from_pretrained("owner/tiny")
    assert had.eos_id == whole.eos_id == 59
    assert had.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert had.tokenizer.chat_template == {"default": "one", "tools": "two"}
    files = {
        path.name
        for path in (hub["cache"] / "owner" / "tiny" / "0123abc").rglob("*")
        if path.is_file()
    }
    assert files == {path.name for path in folder.rglob("*") if path.is_file()}
    assert hub["asked"] == [("owner/tiny", None), ("owner/tiny", "0123abc")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "rwkv"}, "of type 'rwkv'"),
        ({"n_head": 0}, "n_head must be"),
        ({"n_inner": "x"}, "n_inner must be"),
    ],
)
def test_what_is_no_gpt2_is_not_downloaded(bare, hub, folder, changes, message):
    edit_config(folder, **changes)
    hub["owner/large"] = folder
    with pytest.raises(ValueError, match=message):
        from_pretrained("owner/large")
    assert {path.name for path in hub["cache"].rglob("*") if path.is_file()} == {"config.json"}


def test_adapters_of_the_hub_are_added_to_the_base_model_that_they_name(hub, folder, tmp_path):
    model = from_pretrained(folder)
    adapters = init_lora(model.params, jax.random.key(0), rank=1, pattern="attn")
    adapters = jax.tree.map(lambda x: x + 1, adapters)
    save_adapters(tmp_path / "adapters", adapters, model.config, base_model="owner/tiny")
    hub["owner/tiny"], hub["owner/adapted"] = folder, tmp_path / "adapters"
    assert_same(from_pretrained("owner/adapted").params, merge_lora(model.params, adapters))
    assert ("owner/adapted", "0123abc") in hub["asked"]


def test_adapters_of_adapters_are_refused_on_the_hub_too(hub, folder):
    save_adapter(folder, base_model_name_or_path="owner/adapted")
    hub["owner/adapted"] = folder
    with pytest.raises(ValueError, match=r"has an adapter_config.json itself"):
        from_pretrained("owner/adapted")
