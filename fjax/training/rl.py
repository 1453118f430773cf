"""RL with a KL penalty as tuners with the interface of `fjax.fdpg`: what f-DPG is compared with.

Both maximise E_π[r] - β KL(π‖a), with the penalty inside the reward as k1, where its gradient is
exact. In terms of the target P = a·exp(r/β) the whole reward is (r - β log π/a)/β = log P - log π,
so a `Rollout` holds all that is needed, and any target with P > 0 everywhere may take the place of
a reward. At the optimum π = P/Z, as for reverse KL.

Source: Ahmadian et al. 2024 (RLOO, arXiv 2402.14740); Schulman et al. 2017 (PPO, arXiv 1707.06347);
Ziegler et al. 2019.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fjax import policy_gradients
from fjax._checks import renamed
from fjax._numerics import map_contexts
from fjax._sharding import together
from fjax.divergences import reverse_kl
from fjax.estimators import RunningLogMean, running_log_mean
from fjax.surrogates import leave_one_out
from fjax.training._doors import as_log_probs, check_counts, check_options, checked_rollout
from fjax.training._update import (
    advance,
    describe,
    make_init,
    norm,
    pull_back,
    score,
    told,
    update_log_z,
)
from fjax.training.base import Rollout, StepInfo, TrainState, Tuner
from fjax.types import Array, Bool, Float, Int, LogProbFn, Params, TokenLogProbFn

# A reward is the difference of two sums over tokens; each is wrong by some units in its last place.
_ROUNDINGS = 16


def rloo_tuner(
    log_prob_fn: LogProbFn,
    optimizer: optax.GradientTransformation,
    *,
    log_z: RunningLogMean = running_log_mean(),
    microbatch_size: int | None = None,
    num_contexts: int | None = None,
) -> Tuner:
    """REINFORCE with a leave-one-out baseline and the KL penalty as k1 in the reward.

    The loss is the mean of -(R_i - B_i) log π(x_i). R = log P - log π, stopped. The gradient
    estimates that of KL(π‖p), without bias and whatever Z is: sample for sample it is that of
    `fjax.fdpg` with reverse KL on the policy's own samples. Those of another q are weighted with
    π/q, which is 1 for the policy's own; far from them ``importance_ess`` is small, and the
    gradient noise. Where the R of a row differ by no more than rounding, the gradient is exactly 0.

    Args:
        log_prob_fn: the policy, ``(params, tokens, where) -> log π``, one number a sequence.
        optimizer: any optax transformation.
        log_z: how log Z is tracked, for the figures of `StepInfo` alone.
        microbatch_size: see `fjax.fdpg`.
        num_contexts: see `fjax.fdpg`; baselines are of one row each.

    Raises:
        ValueError: as of `fjax.fdpg`.

    >>> from fjax import enumeration
    >>> log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 2)
    >>> tuner = rloo_tuner(log_prob_fn, optax.adam(0.1))
    >>> state = tuner.init(jnp.zeros((prefixes, 3)))
    >>> tokens, where = enumeration.sequences(3, 2, eos_id=0)
    >>> log_q = log_prob_fn(state.params, tokens, where)
    >>> log_score = log_q + (tokens == 1).any(1)
    >>> state, info = tuner.update(state, Rollout(tokens, where, log_q, log_score))
    >>> int(state.step), bool(info.finite)
    (1, True)

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 3; Korbak et al. 2022 (arXiv
    2205.11275) for P.
    """
    check_options(
        optimizer=optimizer, log_z=log_z, microbatch_size=microbatch_size, num_contexts=num_contexts
    )
    log_prob_fn = as_log_probs(log_prob_fn)

    def update(state: TrainState, rollout: Rollout) -> tuple[TrainState, StepInfo]:
        rollout = checked_rollout(rollout, num_contexts)
        z_state, scores = update_log_z(log_z, state.log_z, rollout, num_contexts)

        def weigh(log_pi: Float[Array, "M"]) -> Float[Array, "M"]:
            return -_advantages(log_pi, rollout).ravel() / log_pi.size

        log_pi, weights, grads = pull_back(
            log_prob_fn, state.params, rollout.tokens, rollout.where, weigh, microbatch_size
        )
        info = describe(log_pi, scores, weights, grads, divergence=reverse_kl())
        return advance(state, grads, optimizer, finite=info.finite, log_z=z_state), info

    return Tuner(make_init(optimizer, log_z, num_contexts), update, reverse_kl())


@renamed(clip="clip_ratio")
def ppo_tuner(
    token_log_prob_fn: TokenLogProbFn,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int = 2,
    minibatches: int = 4,
    clip_ratio: tuple[float | Float[Array, ""], float | Float[Array, ""]] = (0.2, 0.2),
    log_z: RunningLogMean = running_log_mean(),
    microbatch_size: int | None = None,
    num_contexts: int | None = None,
) -> Tuner:
    """PPO without a critic: ``epochs`` passes over the samples in minibatches.

    The loss of a token is `fjax.policy_gradients.ppo_clip`. The advantage of all tokens of a sample
    is π/q·(R_i - B_i), as of `rloo_tuner`, divided by the standard deviation of the batch, π being
    the policy before the update; the ratios that are clipped are those to this policy. The first
    gradient of an update is that of KL(π‖p) in direction; the later ones, at ratios other than 1,
    are of no fixed objective: that is the trust region. Where the R of each row differ by no more
    than rounding, nothing moves.

    Args:
        token_log_prob_fn: the policy, one number a token; see
            `fjax.log_probs.make_token_log_prob_fn`.
        optimizer: any optax transformation; it is called ``epochs · minibatches`` times an update.
        epochs: passes over the samples.
        minibatches: of a pass; they must divide the number of samples.
        clip_ratio: (ε, ε'), see `fjax.policy_gradients.ppo_clip`.
        log_z: how log Z is tracked, for the figures of `StepInfo` alone.
        microbatch_size: samples of a minibatch that go through the policy at once, see `fjax.fdpg`.
        num_contexts: see `fjax.fdpg`; baselines are of one row each.

    Raises:
        ValueError: as of `fjax.fdpg`; at trace time, if the samples cannot be divided into
            minibatches.

    >>> from fjax import enumeration, log_probs
    >>> uniform = lambda params, tokens, where=None, *, start=0: params[tokens[:, start:]]
    >>> tuner = ppo_tuner(log_probs.make_token_log_prob_fn(uniform), optax.adam(0.1), minibatches=2)
    >>> state = tuner.init(jnp.zeros((3, 3)))
    >>> tokens, where = jnp.array([[0, 1, 2], [0, 2, 0]]), jnp.array([[False, True, True]] * 2)
    >>> log_q = 2 * jnp.log(jnp.array([1 / 3, 1 / 3]))
    >>> log_score = log_q + jnp.array([1.0, 0.0])
    >>> state, info = tuner.update(state, Rollout(tokens, where, log_q, log_score))
    >>> int(state.step), bool(info.finite)
    (1, True)

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Ahmadian et al. 2024 for the
    baseline in place of a critic.
    """
    check_options(
        optimizer=optimizer, log_z=log_z, microbatch_size=microbatch_size, num_contexts=num_contexts
    )
    check_counts(epochs=epochs, minibatches=minibatches)
    token_log_prob_fn = as_log_probs(token_log_prob_fn, of_tokens=True)

    def update(state: TrainState, rollout: Rollout) -> tuple[TrainState, StepInfo]:
        rollout = checked_rollout(rollout, num_contexts)
        z_state, scores = update_log_z(log_z, state.log_z, rollout, num_contexts)
        samples = _all_samples(token_log_prob_fn, state.params, rollout, microbatch_size)
        one_minibatch = _one_minibatch(
            token_log_prob_fn, optimizer, clip_ratio, microbatch_size, samples
        )
        log_pi, advantages = samples.old.sum(-1), samples.advantages
        rows = _minibatches(state.step, log_pi.size, epochs, minibatches)
        moved, figures = jax.lax.scan(one_minibatch, state, rows)
        info = describe(log_pi, scores, -advantages / advantages.size, {}, divergence=reverse_kl())
        info = _with_minibatches(info, *figures)
        kept = jax.tree.map(
            lambda new, old: jnp.where(info.finite, new, old), moved._replace(log_z=z_state), state
        )
        return kept._replace(step=state.step + 1), info

    return Tuner(make_init(optimizer, log_z, num_contexts), update, reverse_kl())


class _Samples(NamedTuple):
    """All samples of an update, and what the policy before it says of each."""

    tokens: Int[Array, "M T"]
    where: Bool[Array, "M T"]
    old: Float[Array, "M T"]
    advantages: Float[Array, "M"]


def _all_samples(
    token_log_prob_fn: TokenLogProbFn, params: Params, rollout: Rollout, microbatch_size: int | None
) -> _Samples:
    tokens, where = (together(x).reshape(-1, x.shape[-1]) for x in (rollout.tokens, rollout.where))
    old = score(token_log_prob_fn, params, tokens, where, microbatch_size)
    advantages = _advantages(old.sum(-1), rollout).ravel()
    advantages = advantages / (jnp.std(advantages) + 1e-6)
    return _Samples(tokens, where, old, advantages)


def _one_minibatch(
    token_log_prob_fn: TokenLogProbFn,
    optimizer: optax.GradientTransformation,
    clip_ratio: tuple[Any, Any],
    microbatch_size: int | None,
    samples: _Samples,
) -> Callable:
    """(state, rows) -> the state one step on, and its figures.

    These are the norm of the gradient, tokens beyond a bound, and tokens.
    """

    def step(state: TrainState, rows: Int[Array, "B"]):
        tokens, counted, old, advantages = (x[rows] for x in samples)

        def loss(new: Float[Array, "B T"]) -> Float[Array, ""]:
            gain = jnp.where(counted, advantages[:, None], 0.0)
            losses = policy_gradients.ppo_clip(new, old, gain, clip_ratio=clip_ratio)
            return losses.sum(-1).mean()

        new, _, grads = pull_back(
            token_log_prob_fn, state.params, tokens, counted, jax.grad(loss), microbatch_size
        )
        ratio, grad_norm = jnp.exp(new - old), norm(grads)
        outside = ((ratio < 1 - clip_ratio[0]) | (ratio > 1 + clip_ratio[1])) & counted
        finite = jnp.isfinite(grad_norm)
        moved = advance(state, grads, optimizer, finite=finite, log_z=state.log_z)
        return moved, (grad_norm, outside.sum(), counted.sum())

    return step


def _with_minibatches(info: StepInfo, norms: Array, outside: Array, counted: Array) -> StepInfo:
    """The figures of an update, with those of its minibatches."""
    return info._replace(
        grad_norm=norms.mean(),
        clipped_fraction=outside.sum() / jnp.maximum(counted.sum(), 1),
        finite=info.finite & jnp.isfinite(norms).all(),
    )


def _advantages(log_pi: Float[Array, "M"], rollout: Rollout) -> Float[Array, "C N"]:
    """π/q · (R - B): R = log P - log π, stopped, and B the mean of the row's others."""
    log_pi = jax.lax.stop_gradient(log_pi).reshape(rollout.log_q.shape)
    rewards = map_contexts(_rewards)(log_pi, rollout.log_score)
    others = map_contexts(lambda rewards, strata: told(leave_one_out, strata, rewards)(rewards))(
        rewards, rollout.strata
    )
    return (rewards - others) * jnp.exp(log_pi - rollout.log_q)


def _rewards(log_pi: Float[Array, "N"], log_score: Float[Array, "N"]) -> Float[Array, "N"]:
    """Log P - log π, all the same where they differ by no more than rounding.

    That would else be scaled to full size.
    """
    rewards = log_score - log_pi
    largest = jnp.maximum(abs(log_score), abs(log_pi)).max()
    rounding = _ROUNDINGS * jnp.finfo(rewards.dtype).eps * largest
    alike = jnp.isfinite(largest) & (rewards.max() - rewards.min() <= rounding)
    return jnp.where(alike, rewards[0], rewards)


def _minibatches(
    step: Int[Array, ""], samples: int, epochs: int, minibatches: int
) -> Int[Array, "M B"]:
    """Rows of each minibatch, shuffled anew each epoch.

    A function of the step, so that a resumed run repeats them.
    """
    if samples % minibatches:
        raise ValueError(
            f"{samples} samples cannot be divided into {minibatches} minibatches; choose a divisor."
        )
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), epochs)
    orders = jax.vmap(lambda key: jax.random.permutation(key, samples))(keys)
    return orders.reshape(epochs * minibatches, -1)
