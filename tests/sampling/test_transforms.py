"""Support and probabilities against a reference that sorts, ties and extremes included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fjax.sampling import chain, greedy, identity, temperature, top_k, top_p

# Float32, coarse enough for ties and wide enough for tokens whose probability is 0; padded to one
# size, to compile once.
COARSE = st.integers(-40, 40).map(lambda i: i / 4) | st.sampled_from(
    [-np.inf, -1e4, 1e4, 1e30, -1e30, -0.0]
)
LOGITS = hnp.arrays(np.float32, 12, elements=COARSE).filter(lambda x: np.isfinite(x).any())


def reference_top_k(logits, k):
    return logits >= np.sort(logits)[::-1][min(k, len(logits)) - 1]


def reference_top_p(logits, p):
    """The support, and whether p is so close to one of the sums that rounding may decide."""
    probs = np.exp(logits.astype(float) - logits.max())
    probs /= probs.sum()
    order = np.argsort(-logits, kind="stable")
    sums = np.cumsum(probs[order])
    close = np.abs(sums - p).min() < 1e-6
    return logits >= logits[order[np.argmax(sums >= p)]], close


def support(transform, logits):
    kept = np.asarray(jax.jit(transform)(jnp.asarray(logits)))
    # what is kept is left as it was
    np.testing.assert_array_equal(kept[kept > -np.inf], logits[kept > -np.inf])
    return kept > -np.inf


@settings(max_examples=60)
@given(LOGITS, st.sampled_from([1, 2, 5, 11, 12, 40]))
def test_top_k_support(logits, k):
    expected = reference_top_k(logits, k) & (logits > -np.inf)
    np.testing.assert_array_equal(support(top_k(k), logits), expected)


@settings(max_examples=100)
@given(LOGITS, st.sampled_from([1e-6, 0.1, 0.37, 0.5, 0.9, 0.99]))
def test_top_p_support(logits, p):
    expected, close = reference_top_p(logits, p)
    if not close:
        np.testing.assert_array_equal(support(top_p(p), logits), expected & (logits > -np.inf))


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_probabilities_at_a_real_vocabulary(scale):
    """Support and renormalised probabilities over 5000 tokens, as rows of two axes."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 5000), scale=scale).astype(np.float32)
    for transform, kept in (
        (top_k(50), lambda row: reference_top_k(row, 50)),
        (top_p(0.9), lambda row: reference_top_p(row, 0.9)[0]),
    ):
        ours = np.asarray(jax.nn.softmax(jax.jit(transform)(logits), -1)).reshape(6, -1)
        for row, probs in zip(logits.reshape(6, -1), ours, strict=True):
            expected = np.where(kept(row), np.exp(row.astype(float)), 0.0)
            np.testing.assert_array_equal(probs > 0, expected > 0)
            np.testing.assert_allclose(probs, expected / expected.sum(), rtol=1e-4, atol=1e-9)


def test_top_p_is_the_smallest_set_that_reaches_p():
    probs = np.random.default_rng(1).dirichlet(np.ones(200))
    kept = support(top_p(0.8), np.log(probs).astype(np.float32))
    assert probs[kept].sum() >= 0.8 > probs[kept].sum() - probs[kept].min()
    assert probs[kept].min() > probs[~kept].max()


def test_the_token_that_crosses_p_is_the_last_that_is_kept():
    """A thousandth on either side of the first token's mass; the mutant `> enough + 1e-3` lived."""
    logits = np.array([0.0, -1.0, -2.0], np.float32)
    first = 1 / np.exp(logits.astype(float)).sum()
    assert support(top_p(first * (1 - 5e-4)), logits).tolist() == [True, False, False]
    assert support(top_p(first * (1 + 5e-4)), logits).tolist() == [True, True, False]


@pytest.mark.parametrize("transform", [top_k(2), top_p(0.6)])
def test_ties_stay_together(transform):
    """The second place is shared by three tokens, one of them through the two zeros of floating
    point."""
    assert support(transform, np.array([0.0, 1.0, -0.0, -2.0, 0.0], np.float32)).tolist() == [
        True
    ] * 3 + [False, True]


