"""f-DPG as ``init`` and ``update``: one optimiser step that descends D_f(π‖p) on a batch of samples.

The surrogate is linear in log π once its weights are stopped. So weights, Z and baseline are computed over all N samples
first, and the gradient is one pull-back of those weights through log π: one forward and one backward pass, no second
scoring. In micro-batches the same weights are pulled back part by part and summed, which is exact whatever the parts.

Source: Go et al. 2023 (f-DPG, arXiv 2302.08215), theorem 1 and algorithm 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fjax._typing import Array, Bool, Float, LogProbFn, Params
from fjax.divergences import FDivergence
from fjax.estimators import Estimate, RunningLogMean, effective_sample_size, estimate_divergence, running_log_mean
from fjax.surrogates import Baseline, centred_weights, leave_one_out, pseudo_rewards, score_weights
from fjax.training.rollout import Rollout
from fjax.training.state import TrainState


class StepInfo(NamedTuple):
    """What there is to see of one update; nothing of it is needed for the next.

    Attributes:
        loss: Σ of the surrogate. Its gradient is the point, its value means nothing.
        grad_norm: of the whole gradient, before the optimiser.
        divergence: D_f(π‖p) of the policy *before* the update, from this batch and the running log Z; NaN while Z is unknown.
        log_z: the running estimate of log Z, this batch included.
        reward_mean: mean pseudo-reward -f'(π/p), after clipping.
        reward_std: its standard deviation over the batch.
        clipped_fraction: share of samples whose f' was clipped; each biases the gradient.
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


def fdpg(
    log_prob_fn: LogProbFn,
    optimizer: optax.GradientTransformation,
    *,
    divergence: FDivergence,
    baseline: float | Baseline = leave_one_out,
    log_z: RunningLogMean = running_log_mean(),
    clip: tuple[float, float] | None = None,
    microbatch_size: int | None = None,
    on_policy: bool = False,
) -> Tuner:
    """f-DPG: ∇D_f(π‖p) ≈ mean over x ~ q of (π/q)(f'(π/p) - B) ∇log π(x).

    The gradient handed to the optimiser estimates that of D_f(π‖p). Its only bias is that Z is itself estimated, from
    all samples so far and those of this batch; for both KLs and every other member of the α family a wrong Z does not
    change its direction. Until some sample has P > 0, Z is unknown and the gradient is zero.

    Args:
        log_prob_fn: the policy, ``(params, tokens, where) -> log π``; see `fjax.make_log_prob_fn`.
        optimizer: any optax transformation; it is given a gradient to descend.
        divergence: which f.
        baseline: B, see `fjax.surrogate_loss`.
        log_z: how log Z is tracked.
        clip: (lowest, highest) value of f'. Biases, and reports how often.
        microbatch_size: samples that go through the policy at once; None means all. The result is the same up to
            rounding, also where it does not divide N; memory falls, and log π is computed twice.
        on_policy: trust that q = π and take π/q to be exactly 1. In micro-batches this saves the extra pass.

    Returns:
        The `Tuner`.

    Raises:
        ValueError: if ``microbatch_size`` is below 1; at trace time for leave-one-out of a single sample.

    >>> from fjax import enumeration, jensen_shannon
    >>> log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 2)
    >>> tuner = fdpg(log_prob_fn, optax.adam(0.1), divergence=jensen_shannon())
    >>> state = tuner.init(jnp.zeros((prefixes, 3)))
    >>> tokens, where = enumeration.sequences(3, 2, eos_id=0)
    >>> log_q = log_prob_fn(state.params, tokens, where)
    >>> log_score = jnp.where((tokens == 1).any(1), log_q, -jnp.inf)
    >>> state, info = jax.jit(tuner.update)(state, Rollout(tokens, where, log_q, log_score))
    >>> int(state.step), bool(info.finite)
    (1, True)

    Source: Go et al. 2023, algorithm 1.
    """
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size must be at least 1, or None for the whole batch; got {microbatch_size}.")

    def init(params: Params) -> TrainState:
        # A copy: the state is donated, and whoever calls usually keeps ``params`` as the base model.
        params = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), log_z.init())

    def update(state: TrainState, rollout: Rollout) -> tuple[TrainState, StepInfo]:
        z_state = log_z.update(state.log_z, rollout.log_score - rollout.log_q)
        z = log_z.estimate(z_state)
        known = ~jnp.isneginf(z.value)
        log_p = jnp.where(known, rollout.log_score - jnp.where(known, z.value, 0.0), -jnp.inf)
        log_q = None if on_policy else rollout.log_q

        def weigh(log_pi: Float[Array, "N"]) -> Float[Array, "N"]:
            weights = score_weights(log_pi, log_p, log_q, divergence=divergence, clip=clip)
            weights = centred_weights(weights, log_pi, log_q, baseline=baseline)
            return jnp.where(known, weights, 0.0) / weights.shape[0]

        if microbatch_size is None or microbatch_size >= rollout.log_q.shape[0]:
            log_pi, weights, grads = _whole(log_prob_fn, state.params, rollout, weigh)
        else:
            known_log_pi = rollout.log_q if on_policy else None
            log_pi, weights, grads = _in_parts(log_prob_fn, state.params, rollout, weigh, microbatch_size, known_log_pi)
        info = _describe(log_pi, log_p, rollout.log_q, weights, grads, z, divergence, clip)
        return _advance(state, grads, z_state, optimizer, info.finite), info

    return Tuner(init, update)


