"""The exponential family that has given moments, from samples of the base model.

Its coefficients solve a convex problem, by Newton's method. `fjax.targets.exponential_family` makes
the target of them.

Source: Khalifa et al. 2021 (GDC, arXiv 2012.11635), section 2.2; Csiszár 1975.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import by_feature, float_dtype, one_a_row, positive
from fjax._numerics import dot, ess_of, gather
from fjax.types import Array, Bool, Float

__all__ = ["MomentFit", "fit_coefficients", "fit_coefficients_over_contexts"]


class MomentFit(NamedTuple):
    """Coefficients of an exponential family, and how far they can be trusted.

    Attributes:
        coefficients: λ; ±inf for a Boolean feature whose moment is exactly 1 or 0, a hard
            constraint.
        std_error: of λ, from the spread of the samples; NaN where λ is infinite or the moment
            unreachable. inf where the samples cannot tell the feature from a combination of others,
            such as two that are always equal: the distribution is known, but many λ give it, and
            this is one of them.
        residual: the moments reached minus those asked for.
        ess: effective sample size of the tilted samples: near 1, the fit rests on a single one.
        log_z: log E_a[exp(λ·φ)], with the hard constraints inside the mean.
        steps: Newton steps taken.
        converged: whether the residual is within the tolerance.
        unreachable: features whose moment is not strictly inside the range that they take in the
            samples that satisfy the hard constraints, such as one that never fires there. Their λ
            is 0. Moments that are in range each, but had together by no mixture of samples, show as
            ``converged`` False.
    """

    coefficients: Float[Array, "K"]
    std_error: Float[Array, "K"]
    residual: Float[Array, "K"]
    ess: Float[Array, ""]
    log_z: Float[Array, ""]
    steps: Array
    converged: Bool[Array, ""]
    unreachable: Bool[Array, "K"]


def fit_coefficients(
    features: Float[Array, "N K"],
    moments: Float[Array, "K"],
    *,
    log_weights: Float[Array, "N"] | None = None,
    tolerance: float | Float[Array, ""] | None = None,
    max_steps: int = 100,
    axis_name: str | None = None,
) -> MomentFit:
    """Finds λ with E_p[φ] = μ̄ for p ∝ a·exp(λ·φ), from samples of the base model.

    Newton's method on the convex dual, min_λ log E_a[exp(λ·(φ - μ̄))], with halved steps where a
    whole one would not descend. Nothing here diverges: what cannot be fitted comes back finite, and
    says so.

    Args:
        features: φ of each sample, computed once.
        moments: μ̄. Exactly 0 or 1 for a feature that is always 0 or 1 means the hard constraint.
        log_weights: log a/q if the samples are of q, or log-probabilities of a listed space; None
            means all equal.
        tolerance: of the moments, in standard deviations of the feature; None means 1e-10 in
            float64, 1e-5 in float32.
        max_steps: Newton steps at most.
        axis_name: mapped axis over which the samples are spread.

    Returns:
        A `MomentFit`. Standard errors are those of a sandwich estimator, in which the weights count
        as samples of q.

    Raises:
        ValueError: if there is not one moment a feature, or one log-weight a sample.

    >>> fit = fit_coefficients(jnp.array([[1.0], [0.0], [0.0], [0.0]]), jnp.array([0.5]))
    >>> bool(fit.converged), round(float(fit.coefficients[0]), 4)  # logit 0.5 - logit 0.25
    (True, 1.0986)

    Source: Khalifa et al. 2021, section 2.2, by Newton's method in place of gradient descent.
    """
    features, moments = by_feature(features, moments=moments)
    logs = one_a_row(
        features, log_weights=jnp.zeros_like(features[:, 0]) if log_weights is None else log_weights
    )
    if tolerance is None:
        tolerance = 1e-10 if features.dtype == jnp.float64 else 1e-5
    positive(tolerance=tolerance)
    features, logs = _whole(gather(features, axis_name)), _whole(gather(logs, axis_name))
    log_w: Array = logs - jax.nn.logsumexp(logs)
    # of what has no weight they may be anything
    features = jnp.where(jnp.isneginf(log_w)[:, None], 0.0, features)
    hard, unreachable, log_base, satisfiable = _constraints(features, moments, log_w)
    scaled, scale = _standardize(features, moments, log_base, ~hard & ~unreachable)
    solution, steps = _newton(
        partial(_tilted_moments, log_base, scaled),
        lambda solution: jax.nn.logsumexp(log_base + dot(scaled, solution)),
        jnp.zeros_like(scaled[0]),
        tolerance,
        max_steps,
    )
    std_error, residual, ess, log_tilted = _describe_fit(log_base, scaled, solution)
    reached = dot(jax.nn.softmax(log_base + dot(scaled, solution)), features)
    described = std_error, residual, ess, log_tilted
    met = satisfiable, reached
    return _as_fit(moments, hard, unreachable, solution, scale, steps, described, met, tolerance)


def fit_coefficients_over_contexts(
    features: Float[Array, "C N K"],
    moments: Float[Array, "K"],
    *,
    log_weights: Float[Array, "C N"] | None = None,
    tolerance: float | Float[Array, ""] | None = None,
    max_steps: int = 100,
) -> MomentFit:
    """Finds the one λ with E_c E_{p_c}[φ] = μ̄ for p_c ∝ a_c·exp(λ·φ), from samples of each context.

    The moments hold on average over contexts, each of which counts alike and has a Z of its own. Of
    all families p_c with these moments, it is the one with the lowest E_c KL(p_c‖a_c). The dual,
    min_λ E_c log E_{a_c}[exp(λ·(φ - μ̄))], is minimised by Newton's method, as in
    `fit_coefficients`.

    Args:
        features: φ of each sample, as many of each context.
        moments: μ̄. Exactly 0 or 1 for a feature that is always 0 or 1 means the hard constraint. A
            context without a sample that satisfies all of those has no known p_c, and is left out.
        log_weights: log a/q if the samples are of q; None means all equal.
        tolerance: see `fit_coefficients`.
        max_steps: Newton steps at most.

    Returns:
        A `MomentFit`. Its errors are of the samples, the contexts being given; ``log_z`` is the
        mean over contexts of log E_{a_c}[exp(λ·φ)]. A moment is unreachable unless it is strictly
        between the means over contexts of the lowest and of the highest value there.

    Raises:
        ValueError: for other shapes.

    >>> features = jnp.array([[[1.0], [0.0]], [[1.0], [1.0]]])  # always 1 in the second context
    >>> fit = fit_coefficients_over_contexts(features, jnp.array([0.875]))
    >>> round(float(fit.coefficients[0]), 4)  # so 0.75 in the first: logit 0.75
    1.0986

    Source: Csiszár 1975; targets of contexts as in Korbak et al. 2022 (CDPG, arXiv 2112.00791).
    """
    features, moments, log_w = _by_context(features, moments, log_weights)
    if tolerance is None:
        tolerance = 1e-10 if features.dtype == jnp.float64 else 1e-5
    positive(tolerance=tolerance)
    hard, unreachable, log_base, share, satisfiable = _constraints_over(features, moments, log_w)
    free = ~hard & ~unreachable
    scaled, scale = _standardize_over(features, moments, log_base, share, free)
    tilt = partial(_tilt, log_base, scaled, share)

    def tilted(solution):
        weights, centred, means = tilt(solution)
        return dot(share, means), dot(centred.T * weights[None], centred)

    def value(solution):
        return dot(share, jax.nn.logsumexp(log_base + dot(scaled, solution), axis=1))

    solution, steps = _newton(tilted, value, jnp.zeros_like(moments), tolerance, max_steps)
    described = *_describe_over(share, *tilt(solution)), value(solution)
    met = satisfiable, dot(tilt(solution)[0], _rows(features))
    return _as_fit(moments, hard, unreachable, solution, scale, steps, described, met, tolerance)


def _as_fit(moments, hard, unreachable, solution, scale, steps, described, met, tolerance):
    """In the units of the features."""
    std_error, residual, ess, log_tilted = described
    satisfiable, reached = met
    soft = solution / scale  # 0 for what is hard or out of reach
    return MomentFit(
        coefficients=jnp.where(hard, jnp.where(moments == 1, jnp.inf, -jnp.inf), soft),
        std_error=jnp.where(hard | unreachable, jnp.nan, std_error / scale),
        residual=reached - moments,
        ess=ess,
        log_z=log_tilted + dot(soft, moments),
        steps=steps,
        converged=(jnp.abs(residual) <= tolerance).all() & ~unreachable.any() & satisfiable,
        unreachable=unreachable,
    )


def _by_context(features, moments, log_weights):
    """Features ``[C, N, K]``, moments and normalised log-weights, in float32 at least."""
    rows = np.shape(features)[:2]
    given = rows if log_weights is None else np.shape(log_weights)
    if np.ndim(features) != 3 or np.shape(moments) != np.shape(features)[2:] or given != rows:
        raise ValueError(
            f"features must be [C, N, K], N samples of each context, moments [K], one a feature, "
            f"and log_weights [C, N], one a sample; got {[*np.shape(features)]}, "
            f"{[*np.shape(moments)]} and {[*given]}."
        )
    features, moments = (
        jnp.asarray(x, float_dtype(features, moments)) for x in (features, moments)
    )
    logs = jnp.zeros_like(features[..., 0]) if log_weights is None else log_weights
    logs = jnp.asarray(logs, float_dtype(features, logs))
    total = jax.nn.logsumexp(logs, axis=1, keepdims=True)
    log_w = logs - jnp.where(jnp.isneginf(total), 0.0, total)
    # of what has no weight they may be anything
    return jnp.where(jnp.isneginf(log_w)[..., None], 0.0, features), moments, log_w


def _constraints(features, moments, log_weights):
    """Which moments are hard, which out of reach, and which samples meet all hard ones.

    Last, whether there are such samples.
    """
    hard, log_base, satisfiable = _hard(features, moments, log_weights)
    low, high = _range(features, log_base)
    return hard, _unreachable(moments, hard, low, high), log_base, satisfiable


def _constraints_over(features, moments, log_weights):
    """The same of several contexts, and the share of each: 0 without a sample that meets them."""
    hard, log_base, satisfiable = _hard(_rows(features), moments, log_weights.ravel())
    log_base = log_base.reshape(log_weights.shape)
    known = ~jnp.isneginf(log_base).all(axis=1)
    share = (known / known.sum()).astype(features.dtype)
    ranges = jax.vmap(_range)(features, log_base)
    low, high = (dot(share, jnp.where(known[:, None], x, 0.0)) for x in ranges)
    log_base = jnp.where(known[:, None], log_base, 0.0)  # where they do not count, no NaN
    return hard, _unreachable(moments, hard, low, high), log_base, share, satisfiable


def _hard(features, moments, log_weights):
    """Which moments are hard, the weights of the samples that meet them, and whether any does."""
    present = ~jnp.isneginf(log_weights)
    boolean = (~present[:, None] | (features == 0) | (features == 1)).all(axis=0)
    hard = boolean & ((moments == 0) | (moments == 1))
    allowed = ~(hard[None] & (features != moments[None])).any(axis=1)
    satisfiable = (allowed & present).any()
    # No sample satisfies them all: the rest is fitted to all samples, and the failure reported.
    return hard, jnp.where(allowed | ~satisfiable, log_weights, -jnp.inf), satisfiable


def _range(features, log_base):
    """The lowest and the highest of each feature, of the samples that have weight."""
    possible = ~jnp.isneginf(log_base)[:, None]
    low = jnp.min(jnp.where(possible, features, jnp.inf), axis=0)
    return low, jnp.max(jnp.where(possible, features, -jnp.inf), axis=0)


def _unreachable(moments, hard, low, high):
    # A feature that is constant has its moment by itself.
    inside = ((low < moments) & (moments < high)) | ((low == moments) & (moments == high))
    return ~inside & ~(hard & (low <= moments) & (moments <= high))


def _standardize(features, moments, log_base, free):
    """Features minus their moments, in units of their spread, and those units.

    0 for features that are not free.
    """
    shifted = jnp.where(free[None], features - moments[None], 0.0)
    weights = jax.nn.softmax(log_base)
    spread = jnp.sqrt(dot(weights, (shifted - dot(weights, shifted)[None]) ** 2))
    scale = jnp.where(spread > 0, spread, 1.0)
    return shifted / scale[None], scale


def _standardize_over(features, moments, log_base, share, free):
    """The same of several contexts, the spread being that within them."""
    shifted = jnp.where(free[None, None], features - moments[None, None], 0.0)
    weights, centred, _ = _tilt(log_base, shifted, share, jnp.zeros_like(moments))
    spread = jnp.sqrt(dot(weights, centred**2))
    scale = jnp.where(spread > 0, spread, 1.0)
    return shifted / scale[None, None], scale


def _tilt(log_base, features, share, solution):
    """Weights of the samples of all contexts, one after the other, and their features.

    These are minus the mean in their context; last, those means ``[C, K]``.
    """
    within = jax.nn.softmax(log_base + dot(features, solution), axis=1)
    means = (within[..., None] * features).sum(axis=1)
    return (within * share[:, None]).ravel(), _rows(features - means[:, None]), means


def _rows(features):
    """``[C·N, K]``."""
    return features.reshape(-1, features.shape[-1])


def _newton(tilted, value, start, tolerance, max_steps):
    """Minimises the mean over contexts of log Σ w exp(λ·φ), λ from ``start``.

    ``tilted`` gives its gradient, the tilted mean, and its Hessian, the tilted covariance.
    """

    def unfinished(state):
        _, mean, _, steps, stuck = state
        return (jnp.abs(mean) > tolerance).any() & (steps < max_steps) & ~stuck

    def step(state):
        solution, mean, covariance, steps, _ = state
        direction = _direction(mean, covariance)
        change = _line_search(value, solution, direction, mean) * direction
        solution = solution + change
        return solution, *tilted(solution), steps + 1, jnp.abs(change).max() == 0

    mean, covariance = tilted(start)
    # "Stuck" is computed, not written down: under shard_map it has to vary over the mesh as it will
    # later.
    state = (start, mean, covariance, jnp.zeros((), jnp.int32), jnp.isnan(mean).any())
    solution, _, _, steps, _ = jax.lax.while_loop(unfinished, step, state)
    return solution, steps


def _tilted_moments(log_base, features, solution):
    weights = jax.nn.softmax(log_base + dot(features, solution))
    mean = dot(weights, features)
    return mean, dot(features.T * weights[None], features) - mean[:, None] * mean[None]


def _direction(mean, covariance):
    """Of Newton's step, with a ridge against features that are combinations of others."""
    ridge = _ridge(mean.dtype)
    size = jnp.trace(covariance) / covariance.shape[0]
    direction = -jnp.linalg.solve(
        covariance + ridge * (size + ridge) * jnp.eye(mean.shape[0], dtype=mean.dtype), mean
    )
    # A limit in standard deviations: moments outside the convex hull pull λ to infinity.
    return direction / jnp.maximum(1.0, jnp.abs(direction).max() / 10)


