"""The named divergences.

Every function is one line of the table in Go et al. 2023, or of its neighbours'.
"""

import math

import jax
import jax.numpy as jnp

from fjax._checks import is_concrete, one_number
from fjax._numerics import times_exp, wright_omega
from fjax.types import Array, Float

from .core import Elementwise, FDivergence, made_once, named


@made_once
def forward_kl() -> FDivergence:
    """KL(p‖π) = E_p[log p - log π], the divergence of DPG and GDC: mass covering.

    f(t) = -log t, f'(t) = -1/t, f'(∞) = 0: samples outside the support of p are not pushed down,
    those inside are pulled up by p/π, which has no bound. Use a baseline.

    >>> forward_kl().derivative(jnp.array([0.0, -1.0])).tolist()
    [-1.0, -2.718282]

    Source: Go et al. 2023, table 1; Parshakova et al. 2019 (DPG).
    """
    return FDivergence(
        "forward_kl",
        generator=lambda log_t: -log_t,
        derivative=lambda log_t: -jnp.exp(-log_t),
        integrand=lambda log_t: times_exp(-log_t, -log_t),
        inverse_derivative=inf_from(0.0, lambda v: -1 / v),
        conjugate=inf_from(0.0, lambda v: -1 - jnp.log(-v)),
        intercept=lambda log_t: 1 - log_t,
    )


@made_once
def reverse_kl() -> FDivergence:
    """KL(π‖p) = E_π[log π - log p], the divergence of RLHF with a KL penalty: mode seeking.

    f(t) = t log t, f'(t) = log t + 1, f'(∞) = ∞: infinite for every full-support policy on a hard
    constraint, which therefore has to be smoothed, or f' clipped.

    >>> reverse_kl().derivative(jnp.array([0.0, jnp.inf])).tolist()
    [1.0, inf]

    Source: Go et al. 2023, table 1 and section 3.2; Korbak et al. 2022 (arXiv 2205.11275).
    """
    return FDivergence(
        "reverse_kl",
        generator=lambda log_t: times_exp(log_t, log_t),
        derivative=lambda log_t: log_t + 1,
        integrand=lambda log_t: log_t,
        inverse_derivative=lambda v: jnp.exp(v - 1),
        conjugate=lambda v: jnp.exp(v - 1),
        intercept=lambda log_t: -jnp.exp(log_t),
    )


@made_once
def total_variation() -> FDivergence:
    """TV(π, p) = ½ Σ|π - p|, between 0 and 1.

    f(t) = ½|t - 1|, f'(t) = ½ sign(t - 1), f'(∞) = ½. The kink at t = 1 has every subgradient in
    [-½, ½]; 0 is taken.

    >>> total_variation().derivative(jnp.array([-1.0, 0.0, jnp.inf])).tolist()
    [-0.5, 0.0, 0.5]

    Source: Go et al. 2023, table 1.
    """
    return FDivergence(
        "total_variation",
        # x · sign(x) and not |x|, whose gradient at the kink is 1 in JAX: all three agree on 0
        # there.
        generator=lambda log_t: 0.5 * jnp.expm1(log_t) * jnp.sign(log_t),
        derivative=lambda log_t: 0.5 * jnp.sign(log_t),
        integrand=lambda log_t: -0.5 * jnp.expm1(-log_t) * jnp.sign(log_t),
        conjugate=lambda v: jnp.where(v > 0.5, jnp.inf, jnp.maximum(v, -0.5)),
        intercept=lambda log_t: -0.5 * jnp.sign(log_t),
    )


@made_once
def jensen_shannon() -> FDivergence:
    """JS(π, p) = ½ KL(π‖m) + ½ KL(p‖m) with m = ½(π + p), between 0 and log 2.

    f(t) = ½[t log t - (t + 1) log ((t + 1)/2)], f'(t) = ½ log (2t/(t + 1)), f'(∞) = ½ log 2. This
    is the halved form; Go et al. train with twice this, so a learning rate for plain SGD doubles
    when it is taken over from there.

    >>> round(float(jensen_shannon().slope_at_infinity), 6)
    0.346574

    Source: Go et al. 2023, table 1 (there without the factor ½); Lin 1991.
    """
    return generalized_jensen_shannon(0.5)._replace(name="jensen_shannon")


