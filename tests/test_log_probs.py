"""The shift by one, the masks, and the packing of prompts, each against a loop over single
tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import log_probs, sampling
from tests.cases import refused

B, T, V = 3, 6, 5


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(B, T, V)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    lengths = np.array([6, 4, 2])
    column = np.arange(T)[None]
    return logits, tokens, jnp.asarray((column >= 1) & (column < lengths[:, None]))


def by_hand(logits, tokens, where):
    """Σ over counted tokens of the log-softmax one column to the left."""
    table = np.asarray(jax.nn.log_softmax(logits))
    return [
        sum(table[b, t - 1, tokens[b, t]] for t in range(T) if where[b, t])
        for b in range(len(tokens))
    ]


def test_sequence_log_probs_shift_by_one(batch):
    np.testing.assert_allclose(
        log_probs.sequence_log_probs(*batch[:2], where=batch[2]), by_hand(*batch), rtol=1e-5
    )


@pytest.mark.parametrize("start", [1, 2, 4])
def test_make_log_prob_fn_counts_what_stands_behind_the_prompt(batch, start):
    """And asks the model for no more columns than it needs."""
    logits, tokens, where = batch
    where = where & (jnp.arange(T) >= start)[None]
    asked = []

    def model(params, tokens, where=None, *, start=0):
        asked.append((tokens.shape[1], start))
        return params[:, start : tokens.shape[1]]

    log_pi = log_probs.make_log_prob_fn(model, start=start)(logits, tokens, where)
    np.testing.assert_allclose(log_pi, by_hand(logits, tokens, where), rtol=1e-5)
    assert asked == [(T - 1, start - 1)]


def test_the_transform_of_the_sampler_is_applied(batch):
    logits, tokens, where = batch
    model = lambda params, tokens, where=None, *, start=0: params[:, start : tokens.shape[1]]  # noqa: E731
    colder = log_probs.make_log_prob_fn(model, transform=sampling.temperature(0.5))(
        logits, tokens, where
    )
    np.testing.assert_allclose(colder, by_hand(2 * logits, tokens, where), rtol=1e-5)


def nothing_more(params, tokens, where=None, *, start=0):
    """A model whose parameters are its logits."""
    return params[:, start : tokens.shape[1]]


def by_sequence(logits, tokens, where):
    return log_probs.sequence_log_probs(logits, tokens, where=where)


SCORERS = [
    by_sequence,
    log_probs.make_log_prob_fn(nothing_more),
    log_probs.make_token_log_prob_fn(nothing_more),
]
each_scorer = pytest.mark.parametrize(
    "score", SCORERS, ids=["sequence_log_probs", "log_prob_fn", "token_log_prob_fn"]
)


@each_scorer
def test_a_counted_token_without_prediction_is_nan_not_a_wrong_number(batch, score):
    """And a sentence, where the mask is known when the function is called."""
    logits, tokens, where = batch
    bad = where.at[1, 0].set(True)
    result = np.asarray(jax.jit(score)(logits, tokens, bad)).reshape(B, -1)
    assert np.isnan(result).any(1).tolist() == [False, True, False]
    with refused("where counts column 0 of row 1, but nothing predicts a token before column 1"):
        score(logits, tokens, bad)


def test_a_counted_token_before_the_start_is_refused(batch):
    logits, tokens, where = batch
    with refused("where counts column 1 of row 0, but nothing predicts a token before column 2"):
        log_probs.make_log_prob_fn(nothing_more, start=2)(logits, tokens, where)


@each_scorer
def test_what_is_not_counted_may_be_anything(batch, score):
    """Ids of padding and the logits above them, in value and in gradient: NaN and infinities do not
    pass a mask."""
    logits, tokens, where = batch

    def value_and_gradient(logits, tokens):
        return jax.value_and_grad(
            lambda x: (score(x, tokens, where) * jnp.arange(1.0, 4).reshape(score.shape)).sum()
        )(logits)

    score.shape = (-1,) if score(logits, tokens, where).ndim == 1 else (-1, 1)
    expected = value_and_gradient(logits, tokens)
    predicts = jnp.pad(where[:, 1:], ((0, 0), (0, 1)))
    behind = jnp.cumsum(where, 1) == where.sum(1, keepdims=True)
    for ids in (-100, V, 10**6):
        for value in (jnp.nan, jnp.inf, -jnp.inf):
            found = value_and_gradient(
                jnp.where(predicts[..., None], logits, value),
                jnp.where(behind & ~where & (jnp.arange(T) > 0)[None], ids, tokens),
            )
            jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32])
@pytest.mark.parametrize("bad", [-100, -1, 5])
def test_an_id_that_the_vocabulary_has_not_is_nan(batch, dtype, bad):
    """Also those that NumPy would count from the end; and one such row leaves the others and the
    gradient alone."""
    logits, tokens, where = batch
    tokens = tokens.at[0, 2].set(bad).astype(dtype)
    result, gradient = jax.value_and_grad(
        lambda x: log_probs.sequence_log_probs(x, tokens, where=where)[1:].sum()
    )(logits)
    assert np.isnan(log_probs.sequence_log_probs(logits, tokens, where=where)).tolist() == [
        True,
        False,
        False,
    ]
    assert np.isfinite(result)
    assert np.isfinite(gradient).all()


def test_ids_of_few_bits_are_compared_with_a_large_vocabulary():
    tokens = jnp.array([3, -100], jnp.int8)
    found = log_probs.token_log_probs(jnp.zeros((2, 300)), tokens)
    np.testing.assert_allclose(found, [-np.log(300), np.nan], rtol=1e-6)


@each_scorer
def test_integer_masks_count_where_they_are_not_zero(batch, score):
    logits, tokens, where = batch
    np.testing.assert_array_equal(
        score(logits, tokens, where.astype(jnp.int32)), score(logits, tokens, where)
    )


@each_scorer
@pytest.mark.parametrize("shape", [(T,), (B, 1), (1, T), (B, T - 1)])
def test_masks_are_not_broadcast(batch, score, shape, bare):
    with pytest.raises(ValueError, match="where must have the shape of what it masks"):
        score(*batch[:2], jnp.zeros(shape, bool))


@pytest.mark.parametrize("shape", [(T,), (B, 1), (B, T, 1), (B, T - 1)])
def test_each_distribution_has_one_token(batch, shape, bare):
    for score in (
        log_probs.token_log_probs,
        lambda x, tokens: by_sequence(x, tokens, jnp.zeros(shape, bool)),
    ):
        with pytest.raises(
            ValueError, match="logits must have the shape of tokens and one axis more"
        ):
            score(batch[0], jnp.zeros(shape, int))


def test_one_sequence_is_not_a_batch(bare):
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\], got \[6\]"):
        log_probs.make_log_prob_fn(nothing_more)(None, jnp.zeros(T, int), jnp.zeros(T, bool))


def test_the_transform_is_given_float32(batch):
    """As the sampler has it; in bfloat16, its quotients would be rounded to three digits."""
    logits, tokens, where = batch
    half = logits.astype(jnp.bfloat16)
    colder = log_probs.make_log_prob_fn(nothing_more, transform=sampling.temperature(0.3))(
        half, tokens, where
    )
    np.testing.assert_allclose(
        colder, by_hand(half.astype(jnp.float32) / 0.3, tokens, where), rtol=1e-6
    )


def test_float32_under_64_bits(batch):
    """The same numbers in the same dtypes, with ids of either size."""
    expected = [score(*batch) for score in SCORERS]
    with jax.enable_x64(True):
        for tokens in (batch[1], batch[1].astype(jnp.int64)):
            for score, right in zip(SCORERS, expected, strict=True):
                found = score(batch[0], tokens, batch[2])
                assert found.dtype == jnp.float32
                np.testing.assert_allclose(found, right, rtol=1e-6)


def test_half_precision_is_summed_in_float32(batch):
    logits, tokens, where = batch
    half = logits.astype(jnp.bfloat16)
    result = log_probs.sequence_log_probs(half, tokens, where=where)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, by_hand(half.astype(jnp.float32), tokens, where), rtol=1e-6)


def test_what_is_not_counted_has_no_gradient(batch):
    logits, tokens, where = batch
    gradient = jax.grad(lambda x: log_probs.sequence_log_probs(x, tokens, where=where).sum())(
        logits
    )
    predicts = np.asarray(jnp.pad(where[:, 1:], ((0, 0), (0, 1))))
    assert (np.abs(gradient).max(-1) > 0).tolist() == predicts.tolist()


def test_impossible_tokens_are_minus_infinity_without_nan_in_the_gradient():
    logits = jnp.array([[0.0, -jnp.inf, 1.0]])
    assert log_probs.token_log_probs(logits, jnp.array([1])).tolist() == [-np.inf]
    gradient = jax.grad(lambda x: log_probs.token_log_probs(x, jnp.array([2])).sum())(logits)
    assert np.isfinite(gradient).all()


def test_pack_makes_left_padded_prompts_contiguous():
    prompt = jnp.array([[0, 0, 5], [6, 7, 8]])
    prompt_where = jnp.array([[False, False, True], [True, True, True]])
    completion, where = jnp.array([[1, 2], [3, 4]]), jnp.array([[True, True], [True, False]])
    tokens, counted = log_probs.pack(prompt, completion, prompt_where=prompt_where, where=where)
    assert tokens[0, :3].tolist() == [5, 1, 2]
    assert tokens[1, :4].tolist() == [6, 7, 8, 3]
    assert counted.tolist() == [
        [False, True, True, False, False],
        [False, False, False, True, False],
    ]


@pytest.mark.parametrize(
    "mask",
    [
        [0, 0, 1, 1],
        [1, 1, 0, 0],
        [1, 0, 0, 1],
        [0, 1, 1, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 0],
        [1, 1, 1, 1],
    ],
)
def test_pack_closes_every_gap(mask):
    """Padding left, right, on both sides or in between, in either kind of mask: real tokens come
    first, in their order."""
    prompt = jnp.array([[5, 6, 7, 8]])
    where = jnp.array([[True, False]])
    kept = [i for i, m in zip([5, 6, 7, 8], mask, strict=True) if m]
    for prompt_where in (jnp.array([mask]), jnp.array([mask], bool)):
        tokens, counted = log_probs.pack(
            prompt, jnp.array([[1, 2]]), prompt_where=prompt_where, where=where
        )
        assert tokens[0, : len(kept) + 2].tolist() == [*kept, 1, 2]
        assert jnp.flatnonzero(counted[0]).tolist() == [len(kept)]


def test_pack_keeps_ids_whole():
    tokens, _ = log_probs.pack(
        jnp.array([[1]], jnp.int8), jnp.array([[300]]), where=jnp.ones((1, 1), bool)
    )
    assert tokens.tolist() == [[1, 300]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion": jnp.zeros((1, 3), int)}, r"as many rows; got \[2, 2\] and \[1, 3\]"),
        ({"prompt": jnp.zeros(2, int)}, r"as many rows; got \[2\] and \[2, 3\]"),
        ({"where": jnp.ones((1, 3), bool)}, "where must have the shape of what it masks"),
        ({"prompt_where": jnp.ones(2, bool)}, "prompt_where must have the shape of what it masks"),
        ({"prompt_where": jnp.ones((2, 2))}, "prompt_where must be booleans"),
    ],
)
def test_pack_refuses_what_does_not_belong_together(changes, message, bare):
    given = {
        "prompt": jnp.zeros((2, 2), int),
        "completion": jnp.zeros((2, 3), int),
        "where": jnp.ones((2, 3), bool),
    } | changes
    with pytest.raises(ValueError, match=message):
        log_probs.pack(given.pop("prompt"), given.pop("completion"), **given)


def test_where_from_lengths_of_any_rank():
    assert log_probs.where_from_lengths(jnp.array(2), 3).tolist() == [True, True, False]
    assert log_probs.where_from_lengths(jnp.array([[0], [3]]), 3).tolist() == [
        [[False] * 3],
        [[True] * 3],
    ]


def test_a_start_without_prediction_is_refused():
    with refused("start must be at least 1"):
        log_probs.make_log_prob_fn(lambda *_, **__: None, start=0)
