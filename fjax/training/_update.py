"""What all online tuners share: the pull-back of weights through log π, the running log Z, and what there is to see."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fjax._typing import Array, Bool, Float, Int, LogProbFn, Params
from fjax.divergences import FDivergence
from fjax.estimators import Estimate, RunningLogMean, effective_sample_size, estimate_divergence
from fjax.surrogates import pseudo_rewards
from fjax.training.rollout import Rollout
from fjax.training.state import TrainState


class StepInfo(NamedTuple):
    """What there is to see of one update; nothing of it is needed for the next.

    Over several contexts ``divergence`` and ``log_z`` are means over those whose Z is known, with the standard error of
    that mean.

    Attributes:
        loss: Σ of the surrogate. Its gradient is the point, its value means nothing.
        grad_norm: of the whole gradient, before the optimiser.
        divergence: D_f(π‖p) of the policy *before* the update, from this batch and the running log Z; NaN while Z is unknown.
        log_z: the running estimate of log Z, this batch included.
        reward_mean: mean pseudo-reward -f'(π/p), after clipping.
        reward_std: its standard deviation over the batch.
        clipped_fraction: share of samples whose f' was clipped (of PPO: tokens whose ratio was); each biases the gradient.
        importance_ess: effective sample size of π/q: N when the samples are the policy's own.
        finite: False if the gradient was not. Then the update left everything but ``step`` as it was.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    divergence: Estimate
    log_z: Estimate
    reward_mean: Float[Array, ""]
    reward_std: Float[Array, ""]
    clipped_fraction: Float[Array, ""]
    importance_ess: Float[Array, ""]
    finite: Bool[Array, ""]


class Tuner(NamedTuple):
    """An algorithm, as two pure functions. Callers jit ``update``, and donate its first argument.

    Attributes:
        init: params -> state.
        update: (state, rollout) -> (state, info).
    """

    init: Callable[[Params], TrainState]
    update: Callable[[TrainState, Rollout], tuple[TrainState, StepInfo]]


class Scores(NamedTuple):
    """What is known of the samples beside their tokens; without contexts C is 1.

    Attributes:
        log_p: under the target normalised by the running log Z; -inf while that is unknown.
        log_q: under the distribution that was sampled from.
        known: whether the Z of a context is.
        log_z: the estimate itself; one for all contexts, or one for each.
    """

    log_p: Float[Array, "C N"]
    log_q: Float[Array, "C N"]
    known: Bool[Array, "C 1"]
    log_z: Estimate


def init_log_z(log_z: RunningLogMean, num_contexts: int | None):
    """The state of log Z, or of one for each context."""
    state = log_z.init()
    return state if num_contexts is None else jax.tree.map(lambda x: jnp.repeat(x[None], num_contexts, axis=0), state)


def update_log_z(log_z: RunningLogMean, state, rollout: Rollout) -> tuple[object, Scores]:
    """Takes the weights P/q in, each into the Z of its context, and normalises the scores by what is known then."""
    log_score, log_q = (x.reshape(-1, x.shape[-1]) for x in (rollout.log_score, rollout.log_q))
    if rollout.contexts is None:
        state = log_z.update(state, (log_score - log_q).ravel())
        z = log_z.estimate(state)
    else:
        rows = jax.vmap(log_z.update)(jax.tree.map(lambda x: x[rollout.contexts], state), log_score - log_q)
        state = jax.tree.map(lambda all_rows, some: all_rows.at[rollout.contexts].set(some), state, rows)
        z = jax.vmap(log_z.estimate)(rows)
    value = jnp.broadcast_to(z.value.reshape(-1, 1), (log_q.shape[0], 1))
    known = ~jnp.isneginf(value)
    log_p = jnp.where(known, log_score - jnp.where(known, value, 0.0), -jnp.inf)
    return state, Scores(log_p, log_q, known, z)


def pull_back(
    log_prob_fn: LogProbFn,
    params: Params,
    rollout: Rollout,
    weigh: Callable[[Float[Array, "N"]], Float[Array, "N"]],
    microbatch_size: int | None,
    log_pi: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "N"], Float[Array, "N"], Params]:
    """(log π, weights of it, Σ weights · ∇log π), through all samples at once or in parts.

    ``weigh`` is given the log π of all samples either way; ``log_pi`` spares the extra pass that parts need.
    """
    tokens, where = (x.reshape(-1, x.shape[-1]) for x in (rollout.tokens, rollout.where))
    if microbatch_size is None or microbatch_size >= tokens.shape[0]:
        log_pi, back = jax.vjp(lambda params: log_prob_fn(params, tokens, where), params)
        weights = weigh(log_pi)
        return log_pi, weights, back(weights)[0]
    return _in_parts(log_prob_fn, params, tokens, where, weigh, microbatch_size, log_pi)


