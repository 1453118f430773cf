"""The RLHF side: what estimates KL(π‖a) well, what has its gradient, and the usual policy-gradient losses.

An estimator of a *value* and a loss with the right *gradient* are two things. Differentiating k1, k2 or k3 as a loss gives,
on-policy: nothing, ∇KL(π‖a), and ∇KL(a‖π); off-policy, without a ratio, none of them anything useful. So the k's here are
stopped, and `divergence_penalty` is what goes into a loss (docs/kl_gradients.md has the table).

Losses are unreduced and to be minimised. Log-probabilities named ``token_…`` are ``[N, T]`` with a mask ``where``; the others
are of whole sequences, or of anything else that was sampled: the functions are elementwise unless they say otherwise.

Source: Schulman 2020 (note on approximating KL); Korbak et al. 2022 (arXiv 2205.11275); Go et al. 2023, section 3.2.
"""

import jax
import jax.numpy as jnp

from fjax._typing import Array, Bool, Float
from fjax.divergences import FDivergence, reverse_kl
from fjax.surrogates import leave_one_out, score_weights

__all__ = [
    "divergence_penalty",
    "dr_grpo",
    "f_regularized_optimum",
    "f_trajectory_balance",
    "group_advantages",
    "grpo",
    "gspo",
    "k1",
    "k2",
    "k3",
    "k_estimator",
    "kl_reward_to_go",
    "ppo_clip",
    "reinforce",
    "rloo",
    "trajectory_balance",
]

_MAX_EXPONENT = 80.0  # e^80 is still a float32


