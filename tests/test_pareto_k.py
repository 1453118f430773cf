"""Pareto k̂ against tails of known shape and against the formulas of Zhang and Stephens in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import estimators


def pareto_weights(k: float, n: int, seed: int = 0) -> np.ndarray:
    """Of a generalised Pareto distribution of shape k, with a density from 1 on."""
    uniform = np.random.default_rng(seed).uniform(size=n)
    return 1 + (uniform**-k - 1) / k


def by_hand(weights: np.ndarray) -> float:
    """With loops, as the articles have it: X sorted from small to large, F(x) = 1 - (1 - θx)^(1/κ),
    and k = -κ."""
    weights = np.sort(weights[weights > 0])
    size = int(np.ceil(min(len(weights) / 5, 3 * np.sqrt(len(weights)))))
    x = weights[-size:] - weights[-size - 1]
    n, m = size, 30 + int(np.sqrt(size))
    quartile = x[int(n / 4 + 0.5) - 1]
    thetas = [1 / x[-1] + (1 - np.sqrt(m / (j - 0.5))) / (3 * quartile) for j in range(1, m + 1)]
    kappas = [-np.mean(np.log(1 - theta * x)) for theta in thetas]
    log_likelihoods = np.array(
        [
            n * (np.log(theta / kappa) + kappa - 1)
            for theta, kappa in zip(thetas, kappas, strict=True)
        ]
    )
    posterior = np.exp(log_likelihoods - log_likelihoods.max())
    theta = np.sum(thetas * posterior) / posterior.sum()
    return (n * np.mean(np.log(1 - theta * x)) + 10 * 0.5) / (n + 10)


@pytest.mark.parametrize("k", [-0.5, 0.2, 0.7, 1.5])
@pytest.mark.parametrize("n", [40, 225, 3000])
def test_it_is_what_the_articles_have(k, n, x64):
    weights = pareto_weights(k, n)
    found = estimators.pareto_k(jnp.log(weights))
    assert float(found) == pytest.approx(by_hand(weights), rel=1e-9)


@pytest.mark.parametrize("k", [-0.3, 0.2, 0.5, 0.7, 1.0, 1.5])
def test_tails_of_known_shape_are_recognised(k, x64):
    """Over 100 samples of 10,000 weights the mean is within five standard errors of k, drawn
    towards ½ by ten weights' worth beside the 300 of the tail; and 0.02 for the fit's own bias."""
    log_weights = jnp.log(np.stack([pareto_weights(k, 10_000, seed) for seed in range(100)]))
    found = np.asarray(jax.vmap(estimators.pareto_k)(log_weights))
    expected = (300 * k + 5) / 310
    assert abs(found.mean() - expected) < 5 * found.std() / 10 + 0.02


def test_light_tails_are_far_below_and_heavy_ones_above_the_limit():
    rng = np.random.default_rng(0)
    gaussian = jnp.asarray(rng.normal(size=4000), "float32")
    assert estimators.pareto_k(0.3 * gaussian) < 0.5  # weights between near distributions
    assert estimators.pareto_k(4 * gaussian) > 0.7  # between far ones: the mean is e^8
    assert estimators.pareto_k(jnp.log(jnp.asarray(rng.uniform(size=4000), "float32"))) < 0.1


def test_scale_and_weights_of_zero_change_nothing(x64):
    log_weights = jnp.log(pareto_weights(0.6, 500))
    expected = estimators.pareto_k(log_weights)
    padded = jnp.append(log_weights - 1234.5, jnp.full(5000, -jnp.inf))
    assert estimators.pareto_k(padded) == pytest.approx(float(expected), rel=1e-6)
    counted = jnp.arange(5500) < 500
    junk = jnp.where(counted, padded, jnp.nan)
    found = jax.jit(estimators.pareto_k)(junk, where=counted)
    assert found == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.0] * 100, np.inf),
        ([1.0] * 20, np.inf),  # two hits or twenty say nothing of a tail
        ([1.0] * 21, -np.inf),
        ([1.0] * 100 + [50.0] * 4, np.inf),  # four above the others
        ([1.0], np.inf),
        ([np.nan] + [1.0] * 100, np.nan),
    ],
    ids=["all-zero", "twenty", "equal", "four", "one", "nan"],
)
def test_what_rests_on_too_little_is_not_called_good(weights, expected):
    found = estimators.pareto_k(jnp.log(jnp.array(weights, "float32")))
    np.testing.assert_equal(float(found), expected)


def test_float32_is_near_float64():
    weights = pareto_weights(0.7, 2000)
    found = estimators.pareto_k(jnp.log(jnp.asarray(weights, "float32")))
    assert float(found) == pytest.approx(by_hand(weights), abs=1e-3)


def test_one_weight_rounded_apart_is_no_tail():
    """Weights of a reward of 0 and 1, with log q as a sampler and a scorer round it; the noise is of
    a heavy tail, which k̂ said of them (1 and more) before. So with a few larger ones, exact too."""
    rng = np.random.default_rng(0)
    noise = 1e-5 * rng.standard_t(2, 640)
    of_two = jnp.asarray(np.where(rng.random(640) < 0.3, 4.0, 0.0) + noise, "float32")
    assert estimators.pareto_k(of_two) == -np.inf
    of_three = of_two.at[:40].set(4.56 + noise[:40])
    assert estimators.pareto_k(of_three) < 0
    near = jnp.asarray(1e-4 * rng.normal(size=640), "float32")  # a policy that is the base model
    assert estimators.pareto_k(near) == -np.inf
