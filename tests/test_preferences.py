"""What preference losses refuse, and how they behave where exponents would overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, preferences
from tests.cases import CASES, each, name, refused


@each
def test_f_dpo_takes_exactly_the_f_whose_normaliser_cancels(case):
    two = jnp.zeros(2)
    admissible = {
        "forward_kl", "reverse_kl", "jensen_shannon", "jeffreys", "neyman_chi2", "squared_hellinger", "chi2_mix",
        "generalized_jensen_shannon=0.1", "generalized_jensen_shannon=0.8", "half_and_half", "chi2_mix_dual",
        "alpha=-0.5", "alpha=0", "alpha=0.3", "alpha=0.75", "alpha=1",
    }  # fmt: skip
    if name(case) in admissible:
        assert np.isfinite(
            preferences.f_dpo(two, two, two, two, beta=0.1, divergence=case.divergence)
        ).all()
    else:
        with refused(r"f'\(0\) = -∞, but that of " + name(case)):
            preferences.f_dpo(two, two, two, two, beta=0.1, divergence=case.divergence)


@pytest.mark.parametrize(
    "kind",
    [case.divergence for case in CASES if np.isneginf(case.divergence.derivative(-jnp.inf))]
    + ["chi_po"],
)
def test_the_guard_keeps_losses_and_gradients_finite_and_the_order(kind):
    """Log-ratios of whole sequences: hundreds of nats, in float32."""
    chosen = jnp.linspace(-500.0, 500.0, 101)
    other = jnp.zeros(101)

    def loss(chosen):
        if kind == "chi_po":
            return preferences.chi_po(chosen, other, other, other, beta=0.1)
        return preferences.f_dpo(chosen, other, other, other, beta=0.1, divergence=kind)

    value, gradient = loss(chosen), jax.grad(lambda x: loss(x).sum())(chosen)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()
    assert (np.diff(value) <= 1e-6 * abs(value[1:])).all()
    assert (gradient <= 0).all()


def test_within_the_guard_nothing_changes(x64):
    pairs = jnp.asarray(np.random.default_rng(0).normal(scale=2, size=(4, 20)))
    for f in (divergences.forward_kl(), divergences.jensen_shannon()):
        tight, wide = (
            preferences.f_dpo(*pairs, beta=0.1, divergence=f, max_log_ratio=limit)
            for limit in (15.0, 50.0)
        )
        np.testing.assert_array_equal(tight, wide)


def test_beyond_the_guard_it_is_the_tangent(x64):
    zero = jnp.zeros(1)
    f = divergences.forward_kl()

    def margin(log_u):
        loss = preferences.f_dpo(log_u, zero, zero, zero, beta=1.0, divergence=f, max_log_ratio=1.0)
        return -jnp.log(jnp.expm1(loss))

    at, slope = float(margin(jnp.array([-1.0]))[0]), float(jnp.exp(1.0))
    assert float(margin(jnp.array([-3.0]))[0]) == pytest.approx(at - 2 * slope, rel=1e-9)


def test_refusals():
    two = jnp.zeros(2)
    for loss in (preferences.dpo, preferences.ipo, preferences.exo_pair, preferences.chi_po):
        with refused("beta must be positive, got 0"):
            loss(two, two, two, two, beta=0.0)
    with refused("label_smoothing is between 0 and 1"):
        preferences.exo_pair(two, two, two, two, beta=1.0, label_smoothing=0.0)
    with refused("reward_beta must be positive"):
        preferences.exo(two, two, two, beta=1.0, reward_beta=0.0)