def k1(log_pi: Float[Array, "*n"], log_a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Log π/a, whose mean over x ~ π is KL(π‖a): unbiased, often negative. Stopped: it has no gradient.

    As a *reward*, -β k1, its policy gradient is exactly -β ∇KL(π‖a). As a loss, differentiated, its expected gradient
    would be 0.

    Args:
        log_pi: log-probabilities of samples of the policy, in nats; of sequences or of tokens.
        log_a: the same under the base model.

    >>> k1(jnp.array([-1.0]), jnp.array([-1.5])).tolist()
    [0.5]

    Source: Schulman 2020; mathematics: definition of KL.
    """
    return jax.lax.stop_gradient(log_pi - log_a)


def k2(log_pi: Float[Array, "*n"], log_a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """½(log π/a)², a biased estimate of KL(π‖a) for x ~ π, never negative. Stopped: it has no gradient.

    Differentiated as a loss, on-policy, it would give exactly ∇KL(π‖a), though its value is another.

    Args:
        log_pi: log-probabilities of samples of the policy, in nats.
        log_a: the same under the base model.

    >>> k2(jnp.array([-1.0]), jnp.array([-2.0])).tolist()
    [0.5]

    Source: Schulman 2020.
    """
    return 0.5 * jax.lax.stop_gradient(log_pi - log_a) ** 2


def k3(log_pi: Float[Array, "*n"], log_a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """a/π - 1 - log a/π, whose mean over x ~ π is KL(π‖a): unbiased and never negative. Stopped: it has no gradient.

    Differentiated as a loss, on-policy, it would give ∇KL(a‖π), the opposite direction. The exponent is limited to 80, which
    biases where the base is more than e^80 times as probable.

    Args:
        log_pi: log-probabilities of samples of the policy, in nats.
        log_a: the same under the base model.

    >>> round(float(k3(jnp.array(-1.0), jnp.array(-2.0))), 4)
    0.3679

    Source: Schulman 2020.
    """
    return k_estimator(log_pi, log_a, divergence=reverse_kl())


def k_estimator(log_pi: Float[Array, "*n"], log_a: Float[Array, "*n"], *, divergence: FDivergence) -> Float[Array, "*n"]:
    """The k3 of any f: [f(u) - f'(1)(u - 1)]/u with u = π/a, whose mean over x ~ π is D_f(π‖a). Stopped.

    Unbiased and never negative: f(u) lies above its tangent at 1. For reverse KL it is `k3`.

    Args:
        log_pi: log-probabilities of samples of the policy, in nats.
        log_a: the same under the base model.
        divergence: which f.

    >>> from fjax import total_variation
    >>> k_estimator(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), divergence=total_variation()).tolist()
    [0.25]

    Source: Schulman 2020, last section (Bregman divergence of f at 1).
    """
    log_u = jax.lax.stop_gradient(log_pi - log_a)
    slope = divergence.derivative(jnp.zeros_like(log_u))
    tangent = -jnp.expm1(jnp.minimum(-log_u, _MAX_EXPONENT))  # (u - 1)/u
    return jnp.maximum(divergence.integrand(log_u) - slope * tangent, 0.0)


def divergence_penalty(
    log_pi: Float[Array, "*n"],
    log_a: Float[Array, "*n"],
    log_q: Float[Array, "*n"] | None = None,
    *,
    divergence: FDivergence,
    clip: tuple[float, float] | None = None,
) -> Float[Array, "*n"]:
    """A term for a loss, whose value estimates D_f(π‖a) and whose gradient estimates ∇D_f(π‖a), both without bias.

    The value is (π/q) k with the never negative k of `k_estimator`, the gradient (π/q)(f'(π/a) - f'(1)) ∇log π.

    On sequence log-probabilities this is the divergence of the two models. On token log-probabilities it is the sum of the
    divergences of the next-token distributions at the prefixes that were visited; its gradient holds the prefixes fixed,
    and off-policy the ratio is that of each token. For KL per token *with* the effect on later prefixes there is
    `kl_reward_to_go`.

    Args:
        log_pi: log-probabilities under the policy, in nats; differentiated.
        log_a: under the base model (or any other second distribution).
        log_q: under the distribution that was sampled from; None means on-policy.
        divergence: which f; `fjax.reverse_kl` for the usual penalty.
        clip: bounds of f' - f'(1), see `fjax.score_weights`. Biases.

    >>> from fjax import reverse_kl
    >>> log_a = jnp.array([-2.0])
    >>> gradient = jax.grad(lambda x: divergence_penalty(x, log_a, divergence=reverse_kl()).sum())(jnp.array([-1.0]))
    >>> gradient.tolist()
    [1.0]

    Source: Go et al. 2023, theorem 1, with p = a; centring: E_π[∇log π] = 0.
    """
    shape = log_pi.shape
    log_pi, log_a = log_pi.ravel(), log_a.ravel()
    log_q = None if log_q is None else log_q.ravel()
    centred = _centred(divergence)
    weights = score_weights(log_pi, log_a, log_q, divergence=centred, clip=clip)
    ratio = 1.0 if log_q is None else jnp.exp(jax.lax.stop_gradient(log_pi - log_q))
    value = ratio * k_estimator(log_pi, log_a, divergence=divergence)
    return (value + _gradient_only(weights, log_pi)).reshape(shape)


def kl_reward_to_go(
    token_log_pi: Float[Array, "N T"], token_log_a: Float[Array, "N T"], *, where: Bool[Array, "N T"]
) -> Float[Array, "N T"]:
    """KL(π‖a) of whole sequences, token by token: the gradient of its sum is ∇KL(π‖a), of less variance.

    stop[Σ_{s≥t} log π_s/a_s]·log π_t: what a token is charged with is the log-ratio from it on, for it cannot have caused
    what came before. On-policy. The value of each entry is log π_t/a_t, so their sum estimates KL(π‖a).

    Args:
        token_log_pi: log-probability of each token under the policy; differentiated.
        token_log_a: under the base model.
        where: tokens that count.

    >>> where = jnp.array([[True, True]])
    >>> gradient = jax.grad(lambda x: kl_reward_to_go(x, jnp.array([[-2.0, -2.0]]), where=where).sum())
    >>> gradient(jnp.array([[-1.0, -1.0]])).tolist()
    [[2.0, 1.0]]

    Source: chain rule of KL; Sutton et al. 1999 for the reward to go.
    """
    log_ratio = jnp.where(where, jax.lax.stop_gradient(token_log_pi - token_log_a), 0.0)
    to_go = jnp.cumsum(log_ratio[:, ::-1], axis=1)[:, ::-1]
    return log_ratio + _gradient_only(jnp.where(where, to_go, 0.0), token_log_pi)


def reinforce(
    log_pi: Float[Array, "*n"], rewards: Float[Array, "*n"], *, baseline: float | Float[Array, "*m"] = 0.0
) -> Float[Array, "*n"]:
    """-(R - B) log π, whose gradient on samples of π is that of -E_π[R].

    Args:
        log_pi: log-probabilities under the policy that was sampled from, in nats; differentiated.
        rewards: R, of each sample.
        baseline: B, a number or one a sample that does not depend on its own reward.

    >>> reinforce(jnp.array([-2.0]), jnp.array([1.5]), baseline=0.5).tolist()
    [2.0]

    Source: Williams 1992.
    """
    return -jax.lax.stop_gradient(rewards - baseline) * log_pi


def rloo(log_pi: Float[Array, "N"], rewards: Float[Array, "N"]) -> Float[Array, "N"]:
    """REINFORCE whose baseline is the mean reward of the other samples: unbiased. `jax.vmap` gives groups.

    Args:
        log_pi: log-probabilities of the N samples of one prompt, in nats; differentiated.
        rewards: R of each; subtract β `k1` for a KL penalty, whose gradient is exact there.

    Raises:
        ValueError: if there is a single sample.

    >>> rloo(jnp.array([-1.0, -1.0]), jnp.array([1.0, 0.0])).tolist()
    [1.0, -1.0]

    Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv 2402.14740).
    """
    return reinforce(log_pi, rewards, baseline=leave_one_out(rewards))


def group_advantages(rewards: Float[Array, "N"], *, scale: bool = True, epsilon: float = 1e-4) -> Float[Array, "N"]:
    """Rewards of one prompt's samples, centred on their mean and divided by their standard deviation (GRPO).

    Neither is free: the mean contains the sample itself, which shrinks the gradient by (N - 1)/N, and the division weighs
    prompts by how sure the policy is of them. ``scale=False`` leaves it out (Dr. GRPO).

    Args:
        rewards: R of each sample of one prompt.
        scale: whether to divide by the standard deviation (with N - 1).
        epsilon: added to it.

    >>> group_advantages(jnp.array([1.0, 3.0]), scale=False).tolist()
    [-1.0, 1.0]

    Source: Shao et al. 2024 (GRPO, arXiv 2402.03300), section 4.1; Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783).
    """
    centred = rewards - rewards.mean()
    if not scale:
        return centred
    return centred / (jnp.std(rewards, ddof=1) + epsilon)


def ppo_clip(
    log_pi: Float[Array, "*n"],
    log_q: Float[Array, "*n"],
    advantages: Float[Array, "*n"],
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
) -> Float[Array, "*n"]:
    """-min(ρA, clip(ρ, 1-ε, 1+ε') A) with ρ = π/q: no gradient once the ratio has gone far enough.

    A trust region by hand: off the first step its gradient is that of no fixed objective. The exponent of ρ is limited to
    80.

    Args:
        log_pi: log-probabilities under the policy, in nats; differentiated.
        log_q: under the policy that was sampled from.
        advantages: A, of each token or sequence; stopped.
        clip: (ε, ε'), below and above 1.
        dual_clip: c > 1 bounds the loss of a negative advantage by c|A|, however large the ratio.

    Raises:
        ValueError: if ``dual_clip`` is not above 1.

    >>> ppo_clip(jnp.log(jnp.array([1.5, 0.5])), jnp.zeros(2), jnp.array([1.0, 1.0])).tolist()
    [-1.2, -0.5]

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Ye et al. 2020 (arXiv 1912.09729) for the dual clip.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}.")
    advantages = jax.lax.stop_gradient(advantages)
    ratio = jnp.exp(jnp.minimum(log_pi - jax.lax.stop_gradient(log_q), _MAX_EXPONENT))
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip[0], 1 + clip[1]) * advantages)
    if dual_clip is not None:
        gain = jnp.where(advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain)
    return -gain


