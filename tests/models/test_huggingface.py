"""Folders of every kind that exists, and errors that name what is wrong with the others."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax

from fjax import from_pretrained, save_pretrained
from fjax.models import gpt2
from tests.make_fixtures import FOLDER, make_tokenizer

TINY = FOLDER / "tiny-gpt2"


@pytest.fixture(scope="module")
def model():
    return from_pretrained(TINY)


@pytest.fixture
def folder(tmp_path):
    """A copy to spoil."""
    return shutil.copytree(TINY, tmp_path / "model")


def tensors_of(folder):
    return safetensors.flax.load_file(folder / "model.safetensors")


def write(folder, tensors):
    safetensors.flax.save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_model_is_whole(model):
    assert model.eos_id == 60
    assert model.tokenizer.decode([3, 14]) == "w3 w14"
    assert jax.tree.structure(model.params) == jax.tree.structure(gpt2.init_params(model.config, jax.random.key(0)))
    logits, cache = model.decode_fn(model.params, jnp.ones((2, 3), jnp.int32), model.init_cache(2, 5))
    assert logits.shape == (2, 61)
    assert int(cache.length) == 3


def test_tensors_without_the_prefix(folder, model):
    """As the first GPT-2 checkpoints on the hub have them, with buffers that are no parameters."""
    tensors = {name.removeprefix("transformer."): x for name, x in tensors_of(folder).items()}
    write(folder, tensors | {"h.0.attn.bias": jnp.ones((1, 1, 24, 24)), "lm_head.weight": tensors["wte.weight"]})
    assert_same(from_pretrained(folder).params, model.params)


def test_sharded_files(folder, model):
    tensors = tensors_of(folder)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        safetensors.flax.save_file({name: tensors[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert_same(from_pretrained(folder).params, model.params)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks the shard model-00002-of-00002"):
        from_pretrained(folder)


@pytest.mark.parametrize("stored", [jnp.float16, jnp.bfloat16])
def test_half_precision_files_become_float32_parameters(folder, model, stored):
    write(folder, {name: x.astype(stored) for name, x in tensors_of(folder).items()})
    params = from_pretrained(folder).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert_same(params, jax.tree.map(lambda x: x.astype(stored).astype(jnp.float32), model.params))


def test_dtypes_are_chosen(folder):
    half = from_pretrained(folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    assert half.init_cache(1, 2).keys[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [None, jnp.float16])
def test_round_trip(tmp_path, model, dtype):
    save_pretrained(tmp_path / "a" / "b", model.params, model.config, model.tokenizer, dtype=dtype)
    loaded = from_pretrained(str(tmp_path / "a" / "b"))
    assert loaded.config == model.config
    assert loaded.eos_id == model.eos_id
    stored = model.params if dtype is None else jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), model.params)
    assert_same(loaded.params, stored)
    assert sorted(os.listdir(tmp_path / "a")) == ["b"]


def test_a_failure_leaves_the_model_that_was_there(tmp_path, model, monkeypatch):
    target = tmp_path / "model"
    save_pretrained(target, model.params, model.config, model.tokenizer)
    (target / "README.md").write_text("mine")
    changed = jax.tree.map(lambda x: x + 1, model.params)

    def fail(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.flax, "save_file", fail)
        with pytest.raises(OSError, match="No space"):
            save_pretrained(target, changed, model.config, model.tokenizer)
    assert_same(from_pretrained(target).params, model.params)
    assert os.listdir(tmp_path) == ["model"]
    save_pretrained(target, changed, model.config, model.tokenizer)
    assert_same(from_pretrained(target).params, changed)
    assert (target / "README.md").read_text() == "mine"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"There is no folder \./nowhere"):
        from_pretrained("./nowhere")


def test_a_name_that_the_hub_does_not_give_is_named(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="gpt-2 is neither a local folder nor a model"):
        from_pretrained("gpt-2")


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "is not JSON"),
        (lambda f: edit_config(f, model_type="llama"), ValueError, "of type 'llama'"),
        (lambda f: edit_config(f, reorder_and_upcast_attn=True), ValueError, "reorder_and_upcast_attn=True"),
        (lambda f: edit_config(f, n_positions=99), ValueError, r"wpe.weight is \(24, 16\), not \(99, 16\)"),
        (lambda f: edit_config(f, n_layer=3), ValueError, "lack 12 tensors of this GPT-2: h.2.attn.c_attn.bias"),
        (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, "has no tokenizer"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), ValueError, "not a whole safetensors file"),
        (
            lambda f: write(f, tensors_of(f) | {"lm_head.weight": jnp.zeros((61, 16))}),
            ValueError,
            "an lm_head that differs from wte",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(folder, spoil, kind, message):
    spoil(folder)
    with pytest.raises(kind, match=message):
        from_pretrained(folder)


def test_a_tokenizer_without_an_end_is_refused(folder, model):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        from_pretrained(folder)
