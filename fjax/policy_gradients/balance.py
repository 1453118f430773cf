"""Trajectory balance, and the optimum that a penalty of any f leads to."""

import jax
import jax.numpy as jnp

from fjax._checks import made, one_axis, one_number, positive
from fjax._numerics import gather
from fjax.divergences import FDivergence
from fjax.policy_gradients.kl import flat_at_one
from fjax.surrogates import score_weights
from fjax.types import Array, Float

_FARTHEST = 80.0  # sinh of it is still a float32


def trajectory_balance(
    log_pi: Float[Array, "N"],
    log_score: Float[Array, "N"],
    log_z: float | Float[Array, ""] | None = None,
    *,
    axis_name: str | None = None,
) -> Float[Array, "N"]:
    """½(log Z + log π - log P)²: zero where π = P/Z, whatever the samples are from.

    On samples of π its gradient is that of KL(π‖p); on those of any other q, that of another loss
    with the same optimum. For RLHF, ``log_score`` is log a + r/β (`fjax.targets.reward_tilted`).

    Args:
        log_pi: log-probabilities under the policy, in nats; differentiated.
        log_score: unnormalised log P(x), finite.
        log_z: log Z, an estimate and no parameter: it has no gradient, like all but log π. None
            means the mean of log P - log π over these samples (VarGrad). That mean contains the
            sample itself, which shrinks the on-policy gradient by (N - 1)/N.
        axis_name: mapped axis over which the samples of that mean are spread.

    >>> trajectory_balance(jnp.array([-1.0, -3.0]), jnp.array([1.0, 1.0])).tolist()
    [0.5, 0.5]

    Source: Malkin et al. 2022 (arXiv 2201.13259); Richter et al. 2020 (VarGrad); Bartoldson et al.
    2025 (TBA).
    """
    log_pi, log_score = one_axis(log_pi=log_pi, log_score=log_score)
    if log_z is None:
        log_z = gather(log_score - log_pi, axis_name).mean()
    one_number(log_z=log_z)
    log_score, log_z = jax.lax.stop_gradient((log_score, log_z))
    return 0.5 * (log_z + log_pi - log_score) ** 2


def f_trajectory_balance(
    log_pi: Float[Array, "N"], log_p: Float[Array, "N"], *, divergence: FDivergence
) -> Float[Array, "N"]:
    """ψ(log π - log p) with ψ'(d) = f'(e^d) - f'(1): trajectory balance for any f, in its gradient.

    On samples of π its gradient is that of D_f(π‖p). On those of any other q it has no importance
    weights, hence bounded variance, and the same optimum: each term is smallest where π = p. Its
    value is not ψ's and means nothing; for reverse KL `trajectory_balance` has both.

    Args:
        log_pi: log-probabilities under the policy, in nats; differentiated.
        log_p: under the normalised target.
        divergence: which f, strictly convex at 1.

    >>> from fjax import reverse_kl
    >>> loss = lambda x: f_trajectory_balance(x, jnp.array([-3.0]), divergence=reverse_kl()).sum()
    >>> jax.grad(loss)(jnp.array([-1.0])).tolist()
    [2.0]

    Source: Fawkes and Hartford 2026 (f-TB, arXiv 2605.15417).
    """
    log_pi, log_p = one_axis(log_pi=log_pi, log_p=log_p)
    weights = score_weights(log_pi, log_p, divergence=flat_at_one(divergence))
    # As in `fjax.surrogate_loss`: what has no weight is worth 0, and not 0 · -inf.
    return weights * jnp.where(weights == 0, 0.0, log_pi)