def grpo(
    token_log_pi: Float[Array, "N T"],
    token_log_q: Float[Array, "N T"],
    rewards: Float[Array, "N"],
    *,
    where: Bool[Array, "N T"],
    clip: tuple[float, float] = (0.2, 0.2),
    epsilon: float = 1e-4,
) -> Float[Array, "N"]:
    """`ppo_clip` of each token with the group's advantage, averaged over the tokens of each sequence.

    Without a KL term: add β times `divergence_penalty`, whose gradient is right, where the paper adds k3, whose is not.

    Args:
        token_log_pi: log-probability of each token under the policy; differentiated.
        token_log_q: under the policy that was sampled from.
        rewards: R of each of the N samples of one prompt.
        where: tokens that count.
        clip: see `ppo_clip`.
        epsilon: see `group_advantages`.

    Returns:
        One loss a sequence, to be averaged.

    >>> log_pi = jnp.zeros((2, 3))
    >>> grpo(log_pi, log_pi, jnp.array([1.0, 0.0]), where=jnp.ones((2, 3), bool)).round(3).tolist()
    [-0.707, 0.707]

    Source: Shao et al. 2024 (GRPO, arXiv 2402.03300), equation 3.
    """
    advantages = group_advantages(rewards, epsilon=epsilon)[:, None]
    losses = ppo_clip(token_log_pi, token_log_q, jnp.broadcast_to(advantages, where.shape), clip=clip)
    return jnp.where(where, losses, 0.0).sum(axis=1) / jnp.maximum(where.sum(axis=1), 1)


