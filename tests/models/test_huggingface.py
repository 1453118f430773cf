"""Folders of every kind that exists, and errors that name what is wrong with the others."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys

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
        ({"model_type": "llama"}, "of type 'llama'"),
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


def save_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def test_an_adapter_is_seen_on_the_hub_too(hub, folder):
    save_adapter(folder)
    hub["owner/adapted"] = folder
    with pytest.raises(ValueError, match="has an adapter"):
        from_pretrained("owner/adapted")


def shard(folder, *, index=None, **files):
    """The weights in files by name, and an index of them or another."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    for file, names in files.items():
        safetensors.flax.save_file({name: tensors[name] for name in names}, folder / file)
    listed = (
        {name: file for file, names in files.items() for name in names} if index is None else index
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def index_of(folder, *, index):
    shard(folder, index=index, a=sorted(tensors_of(folder)))


def lack_one(folder):
    names = sorted(tensors_of(folder))
    shard(folder, index=dict.fromkeys(names, "a"), a=names[1:], b=names[:1])


def have_one_more(folder):
    names = sorted(tensors_of(folder))
    shard(folder, index=dict.fromkeys(names[1:], "a") | {names[0]: "b"}, a=names, b=names[:1])


def change(folder, name, by):
    tensors = tensors_of(folder)
    write(folder, tensors | {name: by(tensors[name])})


def truncate(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "is not JSON"),
        (lambda f: edit_config(f, model_type="llama"), ValueError, "of type 'llama'"),
        (
            lambda f: edit_config(f, reorder_and_upcast_attn=True),
            ValueError,
            "reorder_and_upcast_attn=True",
        ),
        (
            lambda f: edit_config(f, n_positions=99),
            ValueError,
            r"wpe.weight is \(24, 16\), not \(99, 16\)",
        ),
        (
            lambda f: edit_config(f, n_layer=3),
            ValueError,
            "lack 12 tensors of this GPT-2: h.2.attn.c_attn.bias",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, "has no tokenizer"),
        (
            lambda f: (f / "tokenizer.json").write_text("{}"),
            ValueError,
            "The tokenizer in .* cannot be read, ",
        ),
        (
            lambda f: (f / "tokenizer.json").write_text("["),
            ValueError,
            "The tokenizer in .* cannot be read, ",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text("[]"),
            ValueError,
            "The tokenizer in .* cannot be read, ",
        ),
        (
            lambda f: edit_config(f, summary_type=3),
            ValueError,
            "The tokenizer in .* cannot be read, .*summary_type",
        ),
        (
            lambda f: (f / "model.safetensors").unlink(),
            FileNotFoundError,
            "neither model.safetensors nor",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"no"),
            ValueError,
            "not a whole safetensors file",
        ),
        (
            lambda f: write(f, tensors_of(f) | {"lm_head.weight": jnp.zeros((61, 16))}),
            ValueError,
            "a lm_head.weight that differs from wte.weight",
        ),
        (
            lambda f: (f / "config.json").write_text("[1]"),
            ValueError,
            "is a JSON list, not an object",
        ),
        (lambda f: (f / "config.json").write_text("[" * 100_000), ValueError, "is not JSON"),
        (
            lambda f: (f / "config.json").write_bytes(b'{"model_type": "gpt2\xff"}'),
            ValueError,
            "is not JSON",
        ),
        (
            lambda f: edit_config(f, n_head=0),
            ValueError,
            "of no GPT-2 that fjax computes: n_head must be a whole number from 1 .* got 0",
        ),
        (lambda f: edit_config(f, n_layer=-1), ValueError, "n_layer must be a whole number"),
        (
            lambda f: edit_config(f, n_embd="16"),
            ValueError,
            "n_embd must be a whole number from 1 .* got '16'",
        ),
        (lambda f: edit_config(f, n_layer=2.0), ValueError, "n_layer must be a whole number"),
        (lambda f: edit_config(f, n_layer=True), ValueError, "n_layer must be a whole number"),
        (lambda f: edit_config(f, n_layer=None), ValueError, "n_layer must be a whole number"),
        (
            lambda f: edit_config(f, n_positions=[24]),
            ValueError,
            "n_positions must be a whole number",
        ),
        (lambda f: edit_config(f, n_inner=0), ValueError, "n_inner must be a whole number"),
        (
            lambda f: edit_config(f, vocab_size=10**12),
            ValueError,
            "vocab_size must be a whole number from 1 to 2147483647",
        ),
        (
            lambda f: edit_config(f, vocab_size=2**31 - 1),
            ValueError,
            r"wte.weight is \(61, 16\), not \(2147483647, 16\)",
        ),
        (
            lambda f: edit_config(f, n_layer=10**6),
            ValueError,
            "are 28 tensors, too few for 1000000 blocks",
        ),
        (lambda f: edit_config(f, n_head=3), ValueError, "n_embd must be a multiple of n_head"),
        (
            lambda f: edit_config(f, layer_norm_epsilon="x"),
            ValueError,
            "layer_norm_epsilon must be a number",
        ),
        (
            lambda f: edit_config(f, layer_norm_epsilon=float("nan")),
            ValueError,
            "layer_norm_epsilon must be a number",
        ),
        (
            lambda f: edit_config(f, attn_pdrop=1.0),
            ValueError,
            "attn_pdrop must be a number from 0 to less than 1",
        ),
        (
            lambda f: edit_config(f, activation_function="swish"),
            ValueError,
            "activation_function must be one of",
        ),
        (
            lambda f: edit_config(f, activation_function=["gelu"]),
            ValueError,
            "activation_function must be one of",
        ),
        (
            lambda f: edit_config(f, num_attention_heads=4),
            ValueError,
            "two things of n_head: (2|4) and (num_attention_heads=4|n_head=2)",
        ),
        (
            lambda f: edit_config(f, scale_attn_by_inverse_layer_idx=True),
            ValueError,
            "scale_attn_by_inverse_layer_idx=True",
        ),
        (
            lambda f: edit_config(f, scale_attn_weights=False),
            ValueError,
            "scale_attn_weights=False",
        ),
        (
            lambda f: edit_config(f, add_cross_attention=True),
            ValueError,
            "add_cross_attention=True",
        ),
        (
            lambda f: edit_config(f, quantization_config={"bits": 8}),
            ValueError,
            "quantization_config={'bits': 8}",
        ),
        (
            lambda f: edit_config(f, tie_word_embeddings=False),
            ValueError,
            "tie_word_embeddings=False and no lm_head.weight",
        ),
        (
            lambda f: edit_config(f, n_layer=1),
            ValueError,
            "have 12 tensors that this GPT-2 has not: h.1.attn.c_attn.bias",
        ),
        (
            lambda f: edit_config(f, vocab_size=60),
            ValueError,
            "ids beyond the vocab_size=60 of the model: '<|endoftext|>' is 60",
        ),
        (
            lambda f: change(f, "transformer.wpe.weight", lambda x: x.at[3, 1].set(jnp.nan)),
            ValueError,
            "finite in float32: wpe",
        ),
        (
            lambda f: change(f, "transformer.ln_f.bias", lambda x: x.at[0].set(-jnp.inf)),
            ValueError,
            "finite in float32: ln_f",
        ),
        (
            lambda f: change(f, "transformer.wte.weight", lambda x: x.astype(jnp.int8)),
            ValueError,
            "quantised perhaps: wte.weight is I8",
        ),
        (
            lambda f: change(f, "transformer.h.0.mlp.c_fc.weight", lambda x: jnp.array(x.T)),
            ValueError,
            r"h.0.mlp.c_fc.weight is \(64, 16\), not \(16, 64\)",
        ),
        (
            lambda f: write(f, tensors_of(f) | {"score.weight": jnp.zeros((1, 16))}),
            ValueError,
            "have 1 tensors that this GPT-2 has not: score.weight",
        ),
        (
            lambda f: write(
                f, tensors_of(f) | {"transformer.h.0.attn.c_attn.lora_A.weight": jnp.zeros((4, 16))}
            ),
            ValueError,
            "this GPT-2 has not: h.0.attn.c_attn.lora_A.weight",
        ),
        (
            lambda f: write(f, tensors_of(f) | {"wpe.weight": jnp.zeros((24, 16))}),
            ValueError,
            "have wpe.weight twice",
        ),
        (save_adapter, ValueError, "has an adapter .adapter_config.json., which fjax does not add"),
        (
            lambda f: truncate(f, -1),
            ValueError,
            "model.safetensors is not a whole safetensors file",
        ),
        (
            lambda f: truncate(f, 100),
            ValueError,
            "model.safetensors is not a whole safetensors file",
        ),
        (lambda f: truncate(f, 0), ValueError, "model.safetensors is not a whole safetensors file"),
        (
            lack_one,
            ValueError,
            "does not have the tensors that the index says, as to transformer.h.0.attn.c_attn.bias",
        ),
        (
            have_one_more,
            ValueError,
            "does not have the tensors that the index says, as to transformer.h.0.attn.c_attn.bias",
        ),
        (lambda f: index_of(f, index={}), ValueError, "are 0 tensors, too few for 2 blocks"),
        (
            lambda f: index_of(f, index=["a"]),
            ValueError,
            "has no weight_map from the names of tensors",
        ),
        (
            lambda f: index_of(f, index={"wte.weight": 1}),
            ValueError,
            "has no weight_map from the names of tensors",
        ),
        (
            lambda f: index_of(f, index={"wte.weight": "../a"}),
            ValueError,
            "has no weight_map from the names of tensors",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(bare, folder, spoil, kind, message):
    spoil(folder)
    with pytest.raises(kind, match=message) as error:
        from_pretrained(folder)
    assert error.type is kind


def test_a_tokenizer_without_an_end_is_refused(folder, model):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        from_pretrained(folder)


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
