"""What is wrong with a folder is named: its configuration, its tokenizer, its tensors."""

import json

import jax.numpy as jnp
import pytest
import safetensors.flax

from fjax import from_pretrained
from tests.make_fixtures import make_tokenizer
from tests.models.folders import change, edit_config, save_adapter, tensors_of, write


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


def truncate(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "is not JSON"),
        (lambda f: edit_config(f, model_type="rwkv"), ValueError, "of type 'rwkv'"),
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
        (save_adapter, ValueError, "holds adapters, and its adapter_config.json names no base"),
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