def dr_grpo(
    token_log_pi: Float[Array, "N T"],
    token_log_q: Float[Array, "N T"],
    rewards: Float[Array, "N"],
    *,
    where: Bool[Array, "N T"],
    max_tokens: int,
    clip: tuple[float, float] = (0.2, 0.2),
) -> Float[Array, "N"]:
    """`grpo` without its two biases: advantages are not scaled, and sums over tokens are divided by a constant.

    Args:
        token_log_pi: log-probability of each token under the policy; differentiated.
        token_log_q: under the policy that was sampled from.
        rewards: R of each of the N samples of one prompt.
        where: tokens that count.
        max_tokens: the constant, the longest length there can be.
        clip: see `ppo_clip`.

    Returns:
        One loss a sequence, to be averaged.

    >>> log_pi = jnp.zeros((2, 3))
    >>> dr_grpo(log_pi, log_pi, jnp.array([1.0, 0.0]), where=jnp.ones((2, 3), bool), max_tokens=6).tolist()
    [-0.25, 0.25]

    Source: Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783), section 3.
    """
    advantages = group_advantages(rewards, scale=False)[:, None]
    losses = ppo_clip(token_log_pi, token_log_q, jnp.broadcast_to(advantages, where.shape), clip=clip)
    return jnp.where(where, losses, 0.0).sum(axis=1) / max_tokens


def gspo(
    token_log_pi: Float[Array, "N T"],
    token_log_q: Float[Array, "N T"],
    rewards: Float[Array, "N"],
    *,
    where: Bool[Array, "N T"],
    clip: tuple[float, float] = (3e-4, 4e-4),
    epsilon: float = 1e-4,
) -> Float[Array, "N"]:
    """`ppo_clip` with one ratio a sequence, the geometric mean of its tokens': ρ = exp(mean log π/q).

    Args:
        token_log_pi: log-probability of each token under the policy; differentiated.
        token_log_q: under the policy that was sampled from.
        rewards: R of each of the N samples of one prompt.
        where: tokens that count.
        clip: see `ppo_clip`; the geometric mean moves little, so it is far tighter than a token's.
        epsilon: see `group_advantages`.

    >>> log_pi = jnp.zeros((2, 3))
    >>> gspo(log_pi, log_pi, jnp.array([1.0, 0.0]), where=jnp.ones((2, 3), bool)).round(3).tolist()
    [-0.707, 0.707]

    Source: Zheng et al. 2025 (GSPO, arXiv 2507.18071), equations 5 to 7.
    """
    log_ratio = jnp.where(where, token_log_pi - jax.lax.stop_gradient(token_log_q), 0.0)
    mean = log_ratio.sum(axis=1) / jnp.maximum(where.sum(axis=1), 1)
    return ppo_clip(mean, jnp.zeros_like(mean), group_advantages(rewards, epsilon=epsilon), clip=clip)


