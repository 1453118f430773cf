"""The GPT-2 is a probability distribution, causal, and the same with and without its cache."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import enumeration, log_probs
from fjax.models import gpt2
from tests.cases import refused

CONFIG = gpt2.GPT2Config(vocab_size=37, n_positions=12, n_embd=16, n_layer=2, n_head=2)


def random_params(config, *, scale=5.0, dtype=jnp.float32, seed=0):
    """Larger than at initialisation, so that predictions are far from uniform and depend on the
    context."""
    return jax.tree.map(
        lambda x: scale * x, gpt2.init_params(config, jax.random.key(seed), param_dtype=dtype)
    )


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def tokens_of(rows=3, columns=9, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 37, (rows, columns)), jnp.int32)


def test_probabilities_of_all_finished_sequences_and_prefixes_sum_to_one(x64):
    """With padding = EOS, in float64 to 1e-10. A mask of token ids drops the ends, and gets another
    sum."""
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
    """The longest sequences always end if the model cannot go on: then no prefix has mass, and Σ
    π(finished) = 1."""
    config = gpt2.GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    params = random_params(config, dtype=jnp.float64)
    space = enumeration.sequences(4, 4, eos_id=3, prompt=(3,))
    logits_fn = gpt2.logits_fn(config, dtype=jnp.float64)

    def ends_at_four(params, tokens, where=None, *, start=0):
        logits = logits_fn(params, tokens, start=start)
        last = (jnp.arange(start, tokens.shape[1]) == 3)[None, :, None] & (jnp.arange(4) != 3)[
            None, None, :
        ]
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
        hidden, _ = gpt2._GPT2(CONFIG, jnp.float32).apply(
            {"params": params}, tokens, None, None, True
        )
        return (hidden[0, column] @ head.T).sum()

    for column in (0, 3, 7):
        size = jnp.abs(jax.grad(logit_sum)(params, column)["wte"]["embedding"][:8]).sum(-1)
        assert (size > 0).tolist() == [i <= column for i in range(8)]


def test_start_leaves_out_columns_and_changes_nothing(params):
    logits = gpt2.logits_fn(CONFIG)
    np.testing.assert_allclose(
        logits(params, tokens_of(), start=4),
        logits(params, tokens_of())[:, 4:],
        rtol=1e-5,
        atol=1e-5,
    )


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
    np.testing.assert_allclose(
        logits(params, padded, where, start=4), logits(params, tokens), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("padding", [-100, -1, 37, 10**6])
def test_padding_may_have_any_id(params, padding):
    """On the left, on the right and in between: logits, their gradient, scores and the cache are
    those of token 0 there."""
    tokens, where = (
        tokens_of(),
        jnp.asarray(np.random.default_rng(1).random((3, 9)) < 0.6).at[:, -1].set(True),
    )
    padded = jnp.where(where, tokens, padding)
    decode, cache = gpt2.decode_fn(CONFIG), gpt2.init_cache(CONFIG, 3, 9)

    @jax.jit
    def everything(params, tokens):
        log_pi = log_probs.token_log_probs(
            gpt2.logits_fn(CONFIG)(params, tokens, where), jnp.zeros_like(tokens)
        )
        scores = gpt2.score_fn(CONFIG)(
            {"transformer": params, "score": {"kernel": jnp.ones((16, 1))}}, tokens, where
        )
        return (log_pi * where).sum(), (log_pi, scores, decode(params, tokens, cache, where)[0])

    found, expected = (
        jax.value_and_grad(everything, has_aux=True)(params, x)
        for x in (padded, jnp.where(where, tokens, 0))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.isfinite(found[0][0])


def test_padding_on_the_right_needs_no_mask(params):
    """Log-probabilities and gradient are right, though the model is not told where the padding of
    -100 begins."""
    tokens, lengths = tokens_of(), np.array([9, 6, 4])
    where = jnp.asarray((np.arange(9)[None] > 1) & (np.arange(9)[None] < lengths[:, None]))
    padded = jnp.where(np.arange(9)[None] < lengths[:, None], tokens, -100)
    score = log_probs.make_log_prob_fn(gpt2.logits_fn(CONFIG))

    def by_hand(params, tokens, where):
        return log_probs.sequence_log_probs(
            gpt2.logits_fn(CONFIG)(params, tokens), tokens, where=where
        )

    for function in (score, by_hand):
        value_and_grad = jax.jit(
            jax.value_and_grad(lambda params, x, f=function: f(params, x, where).sum())
        )
        jax.tree.map(
            np.testing.assert_array_equal,
            value_and_grad(params, padded),
            value_and_grad(params, jnp.maximum(padded, 0)),
        )


@pytest.mark.parametrize("bad", [-100, 37])
def test_an_id_that_the_vocabulary_has_not_gives_nan_from_there_on(params, bad):
    """Of its own row, with and without the cache."""
    tokens = tokens_of().at[1, 4].set(bad)
    is_nan = np.isnan(gpt2.logits_fn(CONFIG)(params, tokens)).any(-1)
    assert is_nan.tolist() == [[False] * 9, [False] * 4 + [True] * 5, [False] * 9]
    decode, cache, found = jax.jit(gpt2.decode_fn(CONFIG)), gpt2.init_cache(CONFIG, 3, 12), []
    for columns in (tokens[:, :3], *tokens[:, 3:, None].transpose(1, 0, 2)):
        logits, cache = decode(params, columns, cache)
        found.append(np.isnan(logits).any(-1))
    np.testing.assert_array_equal(np.stack(found, 1), is_nan[:, 2:])
    scores = gpt2.score_fn(CONFIG)(
        {"transformer": params, "score": {"kernel": jnp.ones((16, 1))}},
        tokens,
        jnp.ones(tokens.shape, bool),
    )
    assert np.isnan(scores).tolist() == [False, True, False]


def test_nothing_real_has_neither_score_nor_next_token(params):
    where = jnp.ones((2, 3), jnp.int32).at[1].set(0)
    scores = gpt2.score_fn(CONFIG)(
        {"transformer": params, "score": {"kernel": jnp.ones((16, 1))}}, tokens_of(2, 3), where
    )
    logits, _ = gpt2.decode_fn(CONFIG)(
        params, tokens_of(2, 3), gpt2.init_cache(CONFIG, 2, 3), where
    )
    assert np.isnan(scores).tolist() == np.isnan(logits).all(-1).tolist() == [False, True]


def test_past_the_cache_there_is_no_number(params):
    """An error where the length is known, NaN where it is traced; also past the positions of a
    cache that is too long."""
    tokens = tokens_of(2, 3)
    decode = gpt2.decode_fn(CONFIG)
    step = jax.jit(decode)
    with refused("The cache has 2 rows and 2 columns"):
        step(params, tokens, gpt2.init_cache(CONFIG, 2, 2))
    _, full = step(params, tokens, gpt2.init_cache(CONFIG, 2, 3))
    with refused("2 rows and 3 columns, 3 of them known to be filled"):
        decode(params, tokens[:, :1], full)
    with refused("The cache has 2 rows"):
        step(params, tokens[:1], gpt2.init_cache(CONFIG, 2, 3))
    for _ in range(2):
        logits, full = step(params, tokens[:, :1], full)
        assert np.isnan(logits).all()
    longer = gpt2.GPT2Config(**{**vars(CONFIG), "n_positions": 14})
    logits, cache = decode(params, tokens_of(2, 12), gpt2.init_cache(longer, 2, 14))
    assert np.isfinite(logits).all()
    assert np.isnan(decode(params, tokens[:, :1], cache)[0]).all()


def test_float32_under_64_bits(params):
    """Cached decoding too, with ids of 64 bits; the same numbers in the same dtypes."""
    tokens, where = np.asarray(tokens_of(3, 4)), np.arange(4)[None] >= np.array([[0], [1], [3]])

    def run(tokens):
        logits, cache = gpt2.decode_fn(CONFIG)(
            params, tokens, gpt2.init_cache(CONFIG, 3, 6), jnp.asarray(where)
        )
        logits_fn = gpt2.logits_fn(CONFIG)(params, tokens, jnp.asarray(where))
        return logits, logits_fn, *gpt2.decode_fn(CONFIG)(params, tokens[:, :1], cache)

    expected = jax.jit(run)(jnp.asarray(tokens))
    with jax.enable_x64(True):
        found = jax.jit(run)(jnp.asarray(tokens, jnp.int64))
    chex.assert_trees_all_equal_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_one_sequence_is_not_a_batch(params, bare):
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\], got \[5\]"):
        gpt2.logits_fn(CONFIG)(params, jnp.zeros(5, int))
    with pytest.raises(ValueError, match="where must have the shape of what it masks"):
        gpt2.logits_fn(CONFIG)(params, tokens_of(), jnp.ones((1, 9), bool))


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
    with refused("This model has 12 positions but was given 13 columns"):
        gpt2.logits_fn(CONFIG)(params, tokens_of(columns=13))
    with refused("This model has 12 positions but was given 13 columns"):
        gpt2.init_cache(CONFIG, 1, 13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 10, "n_head": 4}, "n_embd=10 and n_head=4"),
        ({"activation_function": "swish"}, "got 'swish'"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with refused(message):
        gpt2.GPT2Config(**changes)
