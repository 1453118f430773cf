"""Policy-gradient losses: REINFORCE with its baselines, and the clipped family from PPO to GSPO."""

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import (
    as_mask,
    as_token_arrays,
    float_dtype,
    is_concrete,
    one_axis,
    one_number,
    positive,
    renamed,
    same_shape,
)
from fjax._numerics import centred, count, gather
from fjax.policy_gradients.kl import MAX_EXPONENT
from fjax.types import Array, Bool, Float, Int

_Bounds = tuple[float | Float[Array, ""], float | Float[Array, ""]]


def reinforce(
    log_pi: Float[Array, "*n"],
    rewards: Float[Array, "*n"],
    *,
    baseline: float | Float[Array, "*m"] = 0.0,
) -> Float[Array, "*n"]:
    """-(R - B) log π, whose gradient on samples of π is that of -E_π[R].

    Args:
        log_pi: log-probabilities under the policy that was sampled from, in nats; differentiated.
        rewards: R, of each sample.
        baseline: B, a number or one a sample that does not depend on its own reward.

    Raises:
        ValueError: if the shapes differ.

    >>> reinforce(jnp.array([-2.0]), jnp.array([1.5]), baseline=0.5).tolist()
    [2.0]

    Source: Williams 1992.
    """
    log_pi, rewards = same_shape(log_pi=log_pi, rewards=rewards)
    if np.shape(baseline) != ():
        rewards, baseline = same_shape(rewards=rewards, baseline=jnp.asarray(baseline))
    return -jax.lax.stop_gradient(rewards - baseline) * log_pi


def rloo(
    log_pi: Float[Array, "N"], rewards: Float[Array, "N"], *, axis_name: str | None = None
) -> Float[Array, "N"]:
    """REINFORCE whose baseline is the mean reward of the other samples: unbiased.

    `jax.vmap` gives groups. Rewards that differ by rounding only teach nothing: all losses are 0.

    Args:
        log_pi: log-probabilities of the N samples of one prompt, in nats; differentiated.
        rewards: R of each; subtract β `k1` for a KL penalty, whose gradient is exact there.
        axis_name: mapped axis over which the samples are spread; the others on all devices count.

    Raises:
        ValueError: if there is a single sample.

    >>> rloo(jnp.array([-1.0, -1.0]), jnp.array([1.0, 0.0])).tolist()
    [1.0, -1.0]

    Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv 2402.14740).
    """
    log_pi, rewards = one_axis(log_pi=log_pi, rewards=rewards)
    everyone = gather(jax.lax.stop_gradient(rewards), axis_name)
    n = everyone.shape[0]
    if n < 2:
        raise ValueError(
            f"rloo needs at least 2 samples, got {n}: the baseline of each is the mean of the "
            f"others."
        )
    # R_i minus the mean of the others
    return reinforce(log_pi, _own(centred(everyone), axis_name) * (n / (n - 1)))


def group_advantages(
    rewards: Float[Array, "N"],
    *,
    scale: bool = True,
    epsilon: float | Float[Array, ""] = 1e-4,
    axis_name: str | None = None,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """Rewards of one prompt's samples, centred and divided by their spread (GRPO).

    The spread is their standard deviation. Stopped. Neither is free: the mean contains the sample
    itself, which shrinks the gradient by (N - 1)/N, and the division weighs prompts by how sure the
    policy is of them. ``scale=False`` leaves it out (Dr. GRPO). Rewards that are all equal, or
    differ by rounding only, have advantages of exactly 0; so has a group of one.

    Args:
        rewards: R of each sample of one prompt.
        scale: whether to divide by the standard deviation (with N - 1).
        epsilon: ε ≥ 0, added to it.
        axis_name: mapped axis over which the samples are spread.
        where: samples that count; the others have 0.

    Raises:
        ValueError: if ε is negative, or the shapes are not one number a sample.

    >>> group_advantages(jnp.array([1.0, 3.0]), scale=False).tolist()
    [-1.0, 1.0]

    Source: Shao et al. 2024 (GRPO, arXiv 2402.03300), section 4.1; Liu et al. 2025 (Dr. GRPO, arXiv
    2503.20783).
    """
    one_number(epsilon=epsilon)
    if is_concrete(epsilon) and not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}.")
    (rewards,) = one_axis(rewards=rewards)
    where = gather(as_mask(where, rewards), axis_name)
    advantages = centred(gather(jax.lax.stop_gradient(rewards), axis_name), where)
    if scale:
        n = count(advantages, where)
        spread = jnp.sqrt((advantages**2).sum() / jnp.maximum(n - 1, 1))
        advantages = jnp.where(
            spread == 0, 0.0, advantages / jnp.where(spread == 0, 1.0, spread + epsilon)
        )
    return _own(advantages, axis_name)


