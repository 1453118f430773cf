"""Target distributions, as unnormalised log-scores ``log P(x)`` of samples.

A target is what the policy should become: p = P/Z. Only its log-score at the samples is ever
needed; Z is estimated (`fjax.estimate_log_z`) or, in a tiny space, summed
(`fjax.enumeration.exact_log_z`).

Log-scores add up, so a target of one function is the base of the next:
``pointwise(exponential_family(log_a, ...), b)`` is the base under moments *and* a hard constraint.

Source: Khalifa et al. 2021 (GDC, arXiv 2012.11635); Korbak et al. 2022 (arXiv 2205.11275).
"""

import jax.numpy as jnp
import numpy as np

from fjax._checks import by_feature, float_dtype, one_a_row, positive, same_shape
from fjax._numerics import dot
from fjax.moments import MomentFit, fit_coefficients
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
        ValueError: if the shapes differ.

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
            f"One weight an expert: got {list(np.shape(log_scores))} log-scores and "
            f"{list(np.shape(weights))} weights."
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
    features, coefficients = by_feature(features, coefficients=coefficients)
    log_a = one_a_row(features, log_a=log_a)
    hard = jnp.isinf(coefficients)[None]
    soft = dot(features, jnp.where(hard[0], 0.0, coefficients))
    wanted = jnp.where(coefficients > 0, 1.0, 0.0)[None]
    return jnp.where((hard & (features != wanted)).any(axis=1), -jnp.inf, log_a + soft)


def _satisfied(log_a, satisfied):
    """Log a and b(x) as floats; integers are masks, and count once."""
    satisfied = jnp.asarray(satisfied)
    if not jnp.issubdtype(satisfied.dtype, jnp.floating):
        satisfied = satisfied != 0
    return same_shape(log_a=log_a, satisfied=satisfied)