@made_once
def generalized_jensen_shannon(weight: float | Float[Array, ""]) -> FDivergence:
    """λ KL(π‖m) + (1-λ) KL(p‖m) with m = λπ + (1-λ)p: the skewed Jensen–Shannon divergence.

    f(t) = λ t log t - (λt + 1-λ) log(λt + 1-λ), f'(t) = λ log(t/(λt + 1-λ)), f'(∞) = -λ log λ.
    Between 0 and the entropy of a coin of bias λ. Divided by λ it tends to KL(π‖p) as λ → 0,
    divided by 1-λ to KL(p‖π) as λ → 1.

    Args:
        weight: λ, between 0 and 1, both excluded; ½ is `jensen_shannon`. May be traced, to be
            annealed; no gradient.

    Raises:
        ValueError: if the weight is out of range.

    >>> round(float(generalized_jensen_shannon(0.25).slope_at_infinity), 6)
    0.346574

    Source: Lin 1991, section 4; Nielsen 2020 for the skewed form.
    """
    one_number(weight=weight)
    if is_concrete(weight) and not 0 < weight < 1:
        raise ValueError(
            f"The weight of a Jensen–Shannon divergence is between 0 and 1, both excluded; got "
            f"{weight}."
        )
    log_weight, log_rest = _logs(weight)
    slope_at_infinity = -weight * log_weight
    return FDivergence(
        named("generalized_jensen_shannon", weight),
        # f(t) = m KL(Bernoulli(λt/m) ‖ Bernoulli(λ)): what one sample of m tells about which of the
        # two it came from.
        generator=lambda log_t: _times(1 - weight, weight, log_t, _coin_information(log_t, weight)),
        derivative=lambda log_t: -weight * jnp.logaddexp(log_weight, log_rest - log_t),
        integrand=lambda log_t: _times(
            weight, 1 - weight, -log_t, _coin_information(log_t, weight)
        ),
        inverse_derivative=inf_from(
            slope_at_infinity,
            lambda v: (1 - weight) * jnp.exp(v / weight) / (1 - weight * jnp.exp(v / weight)),
        ),
        conjugate=inf_from(
            slope_at_infinity,
            lambda v: (weight - 1) * jnp.log1p(-weight * jnp.expm1(v / weight) / (1 - weight)),
        ),
        intercept=lambda log_t: (weight - 1) * jnp.logaddexp(log_rest, log_weight + log_t),
    )


@made_once
def jeffreys() -> FDivergence:
    """KL(π‖p) + KL(p‖π), symmetric; infinite wherever one of the two has no mass.

    f(t) = (t - 1) log t, f'(t) = log t + 1 - 1/t, f'(∞) = ∞.

    >>> float(jeffreys().derivative(jnp.array(0.0)))
    0.0

    Source: Jeffreys 1946.
    """

    def generator(log_t):
        # Below e^-100 the first factor is -1 in any precision; its gradient there would be 0 · inf.
        return jnp.expm1(jnp.where(log_t < -100, -100.0, log_t)) * log_t

    def derivative(log_t):
        return log_t - jnp.expm1(-log_t)

    return FDivergence(
        "jeffreys",
        generator,
        derivative,
        integrand=lambda log_t: generator(-log_t),
        inverse_derivative=lambda v: 1 / wright_omega(1 - v),
        conjugate=lambda v: wright_omega(1 - v) + 1 / wright_omega(1 - v) + v - 2,
        intercept=lambda log_t: derivative(-log_t),
    )


@made_once
def pearson_chi2() -> FDivergence:
    """χ²(π‖p) = Σ (π - p)²/p, Pearson's.

    f(t) = (t - 1)², f'(t) = 2(t - 1), f'(∞) = ∞.

    >>> float(pearson_chi2().generator(jnp.log(3.0)))
    4.0

    Source: Pearson 1900; Nielsen and Nock 2014.
    """
    return FDivergence(
        "pearson_chi2",
        generator=lambda log_t: jnp.expm1(log_t) ** 2,
        derivative=lambda log_t: 2 * jnp.expm1(log_t),
        integrand=lambda log_t: 4 * jnp.sinh(log_t / 2) ** 2,
        inverse_derivative=lambda v: jnp.maximum(0.0, 1 + v / 2),
        conjugate=lambda v: jnp.where(v < -2, -1.0, v + v**2 / 4),
        intercept=lambda log_t: -jnp.expm1(2 * log_t),
    )