@renamed(clip="clip_ratio")
def ppo_clip(
    log_pi: Float[Array, "*n"],
    log_q: Float[Array, "*n"],
    advantages: Float[Array, "*n"],
    *,
    clip_ratio: _Bounds = (0.2, 0.2),
    dual_clip: float | Float[Array, ""] | None = None,
) -> Float[Array, "*n"]:
    """-min(ρA, clip(ρ, 1-ε, 1+ε') A) with ρ = π/q: no gradient once the ratio has gone far enough.

    A trust region by hand: off the first step its gradient is that of no fixed objective. The
    exponent of ρ is limited to 80.

    Args:
        log_pi: log-probabilities under the policy, in nats; differentiated.
        log_q: under the policy that was sampled from.
        advantages: A, of each token or sequence; stopped.
        clip_ratio: (ε, ε'), how far below and above 1 the ratio counts.
        dual_clip: c > 1 bounds the loss of a negative advantage by c|A|, however large the ratio.

    Raises:
        ValueError: if ``dual_clip`` is not above 1, ε or ε' is negative, or the shapes differ.

    >>> ppo_clip(jnp.log(jnp.array([1.5, 0.5])), jnp.zeros(2), jnp.array([1.0, 1.0])).tolist()
    [-1.2, -0.5]

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Ye et al. 2020 (arXiv 1912.09729)
    for the dual clip.
    """
    _check_clip(clip_ratio, dual_clip)
    low, high = 1 - clip_ratio[0], 1 + clip_ratio[1]
    log_pi, log_q, advantages = same_shape(log_pi=log_pi, log_q=log_q, advantages=advantages)
    log_q, advantages = jax.lax.stop_gradient((log_q, advantages))
    ratio = jnp.exp(jnp.minimum(log_pi - log_q, MAX_EXPONENT))
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
    if dual_clip is not None:
        gain = jnp.where(advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain)
    return -gain


@renamed(clip="clip_ratio")
def grpo(
    token_log_pi: Float[Array, "N T"],
    token_log_q: Float[Array, "N T"],
    rewards: Float[Array, "N"],
    *,
    clip_ratio: _Bounds = (0.2, 0.2),
    epsilon: float | Float[Array, ""] = 1e-4,
    axis_name: str | None = None,
    where: Bool[Array, "N T"] | Int[Array, "N T"],
) -> Float[Array, "N"]:
    """`ppo_clip` of each token with the group's advantage, averaged a sequence.

    Without a KL term: add β times `divergence_penalty`, whose gradient is right, where the paper
    adds k3, whose is not.

    Args:
        token_log_pi: log-probability of each token under the policy; differentiated.
        token_log_q: under the policy that was sampled from.
        rewards: R of each of the N samples of one prompt.
        clip_ratio: see `ppo_clip`.
        epsilon: see `group_advantages`.
        axis_name: mapped axis over which the samples are spread.
        where: tokens that count; a sequence without any is no sample of the group, and its loss 0.

    Returns:
        One loss a sequence, to be averaged.

    >>> log_pi = jnp.zeros((2, 3))
    >>> grpo(log_pi, log_pi, jnp.array([1.0, 0.0]), where=jnp.ones((2, 3), bool)).round(3).tolist()
    [-0.707, 0.707]

    Source: Shao et al. 2024 (GRPO, arXiv 2402.03300), equation 3.
    """
    token_log_pi, token_log_q, rewards, where = _group(token_log_pi, token_log_q, rewards, where)
    advantages = group_advantages(
        rewards, epsilon=epsilon, axis_name=axis_name, where=where.any(axis=1)
    )
    losses = _clipped_tokens(token_log_pi, token_log_q, advantages, where, clip_ratio)
    return losses.sum(axis=1) / jnp.maximum(where.sum(axis=1), 1)