def _line_search(value, solution, direction, slope):
    """The largest of 1, ½, ¼, … times the direction that descends enough (Armijo)."""
    sizes = 0.5 ** jnp.arange(20, dtype=slope.dtype)
    values = jax.lax.map(lambda scale: value(solution + scale * direction), sizes)
    enough = value(solution) + 1e-4 * sizes * dot(slope, direction) + 4 * jnp.finfo(slope.dtype).eps
    return sizes[jnp.argmax(values <= enough)]


def _describe_fit(log_base, features, solution):
    """Standard errors, remaining gradient, effective sample size and log-sum at the solution."""
    log_tilted = log_base + dot(features, solution)
    weights = jax.nn.softmax(log_tilted)
    mean = dot(weights, features)
    centred = features - mean[None]
    inverse, determined = _inverse(dot(centred.T * weights[None], centred))
    spread = dot(centred.T * weights[None] ** 2, centred)
    ess = ess_of(log_tilted)
    variance = jnp.diag(dot(dot(inverse, spread), inverse)) / (1 - 1 / jnp.maximum(ess, 1 + 1e-6))
    return (
        jnp.where(determined, jnp.sqrt(variance), jnp.inf),
        mean,
        ess,
        jax.nn.logsumexp(log_tilted),
    )


def _describe_over(share, weights, centred, means):
    """Standard errors, remaining gradient and effective sample size of several contexts."""
    inverse, determined = _inverse(dot(centred.T * weights[None], centred))
    by_context = weights.reshape(len(share), -1)
    # Σw² within each context, 1 over its effective sample size
    few = (by_context**2).sum(axis=1) / jnp.where(share > 0, share, 1.0) ** 2
    squares = (by_context**2 / (1 - jnp.minimum(few, 1 - 1e-6))[:, None]).ravel()
    variance = jnp.diag(dot(dot(inverse, dot(centred.T * squares[None], centred)), inverse))
    error = jnp.where(determined, jnp.sqrt(variance), jnp.inf)
    return error, dot(share, means), 1 / (weights**2).sum()


def _inverse(covariance):
    """Its inverse over all that has spread.

    Beside it, which features have no part in a combination without any.
    """
    unit = jnp.sqrt(jnp.diag(covariance))
    unit = jnp.where(unit > 0, unit, 1.0)
    values, vectors = jnp.linalg.eigh(covariance / (unit[:, None] * unit[None]))
    flat = values <= _ridge(covariance.dtype)
    inverse = dot(vectors * jnp.where(flat, 0.0, 1 / jnp.where(flat, 1.0, values))[None], vectors.T)
    share = dot(vectors**2, flat.astype(vectors.dtype))
    return inverse / (unit[:, None] * unit[None]), share < jnp.sqrt(jnp.finfo(share.dtype).eps)


def _ridge(dtype):
    """What an eigenvalue of a correlation matrix is lost in, of rounding."""
    return 1e-9 if dtype == jnp.float64 else 1e-5


def _whole(x):
    """On each device of a mesh with explicit axes.

    There jax would ask of every sum over samples how it is to be sharded.
    """
    mesh = jax.typeof(x).sharding.mesh
    explicit = any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if explicit else x