def _whole(log_prob_fn, params, rollout, weigh):
    log_pi, pull_back = jax.vjp(lambda params: log_prob_fn(params, rollout.tokens, rollout.where), params)
    weights = weigh(log_pi)
    return log_pi, weights, pull_back(weights)[0]


def _in_parts(log_prob_fn, params, rollout, weigh, size, log_pi):
    """The same through ``size`` samples at a time; a last part that is not full repeats samples with weight 0."""
    n = rollout.log_q.shape[0]
    parts = -(-n // size)
    rows = (jnp.arange(parts * size) % n).reshape(parts, size)

    def score(part):
        return log_prob_fn(params, rollout.tokens[part], rollout.where[part])

    if log_pi is None:
        log_pi = jax.lax.map(score, rows).reshape(-1)[:n]
    weights = weigh(log_pi)
    padded = jnp.where(jnp.arange(parts * size) < n, weights[rows.ravel()], 0.0).reshape(parts, size)

    def add(grads, part):
        rows, weights = part
        _, pull_back = jax.vjp(lambda params: log_prob_fn(params, rollout.tokens[rows], rollout.where[rows]), params)
        return jax.tree.map(jnp.add, grads, pull_back(weights)[0]), None

    grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (rows, padded))
    return log_pi, weights, grads


def _describe(log_pi, log_p, log_q, weights, grads, z, divergence, clip):
    rewards = pseudo_rewards(log_pi, log_p, divergence=divergence, clip=clip)
    free = pseudo_rewards(log_pi, log_p, divergence=divergence)
    grad_norm = optax.tree.norm(grads)
    unknown = jnp.isneginf(z.value)  # without Z there is no p to be away from
    away = estimate_divergence(log_pi, log_p, log_q, divergence=divergence)
    return StepInfo(
        loss=jnp.sum(weights * jnp.where(weights == 0, 0.0, log_pi)),
        grad_norm=grad_norm,
        divergence=Estimate(jnp.where(unknown, jnp.nan, away.value), jnp.where(unknown, jnp.inf, away.std_error), away.ess),
        log_z=z,
        reward_mean=rewards.mean(),
        reward_std=rewards.std(),
        clipped_fraction=jnp.mean(rewards != free, dtype=rewards.dtype),
        importance_ess=effective_sample_size(log_pi - log_q),
        finite=jnp.isfinite(grad_norm) & jnp.isfinite(weights).all(),
    )


def _advance(state, grads, z_state, optimizer, finite):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = (optax.apply_updates(state.params, updates), opt_state, z_state)
    old = (state.params, state.opt_state, state.log_z)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return TrainState(state.step + 1, *kept)