def _in_parts(log_prob_fn, params, tokens, where, weigh, size, log_pi):
    """The same through ``size`` samples at a time; a last part that is not full repeats samples with weight 0."""
    n = tokens.shape[0]
    parts = -(-n // size)
    rows = (jnp.arange(parts * size) % n).reshape(parts, size)

    def score(part):
        return log_prob_fn(params, tokens[part], where[part])

    if log_pi is None:
        log_pi = jax.lax.map(score, rows).reshape(-1)[:n]
    weights = weigh(log_pi)
    padded = jnp.where(jnp.arange(parts * size) < n, weights[rows.ravel()], 0.0).reshape(parts, size)

    def add(grads, part):
        rows, weights = part
        _, back = jax.vjp(lambda params: log_prob_fn(params, tokens[rows], where[rows]), params)
        return jax.tree.map(jnp.add, grads, back(weights)[0]), None

    grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (rows, padded))
    return log_pi, weights, grads


def describe(
    log_pi: Float[Array, "N"],
    scores: Scores,
    weights: Float[Array, "N"],
    grads: Params,
    *,
    divergence: FDivergence,
    clip: tuple[float, float] | None = None,
) -> StepInfo:
    """The figures of a step whose gradient is Σ weights · ∇log π."""
    by_context = log_pi.reshape(scores.log_q.shape)
    rewards = pseudo_rewards(log_pi, scores.log_p.ravel(), divergence=divergence, clip=clip)
    free = pseudo_rewards(log_pi, scores.log_p.ravel(), divergence=divergence)
    grad_norm = optax.tree.norm(grads)
    away = jax.vmap(lambda *x: estimate_divergence(*x, divergence=divergence))(by_context, scores.log_p, scores.log_q)
    known = scores.known[:, 0]
    return StepInfo(
        loss=jnp.sum(weights * jnp.where(weights == 0, 0.0, log_pi)),
        grad_norm=grad_norm,
        # Without Z there is no p to be away from.
        divergence=_over_contexts(away, known, unknown=jnp.nan),
        log_z=scores.log_z if scores.log_z.value.ndim == 0 else _over_contexts(scores.log_z, known, unknown=-jnp.inf),
        reward_mean=rewards.mean(),
        reward_std=rewards.std(),
        clipped_fraction=jnp.mean(rewards != free, dtype=rewards.dtype),
        importance_ess=effective_sample_size(log_pi - scores.log_q.ravel()),
        finite=jnp.isfinite(grad_norm) & jnp.isfinite(weights).all(),
    )


def _over_contexts(estimate: Estimate, known: Bool[Array, "C"], *, unknown: float) -> Estimate:
    """The mean over contexts, whose spread its error comes from; of a single context its own estimate."""
    n = known.sum()
    if known.shape[0] == 1:
        value, std_error = estimate.value[0], estimate.std_error[0]
    else:
        value = jnp.sum(estimate.value, where=known) / n
        spread = jnp.sum((estimate.value - value) ** 2, where=known)
        std_error = jnp.sqrt(spread / (n - 1) / n)
    some = n > 0
    return Estimate(jnp.where(some, value, unknown), jnp.where(some, std_error, jnp.inf), estimate.ess.sum())


def check_microbatch_size(microbatch_size: int | None) -> None:
    """A number of samples, or None."""
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size must be at least 1, or None for the whole batch; got {microbatch_size}.")


def first_state(
    params: Params, optimizer: optax.GradientTransformation, log_z: RunningLogMean, num_contexts: int | None = None
) -> TrainState:
    """Step 0."""
    # A copy: the state is donated, and whoever calls usually keeps ``params`` as the base model.
    params = jax.tree.map(jnp.copy, params)
    step: Int[Array, ""] = jnp.zeros((), jnp.int32)
    return TrainState(step, params, optimizer.init(params), init_log_z(log_z, num_contexts))
