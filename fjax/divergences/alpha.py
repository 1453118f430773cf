"""The α-divergences in one convention, and what other papers call theirs.

They are continuous through their limits.

Source: Amari 2009; Cichocki and Amari 2010; Kruszewski et al. 2026 (α-DPG) for the convention.
"""

import itertools
import math

import jax
import jax.numpy as jnp

from fjax._checks import is_concrete, one_number
from fjax._numerics import times_exp
from fjax.types import Array, Float

from .core import FDivergence, made_once, named

_TERMS = 18


@made_once
def alpha_divergence(alpha: float | Float[Array, ""]) -> FDivergence:
    """D_α(π‖p) = (E_p[(π/p)^α] - 1)/(α(α-1)): from mass covering (α ≤ 0) to mode seeking (α ≥ 1).

    f(t) = (t^α - 1 - α(t-1))/(α(α-1)), f'(t) = (t^(α-1) - 1)/(α-1), f'(∞) = 1/(1-α) if α < 1, else
    ∞; f''(1) = 1 for all.

    =====  ========================  =====  ===================
    α      is                        α      is
    =====  ========================  =====  ===================
    -1     ½ Neyman's χ²(p‖π)        1      KL(π‖p), reverse
    0      KL(p‖π), forward          2      ½ Pearson's χ²(π‖p)
    ½      2 × squared Hellinger
    =====  ========================  =====  ===================

    Args:
        alpha: any real number, 0 and 1 included. For other papers' α see `alpha_from_amari`,
            `alpha_from_f_dpo` and `alpha_from_cressie_read`. May be traced, to be annealed; no
            gradient.

    Raises:
        ValueError: if it is not finite.

    >>> round(float(alpha_divergence(0.5).slope_at_infinity), 6)
    2.0

    Source: Cichocki and Amari 2010, section 2.
    """
    one_number(alpha=alpha)
    if is_concrete(alpha) and not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}.")
    of_inverse = _generator(1 - alpha)
    return FDivergence(
        named("alpha", alpha),
        generator=_generator(alpha),
        derivative=lambda log_t: _power(log_t, alpha - 1),
        integrand=lambda log_t: of_inverse(-log_t),  # f(t)/t is the f of 1-α, at 1/t
        inverse_derivative=_inverse(alpha),
        conjugate=_conjugate(alpha),
        intercept=lambda log_t: -_power(log_t, alpha),
    )


def alpha_from_amari(alpha: float) -> float:
    """Amari's own index, symmetric about 0, where ±1 are the KLs: (1 - α)/2 here.

    >>> alpha_from_amari(-1.0), alpha_from_amari(0.0)  # KL(π‖p), twice the squared Hellinger
    (1.0, 0.5)

    Source: Amari 2009, equation 7.
    """
    return (1 - alpha) / 2


def alpha_from_f_dpo(alpha: float) -> float:
    """The α of f-DPO, f-PO and DPH-RL, where 0 is reverse and 1 forward KL: 1 - α here.

    >>> alpha_from_f_dpo(0.0)
    1.0

    Source: Wang et al. 2024 (f-DPO, arXiv 2309.16240), table 1.
    """
    return 1 - alpha


def alpha_from_cressie_read(power: float) -> float:
    """The λ of the power divergences, which are twice these: λ + 1 here.

    >>> alpha_from_cressie_read(1.0), alpha_from_cressie_read(-2.0)  # Pearson's χ², Neyman's χ²
    (2.0, -1.0)

    Source: Cressie and Read 1984.
    """
    return power + 1


def _power(s, c):
    """(e^{cs} - 1)/c, s at c = 0."""
    # Double `where` of a traced c: what is not taken must not send an infinite slope back.
    safe, at = (
        _choose(c == 0, lambda: 1.0, lambda: c),
        _choose(c == 0, lambda: jnp.zeros_like(s), lambda: s),
    )
    return _choose(c == 0, lambda: s, lambda: jnp.expm1(safe * at) / safe)


def _choose(condition, yes, no):
    """One of two by what α is, at once where that is known; a traced α takes both and selects."""
    if is_concrete(condition):
        return yes() if condition else no()
    return jnp.where(condition, yes(), no())


def _least(x, y):
    return _choose(x < y, lambda: x, lambda: y)


