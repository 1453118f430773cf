"""f-DPG as ``init`` and ``update``: one optimiser step that descends D_f(π‖p).

The surrogate is linear in log π once its weights are stopped. So weights, Z and baseline are
computed over all N samples first, and the gradient is one pull-back of those weights through log π:
one forward and one backward pass, no second scoring. In micro-batches the same weights are pulled
back part by part and summed, which is exact whatever the parts.

Source: Go et al. 2023 (f-DPG, arXiv 2302.08215), theorem 1 and algorithm 1.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import optax

from fjax._checks import one_number
from fjax._numerics import map_contexts
from fjax.divergences import FDivergence
from fjax.estimators import RunningLogMean, running_log_mean
from fjax.surrogates import Baseline, centred_weights, leave_one_out, score_weights
from fjax.training._doors import as_log_probs, check_options, checked_rollout
from fjax.training._update import (
    advance,
    describe,
    make_init,
    pull_back,
    told,
    update_log_z,
)
from fjax.training.base import Rollout, StepInfo, TrainState, Tuner
from fjax.types import Array, Float, LogProbFn


def fdpg(
    log_prob_fn: LogProbFn,
    optimizer: optax.GradientTransformation,
    *,
    divergence: FDivergence,
    baseline: float | Float[Array, ""] | Baseline | Callable[..., Baseline] = leave_one_out,
    log_z: RunningLogMean = running_log_mean(),
    clip: tuple[float | Float[Array, ""], float | Float[Array, ""]] | None = None,
    microbatch_size: int | None = None,
    on_policy: bool = False,
    num_contexts: int | None = None,
) -> Tuner:
    """f-DPG: ∇D_f(π‖p) ≈ mean over x ~ q of (π/q)(f'(π/p) - B) ∇log π(x).

    The gradient handed to the optimiser estimates that of D_f(π‖p). Its only bias is that Z is
    itself estimated, from all samples so far and those of this batch; for both KLs and every other
    member of the α family a wrong Z does not change its direction. Until some sample has P > 0, Z
    is unknown and the gradient is zero.

    Args:
        log_prob_fn: the policy, ``(params, tokens, where) -> log π``, one number a sequence; see
            `fjax.make_log_prob_fn`.
        optimizer: any optax transformation; it is given a gradient to descend.
        divergence: which f.
        baseline: B, see `fjax.surrogate_loss`. `fjax.leave_one_out`, the default, is told the
            rollout's ``strata``; `fjax.surrogates.self_normalized`, given as it is, log π and log
            q. The latter is for samples that are used many times: with it, raising π on all of them
            alike earns nothing, however often they are seen.
        log_z: how log Z is tracked.
        clip: (lowest, highest) value of f'. Biases, and reports how often.
        microbatch_size: samples that go through the policy at once; None means all. The result is
            the same up to rounding, also where it does not divide N; memory falls, and log π is
            computed twice.
        on_policy: trust that q = π and take π/q to be exactly 1. In micro-batches this saves the
            extra pass.
        num_contexts: how many contexts there are, of conditional targets p_c = P_c/Z_c. The
            rollout's arrays then have a leading axis C, baselines are of one row each, and the
            state holds a log Z for every context; the gradient estimates that of E_c
            D_f(π(·|c)‖p_c), and a context whose Z_c is unknown adds nothing. None: one Z, also for
            a rollout of contexts, whose joint target p(c, x) ∝ P_c(x) then favours those with a
            large Z_c.

    Returns:
        The `Tuner`.

    Raises:
        ValueError: for options that are not what they should be, such as a ``divergence`` that was
            not called; at trace time for a rollout whose shapes do not belong together, contexts
            that do not exist (if known by then, see `StepInfo`), and leave-one-out of a single
            sample.

    >>> import jax
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
    check_options(
        optimizer=optimizer,
        divergence=divergence,
        log_z=log_z,
        microbatch_size=microbatch_size,
        num_contexts=num_contexts,
    )
    if not callable(baseline):
        one_number(baseline=baseline)
    log_prob_fn = as_log_probs(log_prob_fn)
    weigh = _make_weigh(divergence, clip, baseline, on_policy)

    def update(state: TrainState, rollout: Rollout) -> tuple[TrainState, StepInfo]:
        rollout = checked_rollout(rollout, num_contexts)
        z_state, scores = update_log_z(log_z, state.log_z, rollout, num_contexts)
        known_log_pi = scores.log_q.ravel() if on_policy else None
        log_pi, weights, grads = pull_back(
            log_prob_fn,
            state.params,
            rollout.tokens,
            rollout.where,
            partial(weigh, scores, rollout.strata),
            microbatch_size,
            known_log_pi,
        )
        info = describe(log_pi, scores, weights, grads, divergence=divergence, clip=clip)
        return advance(state, grads, optimizer, finite=info.finite, log_z=z_state), info

    return Tuner(make_init(optimizer, log_z, num_contexts), update, divergence)


def _make_weigh(divergence, clip, baseline, on_policy):
    """(scores, strata, log π of all samples) -> (π/q)(f' - B) of each, over their number."""

    def of_context(log_pi, log_p, log_q, strata):
        sampled_from = None if on_policy else log_q
        weights = score_weights(log_pi, log_p, sampled_from, divergence=divergence, clip=clip)
        own = told(baseline, strata, log_pi, sampled_from)
        return centred_weights(weights, log_pi, sampled_from, baseline=own)

    def weigh(scores, strata, log_pi):
        by_context = log_pi.reshape(scores.log_q.shape)
        weights = map_contexts(of_context)(by_context, scores.log_p, scores.log_q, strata)
        return jnp.where(scores.known, weights, 0.0).ravel() / weights.size

    return weigh