@renamed(clip="clip_ratio")
def dr_grpo(
    token_log_pi: Float[Array, "N T"],
    token_log_q: Float[Array, "N T"],
    rewards: Float[Array, "N"],
    *,
    max_tokens: int,
    clip_ratio: _Bounds = (0.2, 0.2),
    axis_name: str | None = None,
    where: Bool[Array, "N T"] | Int[Array, "N T"],
) -> Float[Array, "N"]:
    """`grpo` without its two biases.

    Advantages are not scaled, and sums over tokens are divided by a constant.

    Args:
        token_log_pi: log-probability of each token under the policy; differentiated.
        token_log_q: under the policy that was sampled from.
        rewards: R of each of the N samples of one prompt.
        max_tokens: the constant, the longest length there can be.
        clip_ratio: see `ppo_clip`.
        axis_name: mapped axis over which the samples are spread.
        where: tokens that count; a sequence without any is no sample of the group, and its loss 0.

    Returns:
        One loss a sequence, to be averaged.

    >>> log_pi = jnp.zeros((2, 3))
    >>> rewards, where = jnp.array([1.0, 0.0]), jnp.ones((2, 3), bool)
    >>> dr_grpo(log_pi, log_pi, rewards, where=where, max_tokens=6).tolist()
    [-0.25, 0.25]

    Source: Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783), section 3.
    """
    positive(max_tokens=max_tokens)
    token_log_pi, token_log_q, rewards, where = _group(token_log_pi, token_log_q, rewards, where)
    advantages = group_advantages(
        rewards, scale=False, axis_name=axis_name, where=where.any(axis=1)
    )
    return (
        _clipped_tokens(token_log_pi, token_log_q, advantages, where, clip_ratio).sum(axis=1)
        / max_tokens
    )


@renamed(clip="clip_ratio")
def gspo(
    token_log_pi: Float[Array, "N T"],
    token_log_q: Float[Array, "N T"],
    rewards: Float[Array, "N"],
    *,
    clip_ratio: _Bounds = (3e-4, 4e-4),
    epsilon: float | Float[Array, ""] = 1e-4,
    axis_name: str | None = None,
    where: Bool[Array, "N T"] | Int[Array, "N T"],
) -> Float[Array, "N"]:
    """`ppo_clip` with one ratio a sequence, the geometric mean of its tokens'.

    ρ = exp(mean log π/q).

    Args:
        token_log_pi: log-probability of each token under the policy; differentiated.
        token_log_q: under the policy that was sampled from.
        rewards: R of each of the N samples of one prompt.
        clip_ratio: see `ppo_clip`; far tighter than for tokens, as the geometric mean moves little.
        epsilon: see `group_advantages`.
        axis_name: mapped axis over which the samples are spread.
        where: tokens that count; a sequence without any is no sample of the group, and its loss 0.

    >>> log_pi = jnp.zeros((2, 3))
    >>> gspo(log_pi, log_pi, jnp.array([1.0, 0.0]), where=jnp.ones((2, 3), bool)).round(3).tolist()
    [-0.707, 0.707]

    Source: Zheng et al. 2025 (GSPO, arXiv 2507.18071), equations 5 to 7.
    """
    token_log_pi, token_log_q, rewards, where = _group(token_log_pi, token_log_q, rewards, where)
    counted = where.any(axis=1)
    mean = (token_log_pi - token_log_q).sum(axis=1) / jnp.maximum(where.sum(axis=1), 1)
    advantages = group_advantages(rewards, epsilon=epsilon, axis_name=axis_name, where=counted)
    return jnp.where(
        counted, ppo_clip(mean, jnp.zeros_like(mean), advantages, clip_ratio=clip_ratio), 0.0
    )


def _group(token_log_pi, token_log_q, rewards, where):
    """The arrays of a group at the door."""
    token_log_pi, token_log_q, where = as_token_arrays(
        where, token_log_pi=token_log_pi, token_log_q=token_log_q
    )
    if np.shape(rewards) != where.shape[:1]:
        raise ValueError(
            f"rewards must be one number a sequence, {list(where.shape[:1])} for tokens of shape "
            f"{list(where.shape)}; got {list(np.shape(rewards))}. For several groups, map the "
            f"function over them with jax.vmap."
        )
    rewards = jnp.asarray(rewards, float_dtype(token_log_pi, rewards))
    return token_log_pi, jax.lax.stop_gradient(token_log_q), rewards, where


def _clipped_tokens(token_log_pi, token_log_q, advantages, where, clip_ratio):
    losses = ppo_clip(
        token_log_pi,
        token_log_q,
        jnp.broadcast_to(advantages[:, None], where.shape),
        clip_ratio=clip_ratio,
    )
    return jnp.where(where, losses, 0.0)


def _own(everyone, axis_name):
    """The rows of this device, of what `gather` brought together."""
    if axis_name is None:
        return everyone
    return everyone.reshape(jax.lax.axis_size(axis_name), -1)[jax.lax.axis_index(axis_name)]


def _check_clip(clip_ratio, dual_clip):
    for bound in clip_ratio:
        one_number(clip_ratio=bound)
        if is_concrete(bound) and not bound >= 0:
            raise ValueError(
                f"clip_ratio is a pair (ε, ε') of numbers of at least 0, got {clip_ratio}."
            )
    if dual_clip is not None:
        one_number(dual_clip=dual_clip)
        if is_concrete(dual_clip) and not dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, got {dual_clip}.")
