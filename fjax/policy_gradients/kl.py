"""Estimators of KL(π‖a), and what belongs in a loss.

There, value and gradient are both those of the divergence.
"""

import jax
import jax.numpy as jnp

from fjax._checks import as_token_arrays, made, same_shape
from fjax.divergences import FDivergence, reverse_kl
from fjax.surrogates import score_weights
from fjax.types import Array, Bool, Float, Int

MAX_EXPONENT = 80.0  # e^80 is still a float32


def k1(log_pi: Float[Array, "*n"], log_a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Log π/a, whose mean over x ~ π is KL(π‖a): unbiased, often negative.

    Stopped: it has no gradient. As a *reward*, -β k1, its policy gradient is exactly -β ∇KL(π‖a).
    As a loss, differentiated, its expected gradient would be 0.

    Args:
        log_pi: log-probabilities of samples of the policy, in nats; of sequences or of tokens.
        log_a: the same under the base model.

    >>> k1(jnp.array([-1.0]), jnp.array([-1.5])).tolist()
    [0.5]

    Source: Schulman 2020; mathematics: definition of KL.
    """
    return _log_ratio(log_pi, log_a)


def k2(log_pi: Float[Array, "*n"], log_a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """½(log π/a)², a biased estimate of KL(π‖a) for x ~ π, never negative.

    Stopped: it has no gradient. Differentiated as a loss, on-policy, it would give exactly
    ∇KL(π‖a), though its value is another.

    Args:
        log_pi: log-probabilities of samples of the policy, in nats.
        log_a: the same under the base model.

    >>> k2(jnp.array([-1.0]), jnp.array([-2.0])).tolist()
    [0.5]

    Source: Schulman 2020.
    """
    return 0.5 * _log_ratio(log_pi, log_a) ** 2


def k3(log_pi: Float[Array, "*n"], log_a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """a/π - 1 - log a/π, whose mean over x ~ π is KL(π‖a): unbiased, never negative.

    Stopped: it has no gradient. Differentiated as a loss, on-policy, it would give ∇KL(a‖π), the
    opposite direction. The exponent is limited to 80, which biases where the base is more than e^80
    times as probable.

    Args:
        log_pi: log-probabilities of samples of the policy, in nats.
        log_a: the same under the base model.

    >>> round(float(k3(jnp.array(-1.0), jnp.array(-2.0))), 4)
    0.3679

    Source: Schulman 2020.
    """
    return k_estimator(log_pi, log_a, divergence=reverse_kl())


def k_estimator(
    log_pi: Float[Array, "*n"], log_a: Float[Array, "*n"], *, divergence: FDivergence
) -> Float[Array, "*n"]:
    """The k3 of any f, whose mean over x ~ π is D_f(π‖a). Stopped.

    [f(u) - f'(1)(u - 1)]/u with u = π/a. Unbiased and never negative: f(u) lies above its tangent
    at 1. For reverse KL it is `k3`.

    Args:
        log_pi: log-probabilities of samples of the policy, in nats.
        log_a: the same under the base model.
        divergence: which f.

    >>> from fjax import total_variation
    >>> log_pi, log_a = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
    >>> k_estimator(log_pi, log_a, divergence=total_variation()).tolist()
    [0.25]

    Source: Schulman 2020, last section (Bregman divergence of f at 1).
    """
    made(divergence)
    log_u = _log_ratio(log_pi, log_a)
    slope = divergence.derivative(jnp.zeros_like(log_u))
    tangent = -jnp.expm1(jnp.minimum(-log_u, MAX_EXPONENT))  # (u - 1)/u
    return jnp.maximum(divergence.integrand(log_u) - slope * tangent, 0.0)


def divergence_penalty(
    log_pi: Float[Array, "*n"],
    log_a: Float[Array, "*n"],
    log_q: Float[Array, "*n"] | None = None,
    *,
    divergence: FDivergence,
    clip: tuple[float, float] | None = None,
) -> Float[Array, "*n"]:
    """A term of a loss with the value and the gradient of D_f(π‖a), both unbiased.

    The value is (π/q) k with the never negative k of `k_estimator`, the gradient (π/q)(f'(π/a) -
    f'(1)) ∇log π.

    On sequence log-probabilities this is the divergence of the two models. On token
    log-probabilities it is the sum of the divergences of the next-token distributions at the
    prefixes that were visited; its gradient holds the prefixes fixed, and off-policy the ratio is
    that of each token. For KL per token *with* the effect on later prefixes there is
    `kl_reward_to_go`.

    Args:
        log_pi: log-probabilities under the policy, in nats; differentiated.
        log_a: under the base model (or any other second distribution); a constant.
        log_q: under the distribution that was sampled from; None means on-policy.
        divergence: which f; `fjax.reverse_kl` for the usual penalty.
        clip: bounds of f' - f'(1), see `fjax.score_weights`. Biases.

    >>> from fjax import reverse_kl
    >>> log_a = jnp.array([-2.0])
    >>> def loss(log_pi):
    ...     return divergence_penalty(log_pi, log_a, divergence=reverse_kl()).sum()
    >>> gradient = jax.grad(loss)(jnp.array([-1.0]))
    >>> gradient.tolist()
    [1.0]

    Source: Go et al. 2023, theorem 1, with p = a; centring: E_π[∇log π] = 0.
    """
    log_pi, log_a, log_q = same_shape(log_pi=log_pi, log_a=log_a, log_q=log_q)
    shape = log_pi.shape
    log_pi, log_a = log_pi.ravel(), log_a.ravel()
    log_q = None if log_q is None else log_q.ravel()
    weights = score_weights(log_pi, log_a, log_q, divergence=flat_at_one(divergence), clip=clip)
    ratio = 1.0 if log_q is None else jnp.exp(jax.lax.stop_gradient(log_pi - log_q))
    value = ratio * k_estimator(log_pi, log_a, divergence=divergence)
    return (value + gradient_only(weights, log_pi)).reshape(shape)


def kl_reward_to_go(
    token_log_pi: Float[Array, "N T"],
    token_log_a: Float[Array, "N T"],
    *,
    where: Bool[Array, "N T"] | Int[Array, "N T"],
) -> Float[Array, "N T"]:
    """KL(π‖a) of whole sequences, token by token, with a gradient of less variance.

    The gradient of its sum is ∇KL(π‖a). stop[Σ_{s≥t} log π_s/a_s]·log π_t: what a token is charged
    with is the log-ratio from it on, for it cannot have caused what came before. On-policy. The
    value of each entry is log π_t/a_t, so their sum estimates KL(π‖a).

    Less variance is that of KL alone. Where the policy has moved for a reward, log π/a of the whole
    sequence is high where the reward is, and their difference varies little: added to a reward with
    one number for a baseline, the part of it before the token is missed. A baseline that knows the
    tokens before makes the two equal (the measurement: docs/noise.md).

    Args:
        token_log_pi: log-probability of each token under the policy; differentiated.
        token_log_a: under the base model.
        where: tokens that count.

    >>> where = jnp.array([[True, True]])
    >>> token_log_a = jnp.array([[-2.0, -2.0]])
    >>> gradient = jax.grad(lambda x: kl_reward_to_go(x, token_log_a, where=where).sum())
    >>> gradient(jnp.array([[-1.0, -1.0]])).tolist()
    [[2.0, 1.0]]

    Source: chain rule of KL; Sutton et al. 1999 for the reward to go.
    """
    token_log_pi, token_log_a, where = as_token_arrays(
        where, token_log_pi=token_log_pi, token_log_a=token_log_a
    )
    log_ratio = _log_ratio(token_log_pi, token_log_a)
    to_go = jnp.cumsum(log_ratio[:, ::-1], axis=1)[:, ::-1]
    return log_ratio + gradient_only(jnp.where(where, to_go, 0.0), token_log_pi)


def _log_ratio(log_pi, log_a):
    log_pi, log_a = same_shape(log_pi=log_pi, log_a=log_a)
    return jax.lax.stop_gradient(log_pi - log_a)


def flat_at_one(divergence: FDivergence) -> FDivergence:
    """The same divergence with f'(1) = 0: f(t) - f'(1)(t - 1)."""
    made(divergence)
    slope = divergence.derivative
    return divergence._replace(derivative=lambda log_t: slope(log_t) - slope(jnp.zeros_like(log_t)))


def gradient_only(weights: Float[Array, "*n"], log_pi: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """0 in value, ``weights · ∇log π`` in gradient."""
    log_pi = jnp.where(weights == 0, 0.0, log_pi)
    return weights * (log_pi - jax.lax.stop_gradient(log_pi))
