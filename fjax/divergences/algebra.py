"""New divergences out of others, or out of a plain convex function."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import is_concrete, made, one_number
from fjax._numerics import times_exp
from fjax.types import Array, Float

from .core import FDivergence, made_once

_FAR = 40.0  # where squares of t still are float32


@made_once
def dual(divergence: FDivergence) -> FDivergence:
    """The divergence with its arguments exchanged: D_{f°}(π‖p) = D_f(p‖π), f°(t) = t f(1/t).

    f°'(t) = f(1/t) - f'(1/t)/t. Total variation, Jensen–Shannon, Jeffreys, Hellinger and triangular
    discrimination are their own duals; forward and reverse KL, Pearson's and Neyman's χ², and α and
    1-α are each other's.

    Args:
        divergence: which f. Without an ``intercept`` the dual is exact, but loses digits far above
            t = 1.

    >>> from fjax.divergences import forward_kl
    >>> dual(forward_kl()).derivative(jnp.array([0.0, 1.0])).tolist()  # reverse KL's
    [1.0, 2.0]

    Source: Csiszár 1967; Liese and Vajda 2006, section II.
    """
    made(divergence)
    intercept = _intercept(divergence)
    return FDivergence(
        f"{divergence.name}_dual",
        generator=lambda log_t: divergence.integrand(-log_t),
        derivative=lambda log_t: intercept(-log_t),
        integrand=lambda log_t: divergence.generator(-log_t),
        intercept=lambda log_t: divergence.derivative(-log_t),
    )


@made_once
def mixture(
    divergences: Sequence[FDivergence],
    weights: Sequence[float | Float[Array, ""]],
    *,
    name: str = "mixture",
) -> FDivergence:
    """Σ w_i f_i, whose divergence and gradient are Σ w_i D_{f_i} and its.

    Args:
        divergences: the f_i.
        weights: w_i ≥ 0, at least one of them positive; they need not sum to one, so a single one
            scales. May be traced, to be annealed; no gradient.
        name: what tables and plots call it.

    Raises:
        ValueError: if there is not one weight a divergence, or one is negative, or all are zero.

    >>> from fjax.divergences import forward_kl, reverse_kl
    >>> jeffreys = mixture([forward_kl(), reverse_kl()], [1.0, 1.0])
    >>> float(jeffreys.derivative(jnp.array(0.0)))
    0.0

    Source: linearity of D_f in f.
    """
    if len(divergences) != len(weights):
        raise ValueError(
            f"One weight a divergence, got {len(divergences)} divergences and {len(weights)} "
            f"weights."
        )
    one_number(**{f"weights[{i}]": w for i, w in enumerate(weights)})
    for divergence in divergences:
        made(divergence)
    known = [w for w in weights if is_concrete(w)]
    if not all(w >= 0 for w in known) or (len(known) == len(weights) and not any(known)):
        raise ValueError(
            f"The weights of a mixture are at least 0, and not all 0; got {list(weights)}."
        )
    # What has weight 0 is left out: 0 · inf would be NaN.
    parts = [
        (w, f) for w, f in zip(weights, divergences, strict=True) if not is_concrete(w) or w > 0
    ]

    def combine(part):
        return _sum([(w, part(divergence)) for w, divergence in parts])

    return FDivergence(
        name,
        combine(lambda divergence: divergence.generator),
        combine(lambda divergence: divergence.derivative),
        combine(lambda divergence: divergence.integrand),
        intercept=combine(_intercept),
    )


def _sum(parts):
    def plain(log_t):
        return sum(times(w, function, log_t) for w, function in parts)

    def times(w, function, log_t):
        if is_concrete(w):
            return w * function(log_t)
        # Double `where`: a part of weight 0 may be infinite.
        return jnp.where(w > 0, w.astype(log_t.dtype) * function(jnp.where(w > 0, log_t, 0.0)), 0.0)

    @jax.custom_jvp
    def total(log_t):
        value = plain(log_t)
        # At ±inf one part may be inf and another, of a lower order, -inf: the largest number
        # decides which wins.
        last = jnp.clip(log_t, jnp.finfo(log_t.dtype).min, jnp.finfo(log_t.dtype).max)
        return jnp.where(jnp.isnan(value), plain(last), value)

    @total.defjvp
    def _(primals, tangents):
        return total(*primals), jax.jvp(plain, primals, tangents)[1]

    return total


def _intercept(divergence):
    if divergence.intercept is not None:
        return divergence.intercept
    return lambda log_t: (
        divergence.generator(log_t) - times_exp(divergence.derivative(log_t), log_t)
    )


@made_once
def from_generator(
    f: Callable[[Float[Array, ""]], Float[Array, ""]],
    *,
    name: str = "custom",
    slope_at_infinity: float | None = None,
) -> FDivergence:
    """A divergence from a plain convex function of t, its derivative by autodiff.

    f is checked here, once, at numbers t from e^-20 to e^20: that it is finite, that f(1) = 0, and
    that it is convex. It is as stable as it is written: near t = 1 a difference of squares loses
    digits, and beyond log t = 40 f' stays at f'(∞), or where that is infinite at f'(e^40). For
    everyday use in float32 write an `FDivergence` in terms of log_t.

    Args:
        f: t -> f(t), a scalar function that JAX can differentiate.
        name: what tables and plots call it.
        slope_at_infinity: f'(∞). By default it is read off f' at t = 10^150 and 10^300, where it
            has either come to rest or is taken to be infinite; a slope that comes to rest more
            slowly has to be given.

    Raises:
        ValueError: if f fails a check, with the t at which it does.

    >>> squares = from_generator(lambda t: (t - 1) ** 2)
    >>> float(squares.derivative(jnp.log(3.0)))
    4.0

    Source: Csiszár 1967 for the conditions.
    """
    _check(f)
    limit = _slope_at_infinity(f) if slope_at_infinity is None else slope_at_infinity
    slope = jax.grad(f)
    f_of, slope_of = _stretched(f), _stretched(slope)

    def derivative(log_t):
        far = jnp.where(jnp.isposinf(log_t), limit, slope_of(log_t)) if np.isinf(limit) else limit
        return jnp.where(log_t > _FAR, far, slope_of(log_t))

    def integrand(log_t):
        near = f_of(log_t) * jnp.exp(-jnp.minimum(log_t, _FAR))
        return jnp.where(log_t > _FAR, derivative(log_t), near)

    def generator(log_t):
        far = f_of(log_t) if limit == 0 else times_exp(derivative(log_t), log_t)
        return jnp.where(log_t > _FAR, far, f_of(log_t))

    def t_slope(log_t):
        # Down to the smallest t that is a normal number: below, t f'(t) has reached its limit.
        log_t = jnp.maximum(log_t, jnp.log(jnp.finfo(log_t.dtype).tiny) + 2)
        return times_exp(derivative(log_t), jnp.minimum(log_t, 2 * _FAR))

    # Slopes by what they are, for autodiff of a function at e^40 is left to the function.
    return FDivergence(
        name,
        generator=_with_slope(generator, t_slope),
        derivative=derivative,
        integrand=_with_slope(integrand, lambda log_t: derivative(log_t) - integrand(log_t)),
    )


def _stretched(function):
    """log_t -> function(t), at t = e^±40 where it cannot be had further out."""

    def stretched(log_t):
        def elementwise(log_t):
            return (
                jax.vmap(function)(jnp.exp(log_t).ravel()).reshape(log_t.shape).astype(log_t.dtype)
            )

        inside = jnp.clip(log_t, -_FAR, _FAR)
        there = elementwise(jnp.minimum(log_t, _FAR))
        return jnp.where(jnp.isnan(there), elementwise(inside), there)

    return stretched


def _with_slope(function, slope):
    @jax.custom_jvp
    def sloped(log_t):
        return function(log_t)

    @sloped.defjvp
    def _(primals, tangents):
        change = slope(*primals)
        # inf - inf, at ±inf only
        return sloped(*primals), jnp.where(jnp.isnan(change), 0.0, change) * tangents[0]

    return sloped


def _check(f):
    with jax.enable_x64(True):
        log_t = jnp.linspace(-20.0, 20.0, 401)
        t = jnp.exp(log_t)
        value = np.asarray(jax.vmap(f)(t))
        if value.shape != t.shape:
            raise ValueError(
                f"f maps one number to one number, but gave shape {value.shape[1:]} for a scalar."
            )
        slope = np.asarray(jax.vmap(jax.grad(f))(t))
        at_one = float(f(jnp.asarray(1.0)))
    bad = ~(np.isfinite(value) & np.isfinite(slope))
    if bad.any():
        raise ValueError(
            f"f or its derivative is not finite at t = {t[bad.argmax()]:.3g}: f = "
            f"{value[bad.argmax()]}."
        )
    if abs(at_one) > 1e-9:
        raise ValueError(f"f(1) must be 0, or D_f(p‖p) is not; it is {at_one:.6g}. Subtract that.")
    fall = np.diff(slope) < -1e-9 * (1 + abs(slope[1:]))
    if fall.any():
        i = int(fall.argmax())
        raise ValueError(
            f"f is not convex: f' falls from {slope[i]:.6g} at t = {t[i]:.3g} to "
            f"{slope[i + 1]:.6g} at t = {t[i + 1]:.3g}."
        )


def _slope_at_infinity(f):
    with jax.enable_x64(True):
        near, far = (float(jax.grad(f)(jnp.asarray(t))) for t in (1e150, 1e300))
    if abs(far - near) <= 1e-6 * max(abs(far), 1e-6):  # at rest
        return far if abs(far) > 1e-12 else 0.0
    return float("inf")