def f_regularized_optimum(
    log_a: Float[Array, "S"],
    rewards: Float[Array, "S"],
    *,
    beta: float | Float[Array, ""],
    divergence: FDivergence,
    steps: int = 200,
) -> Float[Array, "S"]:
    """argmax_π E_π[r] - β D_f(π‖a) over a listed space, stopped.

    π*(x) = a(x) (f')^{-1}((r(x) - λ)/β). λ is such that π* sums to 1, found by bisection. Where
    f'(0) is finite, as for Pearson's χ², π* is 0 where the reward is too low.

    Args:
        log_a: normalised log-probabilities under the base model, in nats; -inf is allowed.
        rewards: r(x); -inf is allowed.
        beta: β > 0.
        divergence: which f; it needs an ``inverse_derivative``.
        steps: of the bisection.

    Returns:
        log π*, -inf where it is 0, and only there: the ratio is found in log space where it is too
        large or too small for a float.

    Raises:
        ValueError: if f has no inverse derivative (total variation: its optimum is not unique), β
            is not positive, or the shapes differ.

    >>> from fjax import reverse_kl
    >>> log_a, rewards = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 3.0]))
    >>> optimum = f_regularized_optimum(log_a, rewards, beta=1.0, divergence=reverse_kl())
    >>> jnp.exp(optimum).round(4).tolist()
    [0.25, 0.75]

    Source: Wang et al. 2024 (f-DPO, arXiv 2309.16240), theorem 1; Huang et al. 2024 for χ².
    """
    made(divergence)
    positive(beta=beta)
    log_a, rewards = jax.lax.stop_gradient(one_axis(log_a=log_a, rewards=rewards))
    if divergence.inverse_derivative is None:
        raise ValueError(
            f"{divergence.name} has no inverse derivative, and so no optimum in closed form."
        )
    beta = jax.lax.stop_gradient(jnp.asarray(beta, log_a.dtype))
    possible = ~jnp.isneginf(log_a) & ~jnp.isneginf(rewards)
    best = jnp.max(jnp.where(possible, rewards, -jnp.inf))
    behind = jnp.where(possible, rewards - best, 0.0)

    def unnormalised(top):
        """Log a·ratio, given the log-ratio of the best.

        λ itself would lose it, for r - λ may be e^-120.
        """
        slope = behind / beta + divergence.derivative(top)
        log_ratio = jnp.where(behind == 0, top, _log_ratio(slope, divergence))
        return jnp.where(possible, jnp.where(possible, log_a, 0.0) + log_ratio, -jnp.inf)

    def too_much(top):
        return jax.nn.logsumexp(unnormalised(top)) > 0

    # No ratio is above that of the best, and so it is at least 1; and it cannot have more than all
    # of the mass.
    highest = -jnp.max(jnp.where(possible & (behind == 0), log_a, -jnp.inf))
    top = _bisect(too_much, jnp.zeros_like(highest), highest, steps)
    return jax.nn.log_softmax(unnormalised(top))


def _log_ratio(slope, divergence):
    """Log of (f')^{-1}, in closed form where that is a number, else by bisection."""
    ratio = divergence.inverse_derivative(slope)
    limit = 0.9 * jnp.log(jnp.finfo(ratio.dtype).max)
    ordinary = (ratio > jnp.exp(-limit)) & (ratio < jnp.exp(limit))

    def too_far(x):
        return ~(divergence.derivative(jnp.sinh(x)) < slope)

    # Over arsinh(log t): so few steps reach every exponent, with digits everywhere.
    farthest = jnp.full_like(slope, _FARTHEST)
    low = _bisect(too_far, -farthest, farthest, 64)
    far = jnp.where(
        slope <= divergence.derivative(jnp.full_like(slope, -jnp.inf)), -jnp.inf, jnp.sinh(low)
    )
    return jnp.where(ordinary, jnp.log(jnp.where(ordinary, ratio, 1.0)), far)


def _bisect(over, low, high, steps):
    """The last number, halving each time, that is not ``over`` yet."""

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        beyond = over(middle)
        return jnp.where(beyond, low, middle), jnp.where(beyond, middle, high)

    return jax.lax.fori_loop(0, steps, halve, (low, high))[0]
