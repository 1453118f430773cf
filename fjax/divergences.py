"""f-divergences ``D_f(π‖p) = E_p[f(π/p)]``, each written as stable functions of ``log_t = log π - log p``.

f is convex with f(1) = 0. Where p = 0 and π > 0, log_t = +inf, and the functions return their limits there:
f'(∞) from ``derivative`` and ``integrand``. So a hard constraint is an ordinary input: forward KL, total
variation and Jensen–Shannon are finite on it, reverse KL is not, and says so with inf.

A divergence of your own is one more `FDivergence`; nothing has to be registered.

Source: Go et al. 2023 (f-DPG, arXiv 2302.08215), section 3 and table 1; Csiszár 1967 for the family.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fjax._numerics import times_exp
from fjax._typing import Array, Bool, Float

_LOG_2 = 0.6931471805599453

Elementwise = Callable[[Float[Array, "*n"]], Float[Array, "*n"]]
"""Array in, array of the same shape out, each entry by itself."""


class FDivergence(NamedTuple):
    """One f, as elementwise functions.

    Attributes:
        name: what tables and plots call it.
        generator: log_t -> f(t).
        derivative: log_t -> f'(t), and f'(∞) at +inf. The policy gradient is E_π[f'(t) ∇log π].
        integrand: log_t -> f(t)/t in closed form, and f'(∞) at +inf: D_f(π‖p) = E_π[f(t)/t].
        inverse_derivative: v -> (f')^{-1}(v), inf from f'(∞) on; None where f' is not invertible.
        conjugate: v -> f*(v) = sup_t (t v - f(t)), inf above f'(∞); None where there is no closed form.
    """

    name: str
    generator: Elementwise
    derivative: Elementwise
    integrand: Elementwise
    inverse_derivative: Elementwise | None = None
    conjugate: Elementwise | None = None

    @property
    def value_at_zero(self) -> Float[Array, ""]:
        """f(0): what a unit of mass costs that p has and π has not."""
        return self.generator(jnp.asarray(-jnp.inf))

    @property
    def slope_at_infinity(self) -> Float[Array, ""]:
        """f'(∞): what a unit of mass costs that π has and p has not. Hard constraints need it finite."""
        return self.derivative(jnp.asarray(jnp.inf))


def forward_kl() -> FDivergence:
    """KL(p‖π) = E_p[log p - log π], the divergence of DPG and GDC: mass covering.

    f(t) = -log t, f'(t) = -1/t, f'(∞) = 0: samples outside the support of p are not pushed down, those inside
    are pulled up by p/π, which has no bound. Use a baseline.

    >>> forward_kl().derivative(jnp.array([0.0, -1.0])).tolist()
    [-1.0, -2.718282]

    Source: Go et al. 2023, table 1; Parshakova et al. 2019 (DPG).
    """
    return FDivergence(
        "forward_kl",
        generator=lambda log_t: -log_t,
        derivative=lambda log_t: -jnp.exp(-log_t),
        integrand=lambda log_t: times_exp(-log_t, -log_t),
        inverse_derivative=_inf_from(0.0, lambda v: -1 / v),
        conjugate=_inf_from(0.0, lambda v: -1 - jnp.log(-v)),
    )


def reverse_kl() -> FDivergence:
    """KL(π‖p) = E_π[log π - log p], the divergence of RLHF with a KL penalty: mode seeking.

    f(t) = t log t, f'(t) = log t + 1, f'(∞) = ∞: infinite for every full-support policy on a hard constraint,
    which therefore has to be smoothed, or f' clipped.

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
    )


def total_variation() -> FDivergence:
    """TV(π, p) = ½ Σ|π - p|, between 0 and 1.

    f(t) = ½|t - 1|, f'(t) = ½ sign(t - 1), f'(∞) = ½. The kink at t = 1 has every subgradient in [-½, ½]; 0
    is taken.

    >>> total_variation().derivative(jnp.array([-1.0, 0.0, jnp.inf])).tolist()
    [-0.5, 0.0, 0.5]

    Source: Go et al. 2023, table 1.
    """
    return FDivergence(
        "total_variation",
        # x · sign(x) and not |x|, whose gradient at the kink is 1 in JAX: all three agree on 0 there.
        generator=lambda log_t: 0.5 * jnp.expm1(log_t) * jnp.sign(log_t),
        derivative=lambda log_t: 0.5 * jnp.sign(log_t),
        integrand=lambda log_t: -0.5 * jnp.expm1(-log_t) * jnp.sign(log_t),
        conjugate=lambda v: jnp.where(v > 0.5, jnp.inf, jnp.maximum(v, -0.5)),
    )


def jensen_shannon() -> FDivergence:
    """JS(π, p) = ½ KL(π‖m) + ½ KL(p‖m) with m = ½(π + p), between 0 and log 2.

    f(t) = ½[t log t - (t + 1) log ((t + 1)/2)], f'(t) = ½ log (2t/(t + 1)), f'(∞) = ½ log 2. This is the
    halved form; f-DPG trains with twice of it, so a learning rate for plain SGD doubles when it is taken over
    from there.

    >>> round(float(jensen_shannon().slope_at_infinity), 6)
    0.346574

    Source: Go et al. 2023, table 1 (there without the factor ½); Lin 1991.
    """
    return FDivergence(
        "jensen_shannon",
        # f(t) = ½(1 + t) (log 2 - H(σ(s))): what a fair coin between π and p tells about itself through one
        # sample.
        generator=lambda log_t: 0.5 * (1 + jnp.exp(log_t)) * _coin_information(log_t),
        derivative=lambda log_t: 0.5 * (_LOG_2 - jax.nn.softplus(-log_t)),
        integrand=lambda log_t: 0.5 * (1 + jnp.exp(-log_t)) * _coin_information(log_t),
        inverse_derivative=_inf_from(_LOG_2 / 2, lambda v: jnp.exp(2 * v) / (2 - jnp.exp(2 * v))),
        conjugate=_inf_from(_LOG_2 / 2, lambda v: -0.5 * jnp.log1p(-jnp.expm1(2 * v))),
    )


def _inf_from(bound, function):
    """The function below ``bound``, f'(∞), and inf from there on, with gradient 0 and not NaN."""

    def bounded(v):
        below = v < bound
        return jnp.where(below, function(jnp.where(below, v, bound - 1)), jnp.inf)

    return bounded


def _coin_information(log_odds):
    """``log 2 - H(σ(log_odds))``: how far from fair a coin is, in nats; between 0 and log 2."""
    size = jnp.abs(log_odds)
    # Beyond 50 it is log 2 in any precision, and a selected constant keeps inf · 0 out of the generator's
    # gradient.
    size = jnp.where(size > 50, 50.0, size)
    small = jnp.where(size < 1, size, 0.0)
    # Near 0 the value is log_odds²/8, which log 2 - H would lose to cancellation; ½ s tanh(s/2) - log
    # cosh(s/2) does not.
    near = 0.5 * (small * jnp.tanh(small / 2) - jnp.log1p(jnp.sinh(small / 2) ** 2))
    rare = jnp.exp(-size)
    far = _LOG_2 - jnp.log1p(rare) - size * rare / (1 + rare)
    return jnp.where(size < 1, near, far)


def exact_divergence(
    log_pi: Float[Array, "S"],
    log_p: Float[Array, "S"],
    *,
    divergence: FDivergence,
    where: Bool[Array, "S"] | None = None,
) -> Float[Array, ""]:
    """D_f(π‖p) as a sum over a whole space.

    D_f(π‖p) = Σ_x p(x) f(π(x)/p(x)), the term being π(x) f'(∞) where p(x) = 0. `jax.grad` of it is the exact
    gradient that the surrogates estimate.

    Args:
        log_pi: normalised log-probabilities of every member of the space, in nats.
        log_p: the same of the target; -inf is allowed.
        divergence: which f.
        where: members that exist; the others are padding.

    Returns:
        The divergence in nats (total variation: a number between 0 and 1).

    Raises:
        ValueError: if the two list different spaces.

    >>> p = jnp.log(jnp.array([0.5, 0.5]))
    >>> round(float(exact_divergence(jnp.log(jnp.array([0.9, 0.1])), p, divergence=total_variation())), 6)
    0.4

    Source: Go et al. 2023, equation 1.
    """
    if log_pi.shape != log_p.shape:
        raise ValueError(f"log_pi and log_p list the same space, got {log_pi.shape} and {log_p.shape}.")
    nothing = jnp.isneginf(log_pi) & jnp.isneginf(log_p)
    counted = ~nothing if where is None else where & ~nothing
    log_pi, log_p = jnp.where(counted, log_pi, 0.0), jnp.where(counted, log_p, 0.0)
    log_t = log_pi - log_p
    less = log_t < 0
    # Below t = 1 as p f(t), above as π f(t)/t: neither product is ever ∞ · 0. (Not `minimum` and `maximum`:
    # at t = 1 they would pass on half of the gradient.)
    near = times_exp(divergence.generator(jnp.where(less, log_t, 0.0)), log_p)
    far = times_exp(divergence.integrand(jnp.where(less, 0.0, log_t)), log_pi)
    return jnp.sum(jnp.where(less, near, far), where=counted)
