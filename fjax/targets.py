"""Target distributions, as unnormalised log-scores ``log P(x)`` of samples.

A target is what the policy should become: p = P/Z. Only its log-score at the samples is ever needed; Z is estimated
(`fjax.estimate_log_z`) or, in a tiny space, summed (`fjax.enumeration.exact_log_z`).

Log-scores add up, so a target of one function is the base of the next: ``pointwise(exponential_family(log_a, ...), b)`` is
the base under moments *and* a hard constraint.

Source: Khalifa et al. 2021 (GDC, arXiv 2012.11635); Korbak et al. 2022 (arXiv 2205.11275).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fjax._numerics import ess_of, gather
from fjax._typing import Array, Bool, Float

__all__ = [
    "MomentFit",
    "exponential_family",
    "fit_coefficients",
    "pointwise",
    "product_of_experts",
    "reward_tilted",
    "smoothed",
]


def pointwise(log_a: Float[Array, "*n"], satisfied: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    """The base model restricted to what satisfies a constraint: P(x) = a(x) b(x), b(x) ∈ {0, 1}.

    Its normaliser is Z = E_a[b], the base rate of the constraint. KL(p‖a) = -log Z: of all distributions that
    satisfy the constraint always, p is the one closest to the base model.

    Args:
        log_a: log-probability of each sample under the base model, in nats; or another target's log-score.
        satisfied: b(x).

    Returns:
        ``log_a`` where satisfied, -inf elsewhere.

    Raises:
        ValueError: if the two are not of one shape.

    >>> pointwise(jnp.array([-1.0, -2.0]), jnp.array([True, False])).tolist()
    [-1.0, -inf]

    Source: Khalifa et al. 2021 (GDC, arXiv 2012.11635), section 2.
    """
    _same_shape(log_a, satisfied, "satisfied")
    return jnp.where(satisfied, log_a, -jnp.inf)


def smoothed(log_a: Float[Array, "*n"], satisfied: Bool[Array, "*n"], *, epsilon: float) -> Float[Array, "*n"]:
    """A constraint that may be violated at a price: P(x) = a(x)·(b(x) + ε).

    Positive wherever the base is, so that reverse KL, Pearson's χ², Jeffreys and α ≥ 1 are finite. Its normaliser is
    E_a[b] + ε, and p violates the constraint with probability ε(1 - E_a[b])/(E_a[b] + ε).

    Args:
        log_a: log-probability under the base model, in nats; or another target's log-score.
        satisfied: b(x).
        epsilon: ε > 0.

    Raises:
        ValueError: if ε is not positive, or the shapes differ.

    >>> smoothed(jnp.zeros(2), jnp.array([True, False]), epsilon=0.5).round(4).tolist()
    [0.4055, -0.6931]

    Source: Go et al. 2023, appendix on reverse KL, in another form; mathematics: mixture of a·b and ε·a.
    """
    _same_shape(log_a, satisfied, "satisfied")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}; without it the target is `pointwise`.")
    return log_a + jnp.log(satisfied.astype(log_a.dtype) + epsilon)


def reward_tilted(log_a: Float[Array, "*n"], rewards: Float[Array, "*n"], *, beta: float) -> Float[Array, "*n"]:
    """The optimum of RL with a KL penalty: P(x) = a(x)·exp(r(x)/β).

    max_π E_π[r] - β KL(π‖a) is reached at p and equals β log Z; J(π) = β log Z - β KL(π‖p) for every π. So RLHF is reverse
    KL to this target, and any other f may be taken in its place.

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
    _same_shape(log_a, rewards, "rewards")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}: at 0 the target would be the best single sample.")
    return log_a + rewards / beta


def product_of_experts(log_scores: Float[Array, "M *n"], *, weights: Float[Array, "M"] | None = None) -> Float[Array, "*n"]:
    """Several targets at once: P(x) = Π_m P_m(x)^{w_m}.

    Args:
        log_scores: one target a row, log P_m(x).
        weights: w_m ≥ 0; None means all 1. An expert of weight 0 has no say, not even a veto.

    >>> product_of_experts(jnp.array([[-1.0, -2.0], [-3.0, -jnp.inf]])).tolist()
    [-4.0, -inf]

    Source: Hinton 2002.
    """
    if weights is None:
        return log_scores.sum(axis=0)
    weights = weights.reshape(-1, *[1] * (log_scores.ndim - 1))
    return jnp.where(weights == 0, 0.0, weights * jnp.where(weights == 0, 0.0, log_scores)).sum(axis=0)