def _most(x, y):
    return _choose(x > y, lambda: x, lambda: y)


def _generator(alpha):
    """f(t), as it is below t = 1, and as t times the f of 1-α at 1/t above."""

    @jax.custom_jvp
    def generator(log_t):
        below, above = _split(log_t)
        above = jnp.exp(log_t) * _below_one(-above, 1 - alpha)
        return jnp.where(log_t < 0, _below_one(below, alpha), above)

    # t f'(t), where autodiff would subtract infinities.
    @generator.defjvp
    def _(primals, tangents):
        return generator(*primals), _slope(primals[0], alpha) * tangents[0]

    return generator


def _slope(s, alpha):
    """(e^{αs} - e^s)/(α-1), by halves, each the factor times a bounded difference."""
    negative, positive = _split(s)
    below = _power(negative, abs(1 - alpha))
    # 0 · inf at α = 0
    below = _choose(
        alpha == 0, lambda: below, lambda: times_exp(below, _least(alpha, 1.0) * negative)
    )
    above = _power(positive, -abs(1 - alpha)) * jnp.exp(_most(alpha, 1.0) * positive)
    return jnp.where(s < 0, below, above)


def _split(s):
    """Negative and other part; `minimum` and `maximum` would each pass on half a gradient at 0."""
    return jnp.where(s < 0, s, 0.0), jnp.where(s < 0, 0.0, s)


def _below_one(s, alpha):
    """f(e^s) for s ≤ 0, to full relative precision for every α."""
    # By then f has reached f(0) = 1/α in any precision; a constant, lest its slope of 0 meet an
    # infinity.
    lowest = _choose(alpha > 0, lambda: -80 / _least(alpha, 1.0), lambda: -jnp.inf)
    s = jnp.where(s < lowest, lowest, s)
    # (e^{αs} - 1)/α - (e^s - 1) would lose all digits at α = 1
    far = _choose(
        (alpha > 0.5) & (alpha < 1.5),
        lambda: (
            (jnp.exp(_least(alpha, 1.0) * s) * _power(s, abs(1 - alpha)) - jnp.expm1(s)) / alpha
        ),
        lambda: (_power(s, alpha) - jnp.expm1(s)) / (alpha - 1),
    )
    is_near = s > -1 / _most(_most(1.0, abs(alpha)), abs(1 - alpha))
    return jnp.where(is_near, _series(jnp.where(is_near, s, 0.0), alpha), far)


def _series(s, alpha):
    """Σ_k s^(k+2) (1 + α + … + α^k)/(k+2)!, which is f(e^s)."""
    total = jnp.zeros_like(s)
    powers = list(
        itertools.accumulate(range(1, _TERMS), lambda sum_of, _: 1 + alpha * sum_of, initial=1.0)
    )
    for k in reversed(range(_TERMS)):
        total = total * s + powers[k] / float(math.factorial(k + 2))
    return s**2 * total


def _inverse(alpha):
    return _within(alpha, lambda v: jnp.exp(_log_inverse(v, alpha)), lambda: 0.0)


def _conjugate(alpha):
    return _within(alpha, lambda v: _power(_log_inverse(v, alpha), alpha), lambda: -1 / alpha)


def _within(alpha, function, lowest):
    """The function where v is a slope of f, and what lies beyond elsewhere.

    v is a slope below f'(∞) if α < 1, with inf from there on; above f'(0) if α > 1, with the value
    there below it.
    """

    def bounded(v):
        bound = _choose(alpha == 1, lambda: jnp.inf, lambda: 1 / (1 - alpha))
        inside = _choose(alpha > 1, lambda: v > bound, lambda: v < bound)
        # 0 is inside for every α, and its slope is finite there.
        outside = _choose(alpha > 1, lowest, lambda: jnp.inf)
        return jnp.where(inside, function(jnp.where(inside, v, 0.0)), outside)

    return bounded


def _log_inverse(v, alpha):
    safe, at = (
        _choose(alpha == 1, lambda: 1.0, lambda: alpha - 1),
        _choose(alpha == 1, lambda: jnp.zeros_like(v), lambda: v),
    )
    return _choose(alpha == 1, lambda: v, lambda: jnp.log1p(safe * at) / safe)
