"""What an f-divergence is to fjax, and its exact value on a listed space."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import as_mask, float_dtype, is_concrete, made, one_axis
from fjax._numerics import continued, times_exp
from fjax.types import Array, Bool, Float, Int

Options = ParamSpec("Options")
Elementwise = Callable[[Float[Array, "*n"]], Float[Array, "*n"]]
"""Array in, array of the same shape out, each entry by itself."""


class FDivergence(NamedTuple):
    """One f, as elementwise functions.

    Attributes:
        name: what tables and plots call it; `by_name` finds those of the library by it.
        generator: log_t -> f(t).
        derivative: log_t -> f'(t), and f'(∞) at +inf. The policy gradient is E_π[f'(t) ∇log π].
        integrand: log_t -> f(t)/t in closed form, and f'(∞) at +inf: D_f(π‖p) = E_π[f(t)/t].
        inverse_derivative: v -> (f')^{-1}(v), inf from f'(∞) on; None where f' is not invertible.
        conjugate: v -> f*(v) = sup_t (t v - f(t)), inf above f'(∞); None where there is no closed
            form.
        intercept: log_t -> f(t) - t f'(t) = -f*(f'(t)), where the tangent at t meets t = 0; `dual`
            needs it to be stable, and does without where it is None.
    """

    name: str
    generator: Elementwise
    derivative: Elementwise
    integrand: Elementwise
    inverse_derivative: Elementwise | None = None
    conjugate: Elementwise | None = None
    intercept: Elementwise | None = None

    @property
    def value_at_zero(self) -> Float[Array, ""]:
        """f(0): what a unit of mass costs that p has and π has not."""
        return self.generator(jnp.asarray(-jnp.inf))

    @property
    def slope_at_infinity(self) -> Float[Array, ""]:
        """f'(∞): what a unit of mass costs that π has and p has not.

        Hard constraints need it finite.
        """
        return self.derivative(jnp.asarray(jnp.inf))

    @property
    def curvature(self) -> Float[Array, ""]:
        """f''(1), by which learning rates are compared; 0 for total variation.

        Near the target D_f ≈ ½ f''(1) χ².
        """
        return jax.grad(self.derivative)(jnp.asarray(0.0))


def made_once(make: Callable[Options, FDivergence]) -> Callable[Options, FDivergence]:
    """Equal options make one and the same divergence.

    So `jax.jit` finds again what was compiled for it, and each of its functions, which a loss, an
    update and an evaluation use many times, is traced once for each shape.

    Its functions compute in float32 at least, whatever they are given. Traced options (an α that is
    annealed) make a new one at each call, within the function that is traced.
    """
    signature = inspect.signature(make)
    by_name: Callable[..., FDivergence] = make

    def build(*options: Any) -> FDivergence:
        divergence = by_name(**dict(zip(signature.parameters, options, strict=True)))
        # What a function of its own closes over must not be of the function that is traced.
        wrap = jax.jit if all(map(_is_known, options)) else _as_it_is
        return divergence._replace(
            **{name: _in_float32(f, wrap) for name, f in divergence._asdict().items()}
        )

    remembered = functools.lru_cache(maxsize=1024)(build)

    @functools.wraps(make)
    def maker(*args: Options.args, **kwargs: Options.kwargs) -> FDivergence:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options: tuple[Any, ...] = tuple(map(_as_static, bound.arguments.values()))
        try:
            hash(options)
        except TypeError:
            return build(*options)
        return remembered(*options)

    return maker


def named(family: str, parameter: float | Float[Array, ""]) -> str:
    """``alpha=0.5``, to every digit that the parameter has; of a traced one the family alone.

    >>> named("alpha", 0.5), named("alpha", 1.0), named("alpha", 1 / 3)
    ('alpha=0.5', 'alpha=1', 'alpha=0.3333333333333333')
    """
    if not is_concrete(parameter):
        return family
    number = float(parameter) + 0.0  # -0.0 is 0
    short = f"{number:g}"
    return f"{family}={short if float(short) == number else repr(number)}"


def _as_static(option):
    if isinstance(option, list | tuple) and not hasattr(option, "_fields"):
        return tuple(map(_as_static, option))
    # A number that is no tracer is known as well as any other.
    if isinstance(option, jax.Array | np.ndarray) and option.ndim == 0:
        return float(option) if is_concrete(option) else jax.lax.stop_gradient(option)
    return option


def _is_known(option):
    """Whether nothing in it is traced: a number, or a divergence that was made of such."""
    if isinstance(option, FDivergence):
        functions = [getattr(f, "__wrapped__", f) for f in option[1:] if f is not None]
        return all(hasattr(function, "lower") for function in functions)  # which `jax.jit` gives it
    if isinstance(option, tuple):
        return all(map(_is_known, option))
    return option is None or isinstance(option, int | float | str)


def _as_it_is(function):
    return function


def _in_float32(function, wrap):
    if not callable(function):  # a name, or None
        return function
    wrapped = wrap(function)
    # Outside, so that whatever is given, the same program computes.
    return functools.wraps(wrapped)(lambda x: wrapped(jnp.asarray(x, float_dtype(jnp.asarray(x)))))


def exact_divergence(
    log_pi: Float[Array, "S"],
    log_p: Float[Array, "S"],
    *,
    divergence: FDivergence,
    where: Bool[Array, "S"] | Int[Array, "S"] | None = None,
) -> Float[Array, ""]:
    """D_f(π‖p) as a sum over a whole space.

    D_f(π‖p) = Σ_x p(x) f(π(x)/p(x)), the term being π(x) f'(∞) where p(x) = 0. `jax.grad` of it is
    the exact gradient that the surrogates estimate.

    Args:
        log_pi: normalised log-probabilities of every member of the space, in nats.
        log_p: the same of the target; -inf is allowed.
        divergence: which f.
        where: members that exist; the others are padding.

    Returns:
        The divergence in nats (total variation: a number between 0 and 1).

    Raises:
        ValueError: if the two list different spaces.

    >>> from fjax.divergences import total_variation
    >>> pi, p = jnp.log(jnp.array([0.9, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
    >>> round(float(exact_divergence(pi, p, divergence=total_variation())), 6)
    0.4

    Source: Go et al. 2023, equation 1.
    """
    made(divergence)
    log_pi, log_p = one_axis(log_pi=log_pi, log_p=log_p)
    where = as_mask(where, log_pi)
    nothing = jnp.isneginf(log_pi) & jnp.isneginf(log_p)
    counted = ~nothing if where is None else where & ~nothing
    log_pi, log_p = jnp.where(counted, log_pi, 0.0), jnp.where(counted, log_p, 0.0)
    log_t = log_pi - log_p
    less = log_t < 0
    # Below t = 1 as p f(t), above as π f(t)/t: neither product is ever ∞ · 0. (Not `minimum` and
    # `maximum`: at t = 1 they would pass on half of the gradient.)
    f, f_exponent = continued(divergence.generator, jnp.where(less, log_t, 0.0))
    ratio, ratio_exponent = continued(divergence.integrand, jnp.where(less, 0.0, log_t))
    near, far = times_exp(f, f_exponent + log_p), times_exp(ratio, ratio_exponent + log_pi)
    return jnp.sum(jnp.where(less, near, far), where=counted)