def exponential_family(
    log_a: Float[Array, "N"], features: Float[Array, "N K"], coefficients: Float[Array, "K"]
) -> Float[Array, "N"]:
    """The base model tilted by features: P(x) = a(x)·exp(λ·φ(x)).

    Of all distributions with the moments E_p[φ], it is the one closest to the base model: KL(p‖a) = λ·E_p[φ] - log Z.
    `fit_coefficients` finds the λ for given moments.

    Args:
        log_a: log-probability under the base model, in nats; or another target's log-score.
        features: φ(x).
        coefficients: λ. inf stands for the hard constraint that a Boolean feature be 1, -inf that it be 0.

    >>> features = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> exponential_family(jnp.zeros(2), features, jnp.array([0.5, -jnp.inf])).tolist()
    [0.5, -inf]

    Source: Khalifa et al. 2021, section 2.2; Csiszár 1975.
    """
    hard = jnp.isinf(coefficients)[None]
    soft = features @ jnp.where(hard[0], 0.0, coefficients)
    wanted = jnp.where(coefficients > 0, 1.0, 0.0)[None]
    return jnp.where((hard & (features != wanted)).any(axis=1), -jnp.inf, log_a + soft)


class MomentFit(NamedTuple):
    """Coefficients of an exponential family, and how far they can be trusted.

    Attributes:
        coefficients: λ; ±inf for a Boolean feature whose moment is exactly 1 or 0, a hard constraint.
        std_error: of λ, from the spread of the samples; NaN where λ is infinite.
        residual: the moments reached minus those asked for.
        ess: effective sample size of the tilted samples: near 1, the fit rests on a single one.
        log_z: log E_a[exp(λ·φ)], with the hard constraints inside the mean.
        steps: Newton steps taken.
        converged: whether the residual is within the tolerance.
        unreachable: features whose moment is not strictly inside the range of what the samples have: one that never fires,
            say. Moments that no mixture of samples has, each for itself in range, show as ``converged`` False.
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
    tolerance: float | None = None,
    max_steps: int = 100,
    axis_name: str | None = None,
) -> MomentFit:
    """Finds λ with E_p[φ] = μ̄ for p ∝ a·exp(λ·φ), from samples of the base model.

    Newton's method on the convex dual, min_λ log E_a[exp(λ·(φ - μ̄))], with halved steps where a whole one would not
    descend. Nothing here diverges: what cannot be fitted comes back finite, and says so.

    Args:
        features: φ of each sample, computed once.
        moments: μ̄. Exactly 0 or 1 for a feature that is always 0 or 1 means the hard constraint.
        log_weights: log a/q if the samples are of q, or log-probabilities of a listed space; None means all equal.
        tolerance: of the moments, in standard deviations of the feature; None means 1e-10 in float64, 1e-5 in float32.
        max_steps: Newton steps at most.
        axis_name: mapped axis over which the samples are spread.

    Returns:
        A `MomentFit`. Standard errors are those of a sandwich estimator, in which the weights count as samples of q.

    Raises:
        ValueError: if there is not one moment a feature.

    >>> fit = fit_coefficients(jnp.array([[1.0], [0.0], [0.0], [0.0]]), jnp.array([0.5]))
    >>> bool(fit.converged), round(float(fit.coefficients[0]), 4)                        # logit 0.5 - logit 0.25
    (True, 1.0986)

    Source: Khalifa et al. 2021, section 2.2, by Newton's method in place of gradient descent.
    """
    if features.shape[1] != moments.shape[0]:
        raise ValueError(f"One moment a feature: got {features.shape[1]} features and {moments.shape[0]} moments.")
    tolerance = tolerance or (1e-10 if features.dtype == jnp.float64 else 1e-5)
    log_weights = jnp.zeros_like(features[:, 0]) if log_weights is None else log_weights
    features, log_weights = gather(features, axis_name), gather(log_weights, axis_name)
    log_weights = log_weights - jax.nn.logsumexp(log_weights)
    hard, unreachable, log_base, satisfiable = _constraints(features, moments, log_weights)
    scaled, scale = _standardize(features, moments, log_base, ~hard & ~unreachable)
    solution, steps = _newton(log_base, scaled, tolerance, max_steps)
    std_error, residual, ess, log_tilted = _describe_fit(log_base, scaled, solution)
    soft = solution / scale  # 0 for what is hard or out of reach
    reached = jax.nn.softmax(log_base + scaled @ solution) @ features
    return MomentFit(
        coefficients=jnp.where(hard, jnp.where(moments == 1, jnp.inf, -jnp.inf), soft),
        std_error=jnp.where(hard, jnp.nan, std_error / scale),
        residual=reached - moments,
        ess=ess,
        log_z=log_tilted + soft @ moments,
        steps=steps,
        converged=(jnp.abs(residual) <= tolerance).all() & ~unreachable.any() & satisfiable,
        unreachable=unreachable,
    )


def _constraints(features, moments, log_weights):
    """Which moments are hard, which out of reach; the samples that satisfy all the hard ones; whether there are any."""
    present = ~jnp.isneginf(log_weights)[:, None]
    boolean = (~present | (features == 0) | (features == 1)).all(axis=0)
    hard = boolean & ((moments == 0) | (moments == 1))
    low = jnp.min(jnp.where(present, features, jnp.inf), axis=0)
    high = jnp.max(jnp.where(present, features, -jnp.inf), axis=0)
    outside, at_the_edge = (moments < low) | (moments > high), (moments == low) | (moments == high)
    unreachable = outside | (at_the_edge & ~hard)
    allowed = ~(hard[None] & (features != moments[None])).any(axis=1)
    satisfiable = (allowed & present[:, 0]).any()
    # No sample satisfies them all: the rest is fitted to all samples, and the failure reported.
    log_base = jnp.where(allowed | ~satisfiable, log_weights, -jnp.inf)
    return hard, unreachable, log_base, satisfiable


def _standardize(features, moments, log_base, free):
    """Features minus their moments in units of their spread, and the unit; 0 for those that are not free."""
    shifted = jnp.where(free[None], features - moments[None], 0.0)
    weights = jax.nn.softmax(log_base)
    spread = jnp.sqrt(weights @ (shifted - (weights @ shifted)[None]) ** 2)
    scale = jnp.where(spread > 0, spread, 1.0)
    return shifted / scale[None], scale


def _newton(log_base, features, tolerance, max_steps):
    """Minimises log Σ w exp(λ·φ), where the gradient is the tilted mean and the Hessian the tilted covariance."""
    ridge = 1e-9 if features.dtype == jnp.float64 else 1e-5

    def value(solution):
        return jax.nn.logsumexp(log_base + features @ solution)

    def moments(solution):
        weights = jax.nn.softmax(log_base + features @ solution)
        mean = weights @ features
        return mean, (features.T * weights[None]) @ features - mean[:, None] * mean[None]

    def unfinished(state):
        _, mean, _, steps, stuck = state
        return (jnp.abs(mean) > tolerance).any() & (steps < max_steps) & ~stuck

    def step(state):
        solution, mean, covariance, steps, _ = state
        size = jnp.trace(covariance) / covariance.shape[0]
        direction = -jnp.linalg.solve(covariance + ridge * (size + ridge) * jnp.eye(mean.shape[0]), mean)
        # A limit in standard deviations: moments outside the convex hull pull λ to infinity.
        direction = direction / jnp.maximum(1.0, jnp.abs(direction).max() / 10)
        here = value(solution)
        sizes = 0.5 ** jnp.arange(20, dtype=mean.dtype)
        values = jax.lax.map(lambda scale: value(solution + scale * direction), sizes)
        best = sizes[jnp.argmax(values <= here + 1e-4 * sizes * (mean @ direction) + 4 * jnp.finfo(mean.dtype).eps)]
        solution = solution + best * direction
        return solution, *moments(solution), steps + 1, jnp.abs(best * direction).max() == 0

    start = jnp.zeros_like(features[0])
    mean, covariance = moments(start)
    # "Stuck" is computed, not written down: under shard_map it has to vary over the mesh as it will later.
    state = (start, mean, covariance, jnp.zeros((), jnp.int32), jnp.isnan(mean).any())
    solution, _, _, steps, _ = jax.lax.while_loop(unfinished, step, state)
    return solution, steps


def _describe_fit(log_base, features, solution):
    """Standard errors, remaining gradient, effective sample size and log-sum at the solution."""
    log_tilted = log_base + features @ solution
    weights = jax.nn.softmax(log_tilted)
    mean = weights @ features
    centred = features - mean[None]
    covariance = (centred.T * weights[None]) @ centred
    # A feature without spread has coefficient 0, exactly; the unit on its diagonal only keeps the inverse.
    inverse = jnp.linalg.inv(covariance + jnp.diag(jnp.where(jnp.diag(covariance) > 0, 0.0, 1.0)))
    spread = (centred.T * weights[None] ** 2) @ centred
    ess = ess_of(log_tilted)
    error = jnp.sqrt(jnp.diag(inverse @ spread @ inverse) / (1 - 1 / jnp.maximum(ess, 1 + 1e-6)))
    return error, mean, ess, jax.nn.logsumexp(log_tilted)


def _same_shape(log_a, other, name):
    if log_a.shape != other.shape:
        raise ValueError(f"log_a and {name} describe the same samples, got {log_a.shape}, {other.shape}.")
