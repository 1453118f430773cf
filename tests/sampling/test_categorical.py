"""The inverse CDF in blocks: exact at both ends, never an impossible token, and the right
frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fjax.sampling import draw
from fjax.sampling.categorical import BLOCK, _invert

LARGEST_UNIFORM = 1 - 2**-23  # jax.random.uniform in float32 never exceeds it
VOCABULARIES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1000]


def keys_of(n):
    return jax.random.split(jax.random.key(7), n)


def skewed_logits(vocabulary, seed=0):
    """Some probable tokens, a long tail, and a fifth of the tokens impossible, the first and the
    last among them."""
    rng = np.random.default_rng(seed)
    logits = 2.0 * rng.normal(size=vocabulary)
    logits[rng.random(vocabulary) < 0.2] = -np.inf
    logits[[0, -1]] = -np.inf if vocabulary > 2 else 0.0
    return jnp.asarray(logits, jnp.float32)


@pytest.mark.parametrize("uniform", [0.0, 2**-23, 0.3, LARGEST_UNIFORM])
@pytest.mark.parametrize(
    "weights",
    [
        [1],
        [0, 1],
        [1, 0],
        [0, 0, 2, 0],
        [0, 1e-30, 0],
        [1, 1e-12, 0],
        [0, 1e-12, 1, 0],
        [3e38, 0.0, 1e-38],
    ],
)
def test_no_weight_no_draw(weights, uniform):
    weights = np.asarray(weights, np.float32)
    chosen = int(_invert(jnp.asarray(weights), jnp.float32(uniform)))
    assert weights[chosen] > 0


def test_ends_of_the_interval():
    weights = jnp.array([0.0, 0.25, 0.5, 0.25, 0.0])
    places = {0.0: 1, 0.2499: 1, 0.25: 2, 0.7499: 2, 0.75: 3, LARGEST_UNIFORM: 3}
    assert {u: int(_invert(weights, jnp.float32(u))) for u in places} == places


def test_inverse_is_the_exact_one_away_from_the_steps():
    """Against a running sum in float64, over a grid of uniforms; 1e-6 around each step is left to
    rounding."""
    weights = np.random.default_rng(1).random(300).astype(np.float32)
    cdf = np.cumsum(weights.astype(float)) / weights.sum(dtype=float)
    grid = ((np.arange(20_000) + 0.5) / 20_000).astype(np.float32)
    clear = np.abs(grid[:, None] - cdf).min(1) > 1e-6
    chosen = np.asarray(jax.vmap(_invert, (None, 0))(jnp.asarray(weights), jnp.asarray(grid)))
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(chosen[clear], np.searchsorted(cdf, grid, side="right")[clear])


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_log_prob_is_that_of_the_token(vocabulary):
    logits = skewed_logits(vocabulary)
    tokens, log_probs = jax.jit(jax.vmap(draw, (0, None)))(keys_of(64), logits)
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits)[tokens], atol=2e-6)
    # no impossible token, no column of the last block's padding
    assert np.isfinite(log_probs).all()


def test_float32_suffices_at_the_vocabulary_of_gpt2():
    logits = np.random.default_rng(2).normal(size=50257, scale=3)
    exact = logits - np.logaddexp.reduce(logits)
    tokens, log_probs = jax.jit(jax.vmap(draw, (0, None)))(
        keys_of(64), jnp.asarray(logits, jnp.float32)
    )
    np.testing.assert_allclose(log_probs, exact[tokens], atol=3e-6)


@pytest.mark.parametrize("vocabulary", [5, 300])
def test_frequencies(vocabulary):
    """Chi-square with expected counts of at least 5; the seed is fixed, and 1e-4 is what a right
    sampler fails with."""
    n, logits = 100_000, skewed_logits(vocabulary, seed=3)
    tokens, _ = jax.jit(jax.vmap(draw, (0, None)))(keys_of(n), logits)
    counts, expected = (
        np.bincount(tokens, minlength=vocabulary),
        n * np.asarray(jax.nn.softmax(logits), float),
    )
    assert not counts[expected == 0].any()
    often = expected >= 5
    observed = [*counts[often], counts[~often].sum()]
    predicted = [*expected[often], expected[~often].sum()]
    if predicted[-1] < 5:
        observed, predicted = observed[:-1], predicted[:-1]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, predicted, strict=True))
    assert statistic < stats.chi2.ppf(1 - 1e-4, len(predicted) - 1)


def test_rows_do_not_see_each_other():
    keys = keys_of(7)
    logits = jnp.stack([skewed_logits(300, seed) for seed in range(7)])
    tokens, log_probs = jax.jit(jax.vmap(draw))(keys, logits)
    alone = [jax.jit(draw)(key, row) for key, row in zip(keys, logits, strict=True)]
    assert tokens.tolist() == [int(token) for token, _ in alone]
    np.testing.assert_allclose(log_probs, [log_prob for _, log_prob in alone], atol=1e-6)


@pytest.mark.parametrize("logits", [[1e4, -1e4, 9e3], [-1e38, -1e38, -jnp.inf], [3e38, 0.0, 3e38]])
def test_extreme_logits_stay_finite(logits):
    _, log_probs = jax.jit(jax.vmap(draw, (0, None)))(keys_of(20), jnp.array(logits))
    assert np.isfinite(log_probs).all()


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK, BLOCK + 3])
@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
def test_no_distribution_gives_nan_and_an_id_that_exists(vocabulary, value):
    """All logits so, and only the last of them; -inf there is an ordinary distribution."""
    one = jnp.zeros(vocabulary).at[-1].set(value)
    for logits in (jnp.full(vocabulary, value), one):
        tokens, log_probs = jax.vmap(draw, (0, None))(keys_of(16), logits)
        assert ((tokens >= 0) & (tokens < vocabulary)).all()
        assert np.isnan(log_probs).all() == (not np.isfinite(jax.nn.logsumexp(logits)))


def test_rows_are_for_vmap(bare):
    with pytest.raises(ValueError, match=r"logits must be \[V\], got \[2, 3\].*jax.vmap"):
        draw(jax.random.key(0), jnp.zeros((2, 3)))


def test_half_precision_is_computed_in_float32():
    logits = skewed_logits(300).astype(jnp.bfloat16)
    token, log_prob = jax.jit(draw)(jax.random.key(0), logits)
    assert log_prob.dtype == jnp.float32
    np.testing.assert_allclose(
        log_prob, jax.nn.log_softmax(logits.astype(jnp.float32))[token], atol=2e-6
    )


def test_double_precision(x64):
    logits = jnp.asarray(np.random.default_rng(4).normal(size=300))
    token, log_prob = jax.jit(draw)(jax.random.key(0), logits)
    assert (token.dtype, log_prob.dtype) == (jnp.int32, jnp.float64)
    np.testing.assert_allclose(log_prob, jax.nn.log_softmax(logits)[token], rtol=1e-13)
