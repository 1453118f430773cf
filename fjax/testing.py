"""The contract of an f-divergence, for yours as for fjax's own.

``check_divergence(my_divergence())`` goes into your test.

What is checked needs nothing but the functions themselves: that they belong to one convex f, that
the divergence they make behaves like one, that no input of float32 makes them NaN, and, by listing
a space, that the expected gradient of the surrogate is the gradient of the divergence.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fjax import enumeration
from fjax._checks import made
from fjax.divergences import FDivergence, exact_divergence

__all__ = ["check_divergence"]

_LOG_T = np.concatenate([np.linspace(-3, 3, 25), [-1e-3, 1e-3]])
_EXTREMES = np.array(
    [-np.inf, -1e4, -88.0, -1.0, -1e-8, 0.0, 1e-8, 1.0, 88.0, 1e4, np.inf], np.float32
)


def check_divergence(divergence: FDivergence, *, tolerance: float = 1e-8, seed: int = 0) -> None:
    """Asserts everything that fjax asserts of its own divergences, but the textbook formula.

    Identities are checked in float64 to ``tolerance``, relative where values are large; the
    gradient of the surrogate by enumeration, on-policy and off-policy, with zeros in p where f'(∞)
    is finite.

    Args:
        divergence: the f to be checked.
        tolerance: of the identities; functions made by autodiff or with cancellation may need more.
        seed: of the random distributions.

    Raises:
        AssertionError: saying which law is broken, and at which log_t.
        ValueError: if it is no divergence, but a function that makes one.

    >>> from fjax.divergences import jensen_shannon
    >>> check_divergence(jensen_shannon())

    Source: Go et al. 2023, theorem 1 for the gradient; Csiszár 1967 for the laws.
    """
    made(divergence)
    with jax.enable_x64(True):
        _check_functions(divergence, tolerance)
        _check_inverses(divergence, tolerance)
        _check_laws(divergence, tolerance, seed)
        _check_gradient(divergence, tolerance, seed)
    _check_float32(divergence)


def _close(actual, expected, tolerance, law, at):
    # Absolute up to 1: near t = 1 both sides are 0 but for rounding.
    actual, expected = np.broadcast_arrays(np.asarray(actual), np.asarray(expected))
    with np.errstate(invalid="ignore"):
        error = np.abs(actual - expected) / np.maximum(1.0, np.abs(expected))
    error = np.where(actual == expected, 0.0, error)  # infinities
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    where = np.broadcast_to(at, error.shape).ravel()[worst]
    if not error.ravel()[worst] <= tolerance:
        raise AssertionError(
            f"{law}: {np.ravel(actual)[worst]:.12g} against {np.ravel(expected)[worst]:.12g} at "
            f"{where:.6g}."
        )


def _check_functions(divergence, tolerance):
    log_t = jnp.asarray(_LOG_T)
    t, zero = np.exp(_LOG_T), jnp.zeros(())
    f, slope = divergence.generator(log_t), divergence.derivative(log_t)
    assert f.shape == slope.shape == log_t.shape, (
        "The functions are elementwise: array in, array of the same shape out."
    )
    _close(divergence.generator(zero), 0.0, tolerance, "f(1) = 0", 0.0)
    _close(
        divergence.integrand(log_t), f / t, tolerance, "integrand(log_t) = f(t)/t, at log_t", log_t
    )
    by_autodiff = jax.vmap(jax.grad(divergence.generator))(log_t)
    smooth = np.abs(_LOG_T) > 1e-12
    _close(
        by_autodiff[smooth],
        (t * slope)[smooth],
        tolerance,
        "d generator/d log_t = t f'(t), at log_t",
        log_t[smooth],
    )
    falling = np.diff(divergence.derivative(jnp.sort(log_t))) < -tolerance
    assert not falling.any(), (
        f"f is convex, so f' never falls; it does near log_t = "
        f"{np.sort(_LOG_T)[falling.argmax()]:.6g}."
    )
    if divergence.intercept is not None:
        _close(
            divergence.intercept(log_t),
            f - t * slope,
            tolerance,
            "intercept = f(t) - t f'(t), at log_t",
            log_t,
        )
    last, limit = divergence.integrand(jnp.asarray(jnp.inf)), divergence.slope_at_infinity
    _close(last, limit, tolerance, "integrand and derivative have one limit f'(∞)", np.inf)


def _check_inverses(divergence, tolerance):
    log_t = jnp.asarray(_LOG_T)
    t, slope, f = np.exp(_LOG_T), divergence.derivative(log_t), divergence.generator(log_t)
    if divergence.inverse_derivative is not None:
        _close(
            divergence.inverse_derivative(slope),
            t,
            tolerance,
            "(f')^{-1}(f'(t)) = t, at log_t",
            log_t,
        )
    if divergence.conjugate is not None:
        _close(
            divergence.conjugate(slope),
            t * slope - f,
            tolerance,
            "f*(f'(t)) = t f'(t) - f(t), at log_t",
            log_t,
        )
        v = jnp.linspace(-3.0, 3.0, 41)
        young = f[:, None] + divergence.conjugate(v)[None] - t[:, None] * v[None]
        assert (young >= -tolerance).all(), "Young's inequality f(t) + f*(v) ≥ tv is broken."


def _check_laws(divergence, tolerance, seed):
    rng = np.random.default_rng(seed)

    # Compiled: not compiled, each of its small parts is a program of its own.
    compiled = jax.jit(functools.partial(exact_divergence, divergence=divergence))

    def of(pi, p):
        return float(compiled(jnp.log(jnp.asarray(pi)), jnp.log(jnp.asarray(p))))

    for _ in range(5):
        pi, p, other, another = rng.dirichlet(np.ones(5), 4)
        kernel, share = rng.dirichlet(np.ones(3), 5), rng.uniform()
        value = of(pi, p)
        slack = tolerance * (1 + abs(value))
        assert value >= -slack, f"D_f ≥ 0, got {value:.6g}."
        assert abs(of(p, p)) <= tolerance, f"D_f(p‖p) = 0, got {of(p, p):.6g}."
        most = float(divergence.value_at_zero + divergence.slope_at_infinity)
        assert value <= most + slack, f"D_f ≤ f(0) + f'(∞) = {most:.6g}, got {value:.6g}."
        assert of(pi @ kernel, p @ kernel) <= value + slack, (
            "Merging and noise never add information (data processing)."
        )
        mixed = of(share * pi + (1 - share) * other, share * p + (1 - share) * another)
        bound = share * value + (1 - share) * of(other, another)
        assert mixed <= bound + tolerance * (1 + abs(bound)), "D_f is jointly convex."


def _check_gradient(divergence, tolerance, seed):
    rng = np.random.default_rng(seed)
    space = enumeration.sequences(3, 2, eos_id=0)
    log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 2)
    params = jnp.asarray(rng.normal(size=(prefixes, 3)))
    logits, log_q = (
        jnp.asarray(rng.normal(size=7)),
        jax.nn.log_softmax(jnp.asarray(rng.normal(size=7))),
    )
    targets = [jax.nn.log_softmax(logits)]
    if np.isfinite(divergence.slope_at_infinity):
        targets.append(jax.nn.log_softmax(jnp.where(jnp.arange(7) % 2 == 0, logits, -jnp.inf)))

    @jax.jit
    def gradients(log_p):
        of_divergence = functools.partial(enumeration.exact_gradient, divergence=divergence)
        of_surrogate = functools.partial(
            enumeration.expected_surrogate_gradient, divergence=divergence, baseline=0.7
        )
        policy = (log_prob_fn, params, space, log_p)
        return of_divergence(*policy), of_surrogate(*policy), of_surrogate(*policy, log_q)

    for log_p in targets:
        exact, *sampled = gradients(log_p)
        for expected in sampled:  # on-policy, off-policy
            _close(
                expected,
                exact,
                tolerance,
                "E[∇ surrogate] = ∇D_f(π‖p), for a parameter with gradient",
                exact,
            )


def _check_float32(divergence):
    log_t = jnp.asarray(_EXTREMES)
    for field in ("generator", "derivative", "integrand"):
        function = getattr(divergence, field)
        arrays = {field: function(log_t)}
        if field != "derivative":  # f' is stopped wherever it is used
            arrays[f"the gradient of {field}"] = jax.vmap(jax.grad(function))(log_t)
        for what, array in arrays.items():
            bad = np.isnan(array)
            assert not bad.any(), (
                f"In float32 {what} is NaN at log_t = {_EXTREMES[bad.argmax()]:.6g}."
            )