@made_once
def neyman_chi2() -> FDivergence:
    """χ²(p‖π) = Σ (π - p)²/π, Neyman's.

    f(t) = (t - 1)²/t, f'(t) = 1 - 1/t², f'(∞) = 1.

    >>> float(neyman_chi2().slope_at_infinity)
    1.0

    Source: Neyman 1949; Nielsen and Nock 2014.
    """
    return FDivergence(
        "neyman_chi2",
        generator=lambda log_t: 4 * jnp.sinh(log_t / 2) ** 2,
        derivative=lambda log_t: -jnp.expm1(-2 * log_t),
        integrand=lambda log_t: jnp.expm1(-log_t) ** 2,
        inverse_derivative=inf_from(1.0, lambda v: (1 - v) ** -0.5),
        conjugate=_up_to(1.0, lambda v: 2 * v / (1 + jnp.sqrt(1 - v))),
        intercept=lambda log_t: 2 * jnp.expm1(-log_t),
    )


@made_once
def squared_hellinger() -> FDivergence:
    """H²(π, p) = Σ (√π - √p)², between 0 and 2.

    f(t) = (√t - 1)², f'(t) = 1 - 1/√t, f'(∞) = 1. Half of `alpha_divergence` at ½.

    >>> round(float(squared_hellinger().generator(jnp.log(4.0))), 6)
    1.0

    Source: Hellinger 1909; Go et al. 2023, appendix.
    """
    return FDivergence(
        "squared_hellinger",
        generator=lambda log_t: jnp.expm1(log_t / 2) ** 2,
        derivative=lambda log_t: -jnp.expm1(-log_t / 2),
        integrand=lambda log_t: jnp.expm1(-log_t / 2) ** 2,
        inverse_derivative=inf_from(1.0, lambda v: (1 - v) ** -2.0),
        conjugate=inf_from(1.0, lambda v: v / (1 - v)),
        intercept=lambda log_t: -jnp.expm1(log_t / 2),
    )


@made_once
def triangular_discrimination() -> FDivergence:
    """Σ (π - p)²/(π + p), between 0 and 2; twice the Le Cam divergence.

    f(t) = (t - 1)²/(t + 1), f'(t) = 1 - 4/(t + 1)², f'(∞) = 1.

    >>> float(triangular_discrimination().generator(jnp.log(3.0)))
    1.0

    Source: Topsøe 2000.
    """

    def derivative(log_t):
        half = jnp.tanh(_up_to_50(log_t) / 2)  # 1 - 4σ(-s)² without its cancellation near t = 1
        return half * (1 + jax.nn.sigmoid(-_up_to_50(log_t)) * 2)

    return FDivergence(
        "triangular_discrimination",
        generator=lambda log_t: jnp.expm1(log_t) * jnp.tanh(_up_to_50(log_t) / 2),
        derivative=derivative,
        integrand=lambda log_t: -jnp.expm1(-log_t) * jnp.tanh(_up_to_50(log_t) / 2),
        inverse_derivative=inf_from(1.0, lambda v: jnp.where(v < -3, 0.0, 2 / jnp.sqrt(1 - v) - 1)),
        conjugate=_up_to(1.0, lambda v: jnp.where(v < -3, -1.0, 4 - v - 4 * jnp.sqrt(1 - v))),
        intercept=lambda log_t: derivative(-log_t),
    )


