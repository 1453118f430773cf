"""Folders of every kind that exists are read, and written again."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import safetensors.flax

from fjax import from_pretrained, save_pretrained
from fjax.models import gpt2
from tests.make_fixtures import make_tokenizer
from tests.models.folders import TINY, assert_same, change, edit_config, tensors_of, write


def test_the_model_is_whole(model):
    assert model.eos_id == 60
    assert model.tokenizer.decode([3, 14]) == "w3 w14"
    assert jax.tree.structure(model.params) == jax.tree.structure(
        gpt2.init_params(model.config, jax.random.key(0))
    )
    logits, cache = model.decode_fn(
        model.params, jnp.ones((2, 3), jnp.int32), model.init_cache(2, 5)
    )
    assert logits.shape == (2, 61)
    assert int(cache.length) == 3


def test_tensors_without_the_prefix(folder, model):
    """As the first GPT-2 checkpoints on the hub have them, with buffers that are no parameters."""
    tensors = {name.removeprefix("transformer."): x for name, x in tensors_of(folder).items()}
    write(
        folder,
        tensors
        | {"h.0.attn.bias": jnp.ones((1, 1, 24, 24)), "lm_head.weight": tensors["wte.weight"]},
    )
    assert_same(from_pretrained(folder).params, model.params)


def test_sharded_files(folder, model):
    tensors = tensors_of(folder)
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
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
    stored = (
        model.params
        if dtype is None
        else jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), model.params)
    )
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


ALIASES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}


def test_other_names_of_sizes_are_read(folder, model):
    """transformers writes the names of GPT-2 and reads these too."""
    raw = json.loads((folder / "config.json").read_text())
    raw = {ALIASES.get(name, name): value for name, value in raw.items()} | {
        "num_attention_heads": 4
    }
    (folder / "config.json").write_text(json.dumps(raw))
    loaded = from_pretrained(folder)
    assert loaded.config == gpt2.GPT2Config(**(vars(model.config) | {"n_head": 4}))
    edit_config(folder, num_attention_heads=2, n_head=2)  # said twice, but alike
    assert from_pretrained(folder).config == model.config


def test_a_separate_head_that_is_the_embedding_is_read(folder, model):
    edit_config(folder, tie_word_embeddings=False)
    tensors = tensors_of(folder)
    write(folder, tensors | {"lm_head.weight": tensors["transformer.wte.weight"]})
    assert_same(from_pretrained(folder).params, model.params)


def test_a_value_that_the_chosen_precision_does_not_reach_is_named(folder):
    change(folder, "transformer.ln_f.bias", lambda x: x.at[0].set(1e5))
    assert jnp.isfinite(from_pretrained(folder).params["ln_f"]["bias"]).all()
    with pytest.raises(ValueError, match=r"not finite in float16: ln_f.bias"):
        from_pretrained(folder, param_dtype=jnp.float16)


def test_special_tokens_beyond_the_embedding_may_be_other_than_the_end(folder, model):
    """Padding, for one: no text has it. A token of texts may not."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)
    assert from_pretrained(folder).tokenizer.pad_token_id == 61
    tokenizer.add_tokens(["film"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="ids beyond the vocab_size=61 of the model: 'film' is 62"):
        from_pretrained(folder)


def test_a_folder_is_saved_over_with_its_chat_templates(tmp_path, model):
    tokenizer = make_tokenizer()
    for templates in (
        {"default": "a", "tools": "b", "rag": "c"},
        {"default": "d", "tools": "e"},
        {"default": "f", "tools": "g"},
    ):
        tokenizer.chat_template = templates
        save_pretrained(tmp_path / "model", model.params, model.config, tokenizer)
        assert from_pretrained(tmp_path / "model").tokenizer.chat_template == templates
    assert os.listdir(tmp_path) == ["model"]


SHAPES = [
    ({"attn_pdrop": 0.0, "embd_pdrop": 0.5, "resid_pdrop": 0.0}, True),
    ({"n_inner": 64}, True),
    ({"activation_function": "gelu_pytorch_tanh"}, True),
    ({"initializer_range": 0.1}, True),
    ({"n_inner": 32}, False),
    ({"activation_function": "gelu"}, False),
    ({"layer_norm_epsilon": 1e-6}, False),
    ({"n_head": 4}, False),
    ({"n_positions": 12}, False),
]


@pytest.mark.parametrize(("changes", "alike"), SHAPES)
def test_configurations_are_compared_by_what_they_compute(model, changes, alike):
    other = gpt2.GPT2Config(**(vars(model.config) | changes))
    assert model.config.computes_as(other) is alike
    assert other.computes_as(model.config) is alike


# In a process of its own, without torch and with what the user has set.
SILENT = """
import logging, os, sys
sys.modules["torch"] = None
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "torch" else find_spec(name, *package)
import fjax
before = dict(os.environ)
fjax.from_pretrained({folder!r})
import transformers
assert not transformers.utils.is_torch_available()
assert dict(os.environ) == before
assert transformers.logging.get_verbosity() == logging.WARNING
"""


@pytest.mark.parametrize("chosen", [{}, {"TRANSFORMERS_NO_ADVISORY_WARNINGS": ""}])
def test_nothing_is_said_of_a_torch_that_is_not_needed(chosen):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    } | chosen
    code = SILENT.format(folder=str(TINY))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
