"""The GPT-2 is a probability distribution, causal, and the same with and without its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import enumeration, log_probs
from fjax.models import gpt2
from tests.cases import refused

CONFIG = gpt2.GPT2Config(vocab_size=37, n_positions=12, n_embd=16, n_layer=2, n_head=2)


def random_params(config, *, scale=5.0, dtype=jnp.float32, seed=0):
    """Larger than at initialisation, so that predictions are far from uniform and depend on the context."""
    return jax.tree.map(lambda x: scale * x, gpt2.init_params(config, jax.random.key(seed), param_dtype=dtype))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def tokens_of(rows=3, columns=9, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 37, (rows, columns)), jnp.int32)


def test_probabilities_of_all_finished_sequences_and_prefixes_sum_to_one(x64):
    """With padding = EOS, in float64 to 1e-10. A mask of token ids drops the ends, and gets another sum."""
    config = gpt2.GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    params = random_params(config, dtype=jnp.float64)
    space = enumeration.sequences(4, 4, eos_id=3, prompt=(3,))
    log_prob_fn = jax.jit(log_probs.make_log_prob_fn(gpt2.logits_fn(config, dtype=jnp.float64)))
    log_pi = log_prob_fn(params, space.tokens, space.where)
    assert log_pi.dtype == jnp.float64
    assert log_pi.std() > 0.3
    np.testing.assert_allclose(jnp.exp(log_pi).sum(), 1.0, rtol=0, atol=1e-10)
    from_ids = (space.tokens != 3).at[:, 0].set(False)
    assert abs(jnp.exp(log_prob_fn(params, space.tokens, from_ids)).sum() - 1) > 0.1


def test_finished_sequences_alone_sum_to_one_where_the_model_must_end(x64):
    """The longest sequences always end if the model cannot go on: then no prefix has mass, and Σ π(finished) = 1."""
    config = gpt2.GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    params = random_params(config, dtype=jnp.float64)
    space = enumeration.sequences(4, 4, eos_id=3, prompt=(3,))
    logits_fn = gpt2.logits_fn(config, dtype=jnp.float64)

    def ends_at_four(params, tokens, where=None, *, start=0):
        logits = logits_fn(params, tokens, start=start)
        last = (jnp.arange(start, tokens.shape[1]) == 3)[None, :, None] & (jnp.arange(4) != 3)[None, None, :]
        return jnp.where(last, -jnp.inf, logits)

    log_pi = log_probs.make_log_prob_fn(ends_at_four)(params, *space)
    finished = ((space.tokens == 3) & space.where).any(axis=1)
    np.testing.assert_allclose(jnp.exp(log_pi).sum(where=finished), 1.0, rtol=0, atol=1e-10)
    assert jnp.isneginf(log_pi[~finished]).all()


def test_no_prediction_looks_ahead(params):
    """By gradient: the logits of a column do not move with the embedding of a later token."""
    tokens = jnp.arange(8)[None]  # all different, so that each has an embedding of its own

    def logit_sum(params, column):
        # Without the tied head, whose rows every prediction uses.
        head = jax.lax.stop_gradient(params["wte"]["embedding"])
        hidden, _ = gpt2._GPT2(CONFIG, jnp.float32).apply({"params": params}, tokens, None, None, True)
        return (hidden[0, column] @ head.T).sum()

    for column in (0, 3, 7):
        size = jnp.abs(jax.grad(logit_sum)(params, column)["wte"]["embedding"][:8]).sum(-1)
        assert (size > 0).tolist() == [i <= column for i in range(8)]


def test_start_leaves_out_columns_and_changes_nothing(params):
    logits = gpt2.logits_fn(CONFIG)
    np.testing.assert_allclose(logits(params, tokens_of(), start=4), logits(params, tokens_of())[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefill", [1, 4, 9])
def test_cached_equals_uncached_with_left_padding(params, prefill):
    """A prompt at once, then column by column, beside the whole row without a cache."""
    tokens = tokens_of()
    where = jnp.arange(9)[None] >= jnp.array([[0], [prefill // 2], [prefill - 1]])
    decode = jax.jit(gpt2.decode_fn(CONFIG))
    cache = gpt2.init_cache(CONFIG, 3, 12)
    logits, cache = decode(params, tokens[:, :prefill], cache, where[:, :prefill])
    found = [logits]
    for column in range(prefill, 9):
        logits, cache = decode(params, tokens[:, column : column + 1], cache)
        found.append(logits)
    assert int(cache.length) == 9
    expected = gpt2.logits_fn(CONFIG)(params, tokens, where, start=prefill - 1)
    np.testing.assert_allclose(jnp.stack(found, 1), expected, rtol=0, atol=1e-4)


def test_left_padding_changes_nothing(params):
    tokens = tokens_of(columns=5)
    padded, where = jnp.pad(tokens, ((0, 0), (4, 0)), constant_values=7), jnp.arange(9)[None] >= 4
    where = jnp.broadcast_to(where, padded.shape)
    logits = gpt2.logits_fn(CONFIG)
    np.testing.assert_allclose(logits(params, padded, where, start=4), logits(params, tokens), rtol=0, atol=1e-4)


def test_half_precision_computes_but_float32_comes_out(params):
    tokens = tokens_of()
    full = gpt2.logits_fn(CONFIG)(params, tokens)
    half = gpt2.logits_fn(CONFIG, dtype=jnp.bfloat16)(params, tokens)
    assert half.dtype == jnp.float32
    assert 1e-4 < abs(half - full).max() < 0.1 * abs(full).max()


def test_dropout_only_with_a_key(params):
    logits, tokens = gpt2.logits_fn(CONFIG), tokens_of()
    np.testing.assert_array_equal(logits(params, tokens), logits(params, tokens))
    dropped = [logits(params, tokens, dropout_key=jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert abs(dropped[0] - dropped[2]).max() > 0.1


def test_more_columns_than_positions_are_refused(params):
    with refused("n_positions=12 but was given 13 columns"):
        gpt2.logits_fn(CONFIG)(params, tokens_of(columns=13))
    with refused("n_positions=12 but was given 13 columns"):
        gpt2.init_cache(CONFIG, 1, 13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"n_embd": 10, "n_head": 4}, "n_embd=10 and n_head=4"), ({"activation_function": "silu"}, "got 'silu'")],
)
def test_impossible_shapes_are_refused(changes, message):
    with refused(message):
        gpt2.GPT2Config(**changes)