@made_once
def chi2_mix() -> FDivergence:
    """½ χ²(π‖p) + KL(π‖p), the regulariser of χPO.

    f(t) = ½(t - 1)² + t log t, f'(t) = t + log t, f'(∞) = ∞. f' goes to -∞ at 0, as that of reverse
    KL, and grows like t, which keeps a policy from running away.

    >>> float(chi2_mix().derivative(jnp.array(0.0)))
    1.0

    Source: Huang et al. 2024 (χPO, arXiv 2407.13399), section 3.
    """
    return FDivergence(
        "chi2_mix",
        generator=lambda log_t: 0.5 * jnp.expm1(log_t) ** 2 + times_exp(log_t, log_t),
        derivative=lambda log_t: jnp.exp(log_t) + log_t,
        # The maximum keeps the -inf of log t from meeting the +inf of χ², which is the greater.
        integrand=lambda log_t: (
            2 * jnp.sinh(log_t / 2) ** 2 + jnp.maximum(log_t, jnp.finfo(log_t.dtype).min)
        ),
        inverse_derivative=wright_omega,
        conjugate=lambda v: 0.5 * wright_omega(v) ** 2 + wright_omega(v) - 0.5,
        intercept=lambda log_t: 0.5 - jnp.exp(log_t) - 0.5 * jnp.exp(2 * log_t),
    )


def inf_from(bound: float | Float[Array, ""], function: Elementwise) -> Elementwise:
    """The function below ``bound``, f'(∞), and inf from there on, with gradient 0 and not NaN."""

    def bounded(v):
        below = v < bound
        return jnp.where(below, function(jnp.where(below, v, bound - 1)), jnp.inf)

    return bounded


def _up_to(bound: float, function: Elementwise) -> Elementwise:
    """The function up to ``bound``, where it is finite still, and inf above."""

    def bounded(v):
        # At the bound itself √(1 - v) has no slope; the value is a constant there, to the gradient.
        inside = jnp.where(
            v < bound,
            function(jnp.where(v < bound, v, bound - 1)),
            function(jnp.full_like(v, bound)),
        )
        return jnp.where(v > bound, jnp.inf, inside)

    return bounded


def _up_to_50(log_t):
    """For factors that have reached their limit by then, in any precision.

    Their gradient at ±inf is 0, not inf · 0.
    """
    return jnp.where(jnp.abs(log_t) > 50, jnp.sign(log_t) * 50.0, log_t)


def _times(constant, factor, s, x):
    """(constant + factor e^s) x, overflowing only where the product does."""
    half = jnp.exp(s / 2)
    return constant * x + factor * x * half * half


def _logs(weight):
    """Log λ and log (1-λ); of a known λ in double precision."""
    if is_concrete(weight):
        return math.log(weight), math.log1p(-weight)
    return jnp.log(weight), jnp.log1p(-weight)


def _coin_information(log_t, weight):
    """KL(Bernoulli(σ) ‖ Bernoulli(λ)) with σ = λt/(λt + 1-λ), in nats."""
    log_weight, log_rest = _logs(weight)
    log_odds = log_weight - log_rest
    # Beyond, it is -log λ or -log(1-λ) in any precision, and a selected constant keeps inf · 0 out
    # of gradients.
    last = 50.0 + abs(log_odds)
    log_t = jnp.where(jnp.abs(log_t) > last, jnp.sign(log_t) * last, log_t)
    small = jnp.where(jnp.abs(log_t) < 0.5, log_t, 0.0)
    # Near t = 1 the value is of second order, and the two logarithms below of first order with
    # opposite signs.
    change = jnp.expm1(small) / (1 + weight * jnp.expm1(small))
    more, less = _excess(jnp.stack([(1 - weight) * change, -weight * change]))
    near = weight * more + (1 - weight) * less
    log_sigma, log_not = jax.nn.log_sigmoid(log_t + log_odds), jax.nn.log_sigmoid(-log_t - log_odds)
    sigma = jax.nn.sigmoid(log_t + log_odds)
    far = sigma * (log_sigma - log_weight) + jax.nn.sigmoid(-log_t - log_odds) * (
        log_not - log_rest
    )
    return jnp.where(jnp.abs(log_t) < 0.5, near, far)


@jax.custom_jvp
def _excess(x):
    """(1 + x) log(1 + x) - x for |x| < 0.7 to full relative precision, by the series of artanh."""
    y = x / (2 + x)
    square, series = y * y, 1 / 29
    for n in range(27, 1, -2):
        series = series * square + 1 / n
    tail = series * square * y  # artanh(y) - y
    return 2 * (tail + y * (y + tail)) / (1 - y)


@_excess.defjvp
def _excess_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _excess(x), jnp.log1p(x) * dx  # the series of the slope would be longer still