def test_what_leaves_the_model_as_it_is():
    assert temperature(1.0) is top_p(1.0) is top_k(None) is identity
    logits = jnp.arange(4.0)
    np.testing.assert_array_equal(top_k(4)(logits), logits)
    np.testing.assert_array_equal(chain()(logits), logits)


def test_greedy_is_the_limit_of_temperature_zero():
    logits = jnp.array([[0.3, 2.0, 1.9], [1.0, -1.0, 0.5]])
    np.testing.assert_allclose(
        jax.nn.softmax(greedy(logits)), jax.nn.softmax(temperature(1e-3)(logits)), atol=1e-30
    )
    assert greedy(jnp.array([5.0, 5.0, 1.0])).tolist() == [0.0, -np.inf, -np.inf]


def test_chain_goes_from_left_to_right():
    """Truncating a flattened distribution keeps more than flattening a truncated one."""
    logits = np.array([3.0, 1.0, 0.0, -1.0], np.float32)
    flat_first = np.asarray(chain(temperature(3.0), top_p(0.9))(jnp.asarray(logits)))
    flat_last = np.asarray(chain(top_p(0.9), temperature(3.0))(jnp.asarray(logits)))
    assert (flat_first > -np.inf).sum() == 4
    assert (flat_last > -np.inf).sum() == 2
    np.testing.assert_allclose(flat_last[:2], logits[:2] / 3)


def test_equal_settings_give_one_function():
    assert top_p(0.9) is top_p(0.9)
    assert chain(temperature(0.7), top_k(50)) is chain(temperature(0.7), top_k(50))
    assert top_p(0.9) is not top_p(0.8)


@pytest.mark.parametrize(
    "transform", [top_k(3), top_p(0.8), chain(temperature(0.7), top_k(4), top_p(0.9))]
)
def test_gradient_is_that_of_the_truncated_softmax(transform):
    """The set is held fixed: the gradient of a kept token's log-probability is one-hot minus
    probabilities."""
    logits = jnp.array([0.1, 2.0, 1.0, -1.0, 1.5])
    scale = (transform(logits) / logits)[1]
    gradient = jax.grad(lambda x: jax.nn.log_softmax(transform(x))[1])(logits)
    expected = scale * (jax.nn.one_hot(1, 5) - jax.nn.softmax(transform(logits)))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    "transform", [greedy, temperature(0.5), top_k(2), top_p(0.5), chain(top_k(3), top_p(0.9))]
)
def test_under_vmap(transform):
    logits = jax.random.normal(jax.random.key(0), (3, 4, 9))
    np.testing.assert_array_equal(jax.vmap(jax.vmap(transform))(logits), transform(logits))


@pytest.mark.parametrize(
    "transform", [greedy, temperature(0.5), top_k(2), top_p(0.5), chain(top_k(3), top_p(0.9))]
)
@pytest.mark.parametrize("logits", [[0.0, jnp.nan, 2.0, 1.0], [jnp.nan] * 4, [-jnp.inf] * 4])
def test_what_is_no_distribution_does_not_become_one(transform, logits):
    """NaN is neither dropped nor chosen with certainty: whoever normalises gets NaN."""
    assert np.isnan(jax.nn.log_softmax(transform(jnp.array(logits)))).any()


def test_greedy_takes_a_certain_token():
    assert greedy(jnp.array([0.0, jnp.inf, -jnp.inf])).tolist() == [-np.inf, 0.0, -np.inf]


def test_double_precision(x64):
    logits = jnp.asarray(np.random.default_rng(3).normal(size=20))
    for transform in (top_k(5), top_p(0.5), temperature(0.5), greedy):
        assert transform(logits).dtype == jnp.float64


@pytest.mark.parametrize(
    ("maker", "value"),
    [
        (temperature, 0.0),
        (temperature, -1.0),
        (temperature, float("inf")),
        (temperature, float("nan")),
        (top_k, 0),
        (top_p, 0.0),
        (top_p, 1.1),
        (top_p, float("nan")),
    ],
)
def test_bad_settings_are_named(maker, value):
    with pytest.raises(ValueError, match=str(value)):
        maker(value)