def trajectory_balance(
    log_pi: Float[Array, "N"], log_score: Float[Array, "N"], log_z: Float[Array, ""] | None = None
) -> Float[Array, "N"]:
    """½(log Z + log π - log P)²: zero where π = P/Z, whatever the samples are from.

    On samples of π its gradient is that of KL(π‖p); on those of any other q, that of another loss with the same optimum.
    For RLHF, ``log_score`` is log a + r/β (`fjax.targets.reward_tilted`).

    Args:
        log_pi: log-probabilities under the policy, in nats; differentiated.
        log_score: unnormalised log P(x), finite.
        log_z: log Z; None means the mean of log P - log π over these samples, stopped (VarGrad). That mean contains the
            sample itself, which shrinks the on-policy gradient by (N - 1)/N.

    >>> trajectory_balance(jnp.array([-1.0, -3.0]), jnp.array([1.0, 1.0])).tolist()
    [0.5, 0.5]

    Source: Malkin et al. 2022 (arXiv 2201.13259); Richter et al. 2020 (VarGrad); Bartoldson et al. 2025 (TBA).
    """
    if log_z is None:
        log_z = (log_score - jax.lax.stop_gradient(log_pi)).mean()
    return 0.5 * (log_z + log_pi - log_score) ** 2


def f_trajectory_balance(log_pi: Float[Array, "N"], log_p: Float[Array, "N"], *, divergence: FDivergence) -> Float[Array, "N"]:
    """ψ(log π - log p) with ψ'(d) = f'(e^d) - f'(1): trajectory balance for any f, in its gradient.

    On samples of π its gradient is that of D_f(π‖p). On those of any other q it has no importance weights, hence bounded
    variance, and the same optimum: each term is smallest where π = p. Its value is not ψ's and means nothing; for reverse
    KL `trajectory_balance` has both.

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
    return score_weights(log_pi, log_p, divergence=_centred(divergence)) * log_pi


def f_regularized_optimum(
    log_a: Float[Array, "S"], rewards: Float[Array, "S"], *, beta: float, divergence: FDivergence, steps: int = 200
) -> Float[Array, "S"]:
    """argmax_π E_π[r] - β D_f(π‖a) over a listed space: π*(x) = a(x) (f')^{-1}((r(x) - λ)/β).

    λ is found by bisection, such that π* sums to 1. Where f'(0) is finite, as for Pearson's χ², π* is 0 where the reward is
    too low.

    Args:
        log_a: normalised log-probabilities under the base model, in nats.
        rewards: r(x).
        beta: β > 0.
        divergence: which f; it needs an ``inverse_derivative``.
        steps: of the bisection.

    Returns:
        log π*, -inf where it is 0.

    Raises:
        ValueError: if f has no inverse derivative (total variation: its optimum is not unique), or β is not positive.

    >>> from fjax import reverse_kl
    >>> log_a, rewards = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 3.0]))
    >>> jnp.exp(f_regularized_optimum(log_a, rewards, beta=1.0, divergence=reverse_kl())).round(4).tolist()
    [0.25, 0.75]

    Source: Wang et al. 2024 (f-DPO, arXiv 2309.16240), theorem 1; Huang et al. 2024 for χ².
    """
    inverse = divergence.inverse_derivative
    if inverse is None:
        raise ValueError(f"{divergence.name} has no inverse derivative, and so no optimum in closed form.")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")

    def ratio(shift):
        return inverse((rewards - shift) / beta)

    # At the λ where the best sample alone had a ratio of 1 the sum is at most 1, and where the worst has, at least 1.
    slope = beta * divergence.derivative(jnp.zeros((), log_a.dtype))

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        over = (jnp.exp(log_a) * ratio(middle)).sum() > 1
        return jnp.where(over, middle, low), jnp.where(over, high, middle)

    _, shift = jax.lax.fori_loop(0, steps, halve, (rewards.min() - slope, rewards.max() - slope))
    log_pi = log_a + jnp.log(ratio(shift))
    return log_pi - jax.nn.logsumexp(log_pi)


def _centred(divergence: FDivergence) -> FDivergence:
    """The same divergence with f'(1) = 0: f(t) - f'(1)(t - 1)."""
    return divergence._replace(derivative=lambda log_t: divergence.derivative(log_t) - divergence.derivative(log_t * 0))


def _gradient_only(weights, log_pi):
    """0 in value, ``weights · ∇log π`` in gradient."""
    log_pi = jnp.where(weights == 0, 0.0, log_pi)
    return weights * (log_pi - jax.lax.stop_gradient(log_pi))
