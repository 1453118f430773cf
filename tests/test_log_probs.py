"""The shift by one, the masks, and the packing of prompts, each against a loop over single tokens."""

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
    return [sum(table[b, t - 1, tokens[b, t]] for t in range(T) if where[b, t]) for b in range(len(tokens))]


def test_sequence_log_probs_shift_by_one(batch):
    np.testing.assert_allclose(log_probs.sequence_log_probs(*batch[:2], where=batch[2]), by_hand(*batch), rtol=1e-5)


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
    colder = log_probs.make_log_prob_fn(model, transform=sampling.temperature(0.5))(logits, tokens, where)
    np.testing.assert_allclose(colder, by_hand(2 * logits, tokens, where), rtol=1e-5)


def test_a_counted_token_without_prediction_is_nan_not_a_wrong_number(batch):
    logits, tokens, where = batch
    bad = where.at[1, 0].set(True)
    result = np.isnan(log_probs.sequence_log_probs(logits, tokens, where=bad))
    assert result.tolist() == [False, True, False]


def test_half_precision_is_summed_in_float32(batch):
    logits, tokens, where = batch
    half = logits.astype(jnp.bfloat16)
    result = log_probs.sequence_log_probs(half, tokens, where=where)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, by_hand(half.astype(jnp.float32), tokens, where), rtol=1e-6)


def test_what_is_not_counted_has_no_gradient(batch):
    logits, tokens, where = batch
    gradient = jax.grad(lambda x: log_probs.sequence_log_probs(x, tokens, where=where).sum())(logits)
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
    assert counted.tolist() == [[False, True, True, False, False], [False, False, False, True, False]]


def test_where_from_lengths_of_any_rank():
    assert log_probs.where_from_lengths(jnp.array(2), 3).tolist() == [True, True, False]
    assert log_probs.where_from_lengths(jnp.array([[0], [3]]), 3).tolist() == [[[False] * 3], [[True] * 3]]


def test_a_start_without_prediction_is_refused():
    with refused("start must be at least 1"):
        log_probs.make_log_prob_fn(lambda *_, **__: None, start=0)
