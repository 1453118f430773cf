"""Llama and its relatives are probability distributions, and the same with and without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import enumeration, log_probs
from fjax.adapters import attach_lora, init_lora, merge_lora
from fjax.models import llama
from fjax.models.rope import Rope
from tests.cases import refused

CONFIG = llama.LlamaConfig(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=12,
)
EVERYTHING = dataclasses.replace(
    CONFIG,
    head_dim=6,
    rope=Rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=6),
    tie_word_embeddings=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    norm_offset=1.0,
    embedding_scale=4.0,
)
"""All that any relative does otherwise, at once."""


def random_params(config, *, scale=8.0, dtype=jnp.float32, seed=0):
    """Larger than at initialisation, biases and norms too, so that predictions depend on all."""
    params = llama.init_params(config, jax.random.key(seed), param_dtype=dtype)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten(
        scale * (x if x.ndim > 1 else x / scale) + 0.2 * jax.random.normal(key, x.shape, x.dtype)
        for x, key in zip(leaves, keys, strict=True)
    )


@pytest.fixture(scope="module", params=[CONFIG, EVERYTHING], ids=["Llama", "everything"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


def tokens_of(rows=3, columns=9, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 37, (rows, columns)), jnp.int32)


def test_probabilities_of_all_finished_sequences_and_prefixes_sum_to_one(config, x64):
    tiny = dataclasses.replace(config, vocab_size=4)
    params = random_params(tiny, dtype=jnp.float64)
    space = enumeration.sequences(4, 4, eos_id=3, prompt=(3,))
    log_prob_fn = jax.jit(log_probs.make_log_prob_fn(llama.logits_fn(tiny, dtype=jnp.float64)))
    log_pi = log_prob_fn(params, space.tokens, space.where)
    assert log_pi.dtype == jnp.float64
    assert log_pi.std() > 0.3
    np.testing.assert_allclose(jnp.exp(log_pi).sum(), 1.0, rtol=0, atol=1e-10)


def test_cached_equals_uncached_with_left_padding(config, params):
    """A prompt at once, then column by column, beside the whole row without a cache."""
    tokens, prefill = tokens_of(), 4
    where = jnp.arange(9)[None] >= jnp.array([[0], [2], [3]])
    decode = jax.jit(llama.decode_fn(config))
    cache = llama.init_cache(config, 3, 12)
    assert cache.keys[0].shape == (3, 2, 12, config.head_width)
    logits, cache = decode(params, tokens[:, :prefill], cache, where[:, :prefill])
    found = [logits]
    for column in range(prefill, 9):
        logits, cache = decode(params, tokens[:, column : column + 1], cache)
        found.append(logits)
    expected = jax.jit(llama.logits_fn(config))(params, tokens, where)[:, prefill - 1 :]
    np.testing.assert_allclose(jnp.stack(found, 1), expected, rtol=0, atol=1e-4)


def test_left_padding_changes_nothing_whatever_its_id(config, params):
    tokens = tokens_of(columns=5)
    padded, where = jnp.pad(tokens, ((0, 0), (4, 0)), constant_values=-7), jnp.arange(9)[None] >= 4
    where = jnp.broadcast_to(where, padded.shape)
    logits = jax.jit(llama.logits_fn(config))
    np.testing.assert_allclose(
        logits(params, padded, where)[:, 4:], logits(params, tokens), rtol=0, atol=1e-4
    )


def test_no_prediction_looks_ahead(config, params):
    tokens = tokens_of()
    logits = jax.jit(llama.logits_fn(config))
    changed = logits(params, tokens.at[:, 5].add(1) % 37) - logits(params, tokens)
    moved = jnp.abs(changed).max(axis=(0, 2))
    assert (moved[:5] == 0).all()
    assert (moved[5:] > 1e-3).all()


def test_heads_that_share_keys_are_those_of_keys_repeated(params, config):
    """As a model with keys and values for each head, which are the shared ones again."""
    every = dataclasses.replace(config, num_key_value_heads=4)

    def repeat(path, x):
        if not any(name in jax.tree_util.keystr(path) for name in ("k_proj", "v_proj")):
            return x
        heads = x.reshape(2, config.head_width, *x.shape[1:])
        return jnp.repeat(heads, 2, axis=0).reshape(-1, *x.shape[1:])

    repeated = jax.tree_util.tree_map_with_path(repeat, params)
    np.testing.assert_allclose(
        jax.jit(llama.logits_fn(config))(params, tokens_of()),
        jax.jit(llama.logits_fn(every))(repeated, tokens_of()),
        rtol=0,
        atol=1e-4,
    )


def test_adapters_of_every_matrix_are_as_merged(config, params):
    adapters = init_lora(params, jax.random.key(2), rank=2)
    adapters = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters
    )
    logits = jax.jit(llama.logits_fn(config))
    merged = logits(merge_lora(params, adapters), tokens_of())
    np.testing.assert_allclose(
        logits(attach_lora(params, adapters), tokens_of()), merged, rtol=0, atol=2e-3
    )
    assert jnp.abs(merged - logits(params, tokens_of())).max() > 0.1
    decode, cache = jax.jit(llama.decode_fn(config)), llama.init_cache(config, 3, 9)
    np.testing.assert_allclose(
        decode(attach_lora(params, adapters), tokens_of(), cache)[0],
        merged[:, -1],
        rtol=0,
        atol=2e-3,
    )


def test_blocks_computed_again_have_the_same_gradient(config, params):
    def loss(remat):
        log_prob_fn = log_probs.make_log_prob_fn(llama.logits_fn(config, remat=remat))
        return lambda params: log_prob_fn(params, tokens_of(), jnp.ones((3, 9), bool)).sum()

    plain, again = (jax.jit(jax.grad(loss(remat)))(params) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)


def test_bfloat16_is_near_and_its_logits_are_float32(config, params):
    wide = jax.jit(llama.logits_fn(config))(params, tokens_of())
    narrow = jax.jit(llama.logits_fn(config, dtype=jnp.bfloat16))(params, tokens_of())
    assert narrow.dtype == jnp.float32
    assert 0 < jnp.abs(narrow - wide).mean() < 0.05 * wide.std()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, got 4 and 3"),
        ({"head_dim": 5}, "head_dim must be even, got 5"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of"),
        ({"qkv_bias": "no"}, "qkv_bias must be True or False, got 'no'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a number"),
    ],
)
def test_a_shape_that_is_none_is_refused(bare, changes, message):
    with refused(message):
        dataclasses.replace(CONFIG, **changes)


def test_more_columns_than_positions_are_refused():
    params = llama.init_params(CONFIG, jax.random.key(0))
    with refused("12 positions but was given 13 columns"):
        llama.logits_fn(CONFIG)(params, jnp.zeros((1, 13), jnp.int32))
    with refused("12 positions but was given 13 columns"):
        llama.init_cache(CONFIG, 1, 13)
