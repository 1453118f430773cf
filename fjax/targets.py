"""Target distributions, as unnormalised log-scores ``log P(x)`` of samples.

A target is what the policy should become: p = P/Z. Only its log-score at the samples is ever
needed; Z is estimated (`fjax.estimate_log_z`) or, in a tiny space, summed
(`fjax.enumeration.exact_log_z`).

Log-scores add up, so a target of one function is the base of the next:
``pointwise(exponential_family(log_a, ...), b)`` is the base under moments *and* a hard constraint.

Source: Khalifa et al. 2021 (GDC, arXiv 2012.11635); Korbak et al. 2022 (arXiv 2205.11275).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import float_dtype, positive, same_shape
from fjax._numerics import ess_of, gather
from fjax.types import Array, Bool, Float, Int

__all__ = [
    "MomentFit",
    "exponential_family",
    "fit_coefficients",
    "pointwise",
    "product_of_experts",
    "reward_tilted",
    "smoothed",
]

# Accelerators multiply float32 in fewer bits unless told otherwise: moments would be met to three
# digits only.
_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

Satisfied = Bool[Array, "*n"] | Int[Array, "*n"] | Float[Array, "*n"]


def pointwise(log_a: Float[Array, "*n"], satisfied: Satisfied) -> Float[Array, "*n"]:
    """The base model restricted to what satisfies a constraint: P(x) = a(x) b(x), b(x) ∈ {0, 1}.

    Its normaliser is Z = E_a[b], the base rate of the constraint. KL(p‖a) = -log Z: of all
    distributions that satisfy the constraint always, p is the one closest to the base model.

    Args:
        log_a: log-probability of each sample under the base model, in nats; or another target's
            log-score.
        satisfied: b(x). Integers count where they are not 0; floats are b itself, 0.0 or 1.0.

    Returns:
        ``log_a`` where satisfied, -inf elsewhere.

    Raises:
        ValueError: if the two are not of one shape.

    >>> pointwise(jnp.array([-1.0, -2.0]), jnp.array([True, False])).tolist()
    [-1.0, -inf]

    Source: Khalifa et al. 2021 (GDC, arXiv 2012.11635), section 2.
    """
    log_a, b = _satisfied(log_a, satisfied)
    return jnp.where(b == 0, -jnp.inf, log_a + jnp.log(jnp.where(b == 0, 1.0, b)))


def smoothed(
    log_a: Float[Array, "*n"], satisfied: Satisfied, *, epsilon: float | Float[Array, ""]
) -> Float[Array, "*n"]:
    """A constraint that may be violated at a price: P(x) = a(x)·(b(x) + ε).

    Positive wherever the base is, so that reverse KL, Pearson's χ², Jeffreys and α ≥ 1 are finite.
    Its normaliser is E_a[b] + ε, and p violates the constraint with probability ε(1 -
    E_a[b])/(E_a[b] + ε).

    Args:
        log_a: log-probability under the base model, in nats; or another target's log-score.
        satisfied: b(x), see `pointwise`.
        epsilon: ε > 0.

    Raises:
        ValueError: if ε is not positive, or the shapes differ.

    >>> smoothed(jnp.zeros(2), jnp.array([True, False]), epsilon=0.5).round(4).tolist()
    [0.4055, -0.6931]

    Source: Go et al. 2023, appendix on reverse KL, in another form; mathematics: mixture of a·b and
    ε·a.
    """
    positive(epsilon=epsilon)  # at 0 the target would be `pointwise`
    log_a, b = _satisfied(log_a, satisfied)
    return log_a + jnp.log(b + epsilon)


def reward_tilted(
    log_a: Float[Array, "*n"], rewards: Float[Array, "*n"], *, beta: float | Float[Array, ""]
) -> Float[Array, "*n"]:
    """The optimum of RL with a KL penalty: P(x) = a(x)·exp(r(x)/β).

    max_π E_π[r] - β KL(π‖a) is reached at p and equals β log Z; J(π) = β log Z - β KL(π‖p) for
    every π. So RLHF is reverse KL to this target, and any other f may be taken in its place.

    Args:
        log_a: log-probability under the base model, in nats; or another target's log-score.
        rewards: r(x).
        beta: β > 0, the price of a nat.

    Raises:
        ValueError: if β is not positive, or the shapes differ.

    >>> reward_tilted(jnp.array([-1.0]), jnp.array([0.5]), beta=0.5).tolist()
    [0.0]

    Source: Korbak et al. 2022 (arXiv 2205.11275), section 2; Ziegler et al. 2019.
    """
    positive(beta=beta)  # at 0 the target would be the best single sample
    log_a, rewards = same_shape(log_a=log_a, rewards=rewards)
    return log_a + rewards / beta


def product_of_experts(
    log_scores: Float[Array, "M *n"], *, weights: Float[Array, "M"] | None = None
) -> Float[Array, "*n"]:
    """Several targets at once: P(x) = Π_m P_m(x)^{w_m}.

    Args:
        log_scores: one target a row, log P_m(x).
        weights: w_m ≥ 0; None means all 1. An expert of weight 0 has no say, not even a veto.

    Raises:
        ValueError: if there is not one weight an expert.

    >>> product_of_experts(jnp.array([[-1.0, -2.0], [-3.0, -jnp.inf]])).tolist()
    [-4.0, -inf]

    Source: Hinton 2002.
    """
    log_scores = jnp.asarray(log_scores, float_dtype(log_scores))
    if weights is None:
        return log_scores.sum(axis=0)
    weights = jnp.asarray(weights, float_dtype(log_scores, weights))
    if log_scores.ndim == 0 or weights.shape != log_scores.shape[:1]:
        raise ValueError(
            f"One weight an expert: got {_shape(log_scores)} log-scores and {_shape(weights)} "
            f"weights."
        )
    weights = weights.reshape(-1, *[1] * (log_scores.ndim - 1))
    return jnp.where(weights == 0, 0.0, weights * jnp.where(weights == 0, 0.0, log_scores)).sum(
        axis=0
    )


def exponential_family(
    log_a: Float[Array, "N"], features: Float[Array, "N K"], coefficients: Float[Array, "K"]
) -> Float[Array, "N"]:
    """The base model tilted by features: P(x) = a(x)·exp(λ·φ(x)).

    Of all distributions with the moments E_p[φ], it is the one closest to the base model: KL(p‖a) =
    λ·E_p[φ] - log Z. `fit_coefficients` finds the λ for given moments.

    Args:
        log_a: log-probability under the base model, in nats; or another target's log-score.
        features: φ(x).
        coefficients: λ. inf stands for the hard constraint that a Boolean feature be 1, -inf that
            it be 0.

    Raises:
        ValueError: if features are not one row a sample, or coefficients not one a feature.

    >>> features = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> exponential_family(jnp.zeros(2), features, jnp.array([0.5, -jnp.inf])).tolist()
    [0.5, -inf]

    Source: Khalifa et al. 2021, section 2.2; Csiszár 1975.
    """
    features, coefficients = _by_feature(features, coefficients=coefficients)
    log_a = _one_a_row(features, log_a=log_a)
    hard = jnp.isinf(coefficients)[None]
    soft = _dot(features, jnp.where(hard[0], 0.0, coefficients))
    wanted = jnp.where(coefficients > 0, 1.0, 0.0)[None]
    return jnp.where((hard & (features != wanted)).any(axis=1), -jnp.inf, log_a + soft)


class MomentFit(NamedTuple):
    """Coefficients of an exponential family, and how far they can be trusted.

    Attributes:
        coefficients: λ; ±inf for a Boolean feature whose moment is exactly 1 or 0, a hard
            constraint.
        std_error: of λ, from the spread of the samples; NaN where λ is infinite or the moment
            unreachable. inf where the samples cannot tell the feature from a combination of others,
            as of two that are always equal: the distribution is known, but many λ give it, of which
            this is one.
        residual: the moments reached minus those asked for.
        ess: effective sample size of the tilted samples: near 1, the fit rests on a single one.
        log_z: log E_a[exp(λ·φ)], with the hard constraints inside the mean.
        steps: Newton steps taken.
        converged: whether the residual is within the tolerance.
        unreachable: features whose moment is not strictly inside the range of what those samples
            have that satisfy the hard constraints: one that never fires there, say. Their λ is 0.
            Moments that no mixture of samples has, each for itself in range, show as ``converged``
            False.
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
    >>> bool(fit.converged), round(float(fit.coefficients[0]), 4)                        # logit 0.5 - logit 0.25
    (True, 1.0986)

    Source: Khalifa et al. 2021, section 2.2, by Newton's method in place of gradient descent.
    """
    features, moments = _by_feature(features, moments=moments)
    logs = _one_a_row(
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
    solution, steps = _newton(log_base, scaled, tolerance, max_steps)
    std_error, residual, ess, log_tilted = _describe_fit(log_base, scaled, solution)
    soft = solution / scale  # 0 for what is hard or out of reach
    reached = _dot(jax.nn.softmax(log_base + _dot(scaled, solution)), features)
    return MomentFit(
        coefficients=jnp.where(hard, jnp.where(moments == 1, jnp.inf, -jnp.inf), soft),
        std_error=jnp.where(hard | unreachable, jnp.nan, std_error / scale),
        residual=reached - moments,
        ess=ess,
        log_z=log_tilted + _dot(soft, moments),
        steps=steps,
        converged=(jnp.abs(residual) <= tolerance).all() & ~unreachable.any() & satisfiable,
        unreachable=unreachable,
    )


def _constraints(features, moments, log_weights):
    """Which moments are hard, which out of reach; the samples that satisfy all the hard ones;
    whether there are any.
    """
    present = ~jnp.isneginf(log_weights)
    boolean = (~present[:, None] | (features == 0) | (features == 1)).all(axis=0)
    hard = boolean & ((moments == 0) | (moments == 1))
    allowed = ~(hard[None] & (features != moments[None])).any(axis=1)
    satisfiable = (allowed & present).any()
    # No sample satisfies them all: the rest is fitted to all samples, and the failure reported.
    log_base = jnp.where(allowed | ~satisfiable, log_weights, -jnp.inf)
    possible = ~jnp.isneginf(log_base)[:, None]
    low = jnp.min(jnp.where(possible, features, jnp.inf), axis=0)
    high = jnp.max(jnp.where(possible, features, -jnp.inf), axis=0)
    # A feature that is constant has its moment by itself.
    inside = ((low < moments) & (moments < high)) | ((low == moments) & (moments == high))
    unreachable = ~inside & ~(hard & (low <= moments) & (moments <= high))
    return hard, unreachable, log_base, satisfiable


def _standardize(features, moments, log_base, free):
    """Features minus their moments in units of their spread, and the unit; 0 for those that are not
    free.
    """
    shifted = jnp.where(free[None], features - moments[None], 0.0)
    weights = jax.nn.softmax(log_base)
    spread = jnp.sqrt(_dot(weights, (shifted - _dot(weights, shifted)[None]) ** 2))
    scale = jnp.where(spread > 0, spread, 1.0)
    return shifted / scale[None], scale


def _newton(log_base, features, tolerance, max_steps):
    """Minimises log Σ w exp(λ·φ), where the gradient is the tilted mean and the Hessian the tilted
    covariance.
    """
    ridge = _ridge(features.dtype)

    def value(solution):
        return jax.nn.logsumexp(log_base + _dot(features, solution))

    def moments(solution):
        weights = jax.nn.softmax(log_base + _dot(features, solution))
        mean = _dot(weights, features)
        return mean, _dot(features.T * weights[None], features) - mean[:, None] * mean[None]

    def unfinished(state):
        _, mean, _, steps, stuck = state
        return (jnp.abs(mean) > tolerance).any() & (steps < max_steps) & ~stuck

    def step(state):
        solution, mean, covariance, steps, _ = state
        size = jnp.trace(covariance) / covariance.shape[0]
        direction = -jnp.linalg.solve(
            covariance + ridge * (size + ridge) * jnp.eye(mean.shape[0], dtype=mean.dtype), mean
        )
        # A limit in standard deviations: moments outside the convex hull pull λ to infinity.
        direction = direction / jnp.maximum(1.0, jnp.abs(direction).max() / 10)
        here = value(solution)
        sizes = 0.5 ** jnp.arange(20, dtype=mean.dtype)
        values = jax.lax.map(lambda scale: value(solution + scale * direction), sizes)
        best = sizes[
            jnp.argmax(
                values
                <= here + 1e-4 * sizes * _dot(mean, direction) + 4 * jnp.finfo(mean.dtype).eps
            )
        ]
        solution = solution + best * direction
        return solution, *moments(solution), steps + 1, jnp.abs(best * direction).max() == 0

    start = jnp.zeros_like(features[0])
    mean, covariance = moments(start)
    # "Stuck" is computed, not written down: under shard_map it has to vary over the mesh as it will
    # later.
    state = (start, mean, covariance, jnp.zeros((), jnp.int32), jnp.isnan(mean).any())
    solution, _, _, steps, _ = jax.lax.while_loop(unfinished, step, state)
    return solution, steps


def _describe_fit(log_base, features, solution):
    """Standard errors, remaining gradient, effective sample size and log-sum at the solution."""
    log_tilted = log_base + _dot(features, solution)
    weights = jax.nn.softmax(log_tilted)
    mean = _dot(weights, features)
    centred = features - mean[None]
    inverse, determined = _inverse(_dot(centred.T * weights[None], centred))
    spread = _dot(centred.T * weights[None] ** 2, centred)
    ess = ess_of(log_tilted)
    variance = jnp.diag(_dot(_dot(inverse, spread), inverse)) / (1 - 1 / jnp.maximum(ess, 1 + 1e-6))
    return (
        jnp.where(determined, jnp.sqrt(variance), jnp.inf),
        mean,
        ess,
        jax.nn.logsumexp(log_tilted),
    )


def _inverse(covariance):
    """Its inverse over all that has spread, and which features have no part in a combination
    without any.
    """
    unit = jnp.sqrt(jnp.diag(covariance))
    unit = jnp.where(unit > 0, unit, 1.0)
    values, vectors = jnp.linalg.eigh(covariance / (unit[:, None] * unit[None]))
    flat = values <= _ridge(covariance.dtype)
    inverse = _dot(
        vectors * jnp.where(flat, 0.0, 1 / jnp.where(flat, 1.0, values))[None], vectors.T
    )
    share = _dot(vectors**2, flat.astype(vectors.dtype))
    return inverse / (unit[:, None] * unit[None]), share < jnp.sqrt(jnp.finfo(share.dtype).eps)


def _ridge(dtype):
    """What an eigenvalue of a correlation matrix is lost in, of rounding."""
    return 1e-9 if dtype == jnp.float64 else 1e-5


def _whole(x):
    """On each device of a mesh with explicit axes, where jax would ask of every sum over samples
    how it is to be sharded.
    """
    mesh = jax.typeof(x).sharding.mesh
    explicit = any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if explicit else x


def _satisfied(log_a, satisfied):
    """Log a and b(x) as floats; integers are masks, and count once."""
    satisfied = jnp.asarray(satisfied)
    if not jnp.issubdtype(satisfied.dtype, jnp.floating):
        satisfied = satisfied != 0
    return same_shape(log_a=log_a, satisfied=satisfied)


def _by_feature(features, **of_each):
    """Features ``[N, K]``, and what there is one of for each, in a common dtype."""
    ((name, values),) = of_each.items()
    if (
        np.ndim(features) != 2
        or np.ndim(values) != 1
        or np.shape(features)[1] != np.shape(values)[0]
    ):
        raise ValueError(
            f"features must be [N, K], one row a sample, and {name} [K], one a feature; got "
            f"{_shape(features)} and {_shape(values)}. For several contexts, map the function over "
            f"them with jax.vmap."
        )
    dtype = float_dtype(features, values)
    return jnp.asarray(features, dtype), jnp.asarray(values, dtype)


def _one_a_row(features, **arrays):
    """One number for each row of the features, in their dtype."""
    ((name, values),) = arrays.items()
    if np.shape(values) != features.shape[:1]:
        raise ValueError(
            f"{name} must be one number a row of features, which are {_shape(features)}; got "
            f"{_shape(values)}. For several "
            "contexts, map the function over them with jax.vmap."
        )
    return jnp.asarray(values, float_dtype(features, values))


def _shape(x) -> str:
    return str(list(np.shape(x)))
