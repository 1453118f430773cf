"""Stages on a replay: draw from a fixed proposal, then learn from all that was drawn; again.

Samples are the scarce good. One pass uses each of them for one step; here every one is kept, with
the density that it was drawn from, and learnt from many times. Cover first (forward KL), draw again
from where that led, sharpen last: the nearer the proposal, the more each sample tells.

Whatever a later step needs is in `Staged`, and so in the checkpoint.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax.divergences import FDivergence
from fjax.estimators import Estimate, estimate_divergence, estimate_kl_to_base, pareto_k
from fjax.evaluation import TextTarget
from fjax.replay import (
    Replay,
    add_to_replay,
    init_replay,
    minibatch,
    replay_bytes,
    replay_log_z,
    replay_part,
    weights_by_ess,
)
from fjax.rollouts import Collector, to_rollout
from fjax.runs.memory import device_memory
from fjax.runs.reading import RunError
from fjax.runs.steps import Progress, Stepper, as_numbers, as_record, on_host, score_batch
from fjax.runs.text import count
from fjax.sharding import jit_update, replicate
from fjax.training import Rollout, Tuner
from fjax.types import Array, Float, Int, Params, PRNGKeyArray


class Stage(NamedTuple):
    """One round of drawing and learning.

    Attributes:
        divergence: what is descended.
        samples: drawn at its beginning, from the policy as it is then; 0 draws none.
        updates: at most, each on a minibatch of the replay.
        patience: end after so many looks at the held-out samples without a new lowest divergence;
            the policy of the lowest is what goes on. None: all updates are made, and the last
            policy goes on.
        max_kl: end once KL(π‖proposal) is above it, in nats.
    """

    divergence: FDivergence
    samples: int
    updates: int
    patience: int | None = None
    max_kl: float | None = None


class Staged(NamedTuple):
    """Where a staged run is, and what it has drawn.

    Attributes:
        replay: everything drawn so far.
        stage: the number of the stage.
        done: steps of it.
        best: parameters of its lowest held-out divergence.
        lowest: that divergence, in nats; infinite before the first look.
        since: looks since then.
    """

    replay: Replay
    stage: Int[Array, ""]
    done: Int[Array, ""]
    best: Params
    lowest: Float[Array, ""]
    since: Int[Array, ""]


class _Given(NamedTuple):
    """What stays the same throughout a staged run."""

    stages: tuple[Stage, ...]
    updates: dict[FDivergence, Callable]
    collector: Collector
    target: TextTarget
    policy_of: Callable[[Params], Params]
    rng_key: PRNGKeyArray
    num_contexts: int | None
    updates_per_step: int
    look_every: int
    held_out: float


def staged(
    make_tuner: Callable[[FDivergence], Tuner],
    stages: Sequence[Stage],
    collector: Collector,
    target: TextTarget,
    rng_key: PRNGKeyArray,
    *,
    minibatch_size: int = 128,
    share_of_p: float = 0.5,
    updates_per_step: int = 5,
    look_every: int = 5,
    held_out: float = 0.1,
    policy_of: Callable[[Params], Params] = lambda params: params,
) -> Stepper:
    """Draws in stages, each from the policy that the last one led to, and learns from all of it.

    A step either draws one batch of the collector, or makes ``updates_per_step`` updates. The
    gradient of an update estimates that of D_f(π‖p): each sample counts by the density that it was
    drawn from, whatever came later; and which samples are held out is fixed when they are drawn.

    Args:
        make_tuner: f -> what updates: `fjax.fdpg` of that ``divergence``, with ``log_z=
            known_log_z()``, for scores come normalised, and ``baseline=self_normalized``.
        stages: in order.
        collector: how to draw; with a share of the base model, all proposals cover the target.
        target: what to score by.
        rng_key: of the whole run.
        minibatch_size: rows of an update.
        share_of_p: share of them that is drawn as p would have, see `fjax.replay.minibatch`. With
            1, one stage of forward KL and a ``baseline`` of 0.0, this is filtering and fine-tuning:
            maximum likelihood on what p would have drawn.
        updates_per_step: updates between two lines of metrics.
        look_every: such steps between two looks at the held-out samples.
        held_out: share of what is drawn that is never learnt from.
        policy_of: (params that are trained) -> what is sampled from.

    Raises:
        ValueError: for stages that draw nothing first, or make no update; or if what is never drawn
            would count, for f'(∞) is not 0.
        RunError: as the run begins, for more samples than there is memory for, or draws of which
            some cannot be held out.

    Source: Go et al. 2023 for the gradient; Owen 2013, sections 9.1 and 9.11 for the mixture.
    """
    _check_stages(stages, share_of_p)
    contexts = collector.contexts
    num_contexts = None
    if contexts is not None and not contexts.global_z:
        num_contexts = len(contexts.training.texts)
    draw = partial(minibatch, n=minibatch_size, share_of_p=share_of_p)
    # Stages of one f share a program.
    updates = {
        f: _make_update(make_tuner(f), len(stages), num_contexts, draw)
        for f in {stage.divergence for stage in stages}
    }
    init = make_tuner(stages[0].divergence).init
    given = _Given(
        tuple(stages), updates, collector, target, policy_of, rng_key, num_contexts,
        updates_per_step, look_every, held_out,
    )  # fmt: skip

    draws = sum(_draws(given, stage) for stage in stages)
    rows, steps = draws * collector.samples, sum(_steps(given, stage) for stage in stages)

    def begin(params: Params) -> Progress:
        like = _rollout_like(collector, policy_of(params), rng_key)
        _check_memory(like, rows)
        _check_held_out(like, held_out)
        state, replay = init(params), init_replay(like, rows)
        copy = jax.tree.map(jnp.copy, state.params)
        zero = jnp.zeros((), jnp.int32)
        at = Staged(replay, zero, zero, copy, jnp.asarray(jnp.inf), zero)
        return replicate(Progress(state, copy, None, at))

    def step(progress: Progress, number: int) -> tuple[Progress, dict]:
        at = progress.staged
        stage = stages[int(at.stage)]
        move = _draw if int(at.done) < _draws(given, stage) else _learn
        progress, record = move(given, progress, jax.random.fold_in(rng_key, number))
        state = progress.state._replace(step=jnp.asarray(number + 1, jnp.int32))
        record["stage"] = int(at.stage) + 1
        return replicate(_next_stage(given, progress._replace(state=state))), record

    base_samples = collector.samples - collector.policy_samples
    return Stepper(
        begin,
        lambda progress: None,
        step,
        collector.samples,
        base_samples,
        steps=steps,
        finished=lambda progress: int(progress.staged.stage) >= len(stages),
        drawn=lambda progress: int(progress.staged.replay.size),
        plan=f"in {count(len(stages), 'stage')}: {draws} draw {collector.samples} samples each, "
        f"{steps - draws} learn from all of them",
    )


def _check_stages(stages: Sequence[Stage], share_of_p: float) -> None:
    if not stages or stages[0].samples < 1:
        raise ValueError("There must be a stage, and the first one must draw samples.")
    for number, stage in enumerate(stages, 1):
        if stage.samples < 0 or stage.updates < 1:
            raise ValueError(
                f"Stage {number} has samples={stage.samples} and updates={stage.updates}: a stage "
                f"draws at least 0 samples and makes at least 1 update."
            )
        slope = float(stage.divergence.derivative(jnp.array(jnp.inf)))
        if share_of_p == 1 and slope != 0:
            raise ValueError(
                f"Stage {number} descends an f with f'(∞) = {slope:g}, so that samples where p = 0 "
                f"count, but share_of_p=1 draws none of them: take fjax.forward_kl(), or less."
            )


def _draws(given: _Given, stage: Stage) -> int:
    """Steps of a stage that draw."""
    return -(-stage.samples // given.collector.samples)


def _rollout_like(collector: Collector, params: Params, rng_key: PRNGKeyArray) -> Rollout:
    """A batch, for its shapes alone: an engine outside of JAX has them nowhere else."""
    batch = collector.draw(params, rng_key)
    return to_rollout(batch, jnp.zeros(len(batch.tokens)), contexts=collector.contexts)


def _check_memory(like: Rollout, rows: int) -> None:
    """Whether there is room for so many samples, before the first is drawn."""
    columns, there = like.tokens.shape[1], device_memory()
    needed = replay_bytes(columns, rows, contexts=like.contexts is not None)
    if needed > there:
        raise RunError(
            f"{rows:,} samples of {columns} tokens are {needed:,} bytes, more than the {there:,} "
            f"that {jax.devices()[0].device_kind} has. Draw fewer samples in the stages, or "
            f"shorter ones."
        )


def _check_held_out(like: Rollout, held_out: float) -> None:
    """Whether a part of each draw can be held out, before the first is drawn."""
    try:
        add_to_replay(init_replay(like, like.log_q.size), like, batch=0, held_out=held_out)
    except ValueError as error:
        raise RunError(
            f"Stages hold out some of the policy's samples and some of the base model's, of every "
            f"prompt where there are prompts, so there must be two of each in every draw: {error}"
        ) from error


def _make_update(
    tuner: Tuner, num_batches: int, num_contexts: int | None, draw: Callable[..., Rollout]
) -> Callable:
    """(state, replay, key) -> (state, info): an update on one minibatch."""

    @jit_update
    def update(state, replay, rng_key):
        log_z, weights = _log_z(replay, num_batches, num_contexts, held_out=False)
        return tuner.update(state, draw(replay, rng_key, batch_weights=weights, log_z=log_z.value))

    return update


def _log_z(
    replay: Replay, num_batches: int, num_contexts: int | None, *, held_out: bool
) -> tuple[Estimate, Float[Array, "B"]]:
    """Of one part of the replay; and how batches count there, which the other part says."""
    weights = weights_by_ess(replay, num_batches=num_batches, held_out=not held_out)
    log_z = replay_log_z(replay, batch_weights=weights, num_contexts=num_contexts, held_out=False)
    return log_z, weights


def _draw(given: _Given, progress: Progress, rng_key: PRNGKeyArray) -> tuple[Progress, dict]:
    """One batch more, of the stage's proposal."""
    at, collector = progress.staged, given.collector
    batch = collector.draw(given.policy_of(progress.proposal), rng_key)
    drawn, record = score_batch(collector, given.target, batch)
    rollout = to_rollout(*drawn, contexts=collector.contexts)
    replay = add_to_replay(at.replay, rollout, batch=at.stage, held_out=given.held_out)
    log_z, _ = _log_z(replay, len(given.stages), given.num_contexts, held_out=False)
    if given.num_contexts is None:
        record |= as_numbers("log_z", on_host(log_z))
    at = at._replace(replay=replay, done=at.done + 1)
    if int(at.done) == _draws(given, given.stages[int(at.stage)]):  # before it is learnt from
        weights = jnp.where(replay.held_out, -jnp.inf, replay.log_score - replay.log_q)
        record["pareto_k"] = float(pareto_k(weights, where=replay.batches == at.stage))
    return progress._replace(staged=at), record | {"finite": True}


def _learn(given: _Given, progress: Progress, rng_key: PRNGKeyArray) -> tuple[Progress, dict]:
    """A few updates; now and then a look at the held-out samples."""
    at, state = progress.staged, progress.state
    stage = given.stages[int(at.stage)]
    update = given.updates[stage.divergence]
    done = int(at.done) + 1 - _draws(given, stage)
    left = stage.updates - (done - 1) * given.updates_per_step
    looks = stage.patience is not None or stage.max_kl is not None
    if looks and done == 1:  # what is no better than the proposal is not kept
        progress, _ = _look(given, progress)
        at = progress.staged
    for i in range(min(given.updates_per_step, left)):
        state, info = update(state, at.replay, jax.random.fold_in(rng_key, i))
    progress = progress._replace(state=state, staged=at._replace(done=at.done + 1))
    # The tuner's log Z is 0, for scores came normalised; and its divergence, of samples that were
    # trained on, reads too low.
    left_out = ("log_z", "divergence")
    record = {k: v for k, v in as_record(info).items() if not k.startswith(left_out)}
    last = done * given.updates_per_step >= stage.updates
    if looks and (last or done % given.look_every == 0):
        progress, seen = _look(given, progress)
        record |= seen
    return progress, record


def _look(given: _Given, progress: Progress) -> tuple[Progress, dict]:
    """D_f(π‖p) on the samples that are never learnt from; the best policy is kept."""
    at, params = progress.staged, progress.state.params
    stage, replay = given.stages[int(at.stage)], at.replay
    log_z, weights = _log_z(replay, len(given.stages), given.num_contexts, held_out=True)
    if not np.isfinite(log_z.value).any():
        return progress, {}  # no Z is known yet, and so no distance
    part = replay_part(replay, held_out=True, batch_weights=weights, log_z=log_z.value)
    log_pi = _score(given, params, part)
    f = stage.divergence
    found = estimate_divergence(log_pi, part.log_score, part.log_q, divergence=f)
    record = as_numbers("held_out", on_host(found))
    if stage.max_kl is not None:
        from_proposal = log_pi, _score(given, progress.proposal, part), part.log_q
        record["kl_to_proposal"] = float(estimate_kl_to_base(*from_proposal).value)
    far = stage.max_kl is not None and record["kl_to_proposal"] > stage.max_kl
    if record["held_out"] < float(at.lowest) and not far:
        lowest = jnp.full_like(at.lowest, record["held_out"])
        at = at._replace(best=jax.tree.map(jnp.copy, params), lowest=lowest, since=0 * at.since)
    else:
        at = at._replace(since=at.since + 1)
    if far or (stage.patience is not None and int(at.since) >= stage.patience):
        at = at._replace(done=jnp.full_like(at.done, _steps(given, stage)))
    return progress._replace(staged=at), record


def _score(given: _Given, params: Params, part: Rollout) -> Array:
    """Log π of its rows, in parts of a size for which scoring is compiled."""
    n, size, params = len(part.tokens), given.collector.policy_samples, given.policy_of(params)
    rows = (np.resize(np.arange(i, min(i + size, n)), size) for i in range(0, n, size))
    found = [given.collector.score(params, part.tokens[r], part.where[r]) for r in rows]
    return jnp.concatenate(found)[:n]


def _steps(given: _Given, stage: Stage) -> int:
    return _draws(given, stage) + -(-stage.updates // given.updates_per_step)


def _next_stage(given: _Given, progress: Progress) -> Progress:
    """Once a stage is done its best policy, or its last, is the next one's proposal."""
    at = progress.staged
    stage = given.stages[int(at.stage)]
    if int(at.done) < _steps(given, stage):
        return progress
    looked = math.isfinite(float(at.lowest))
    params = at.best if looked else progress.state.params
    params = jax.tree.map(jnp.copy, params)  # the state is given away by every update
    zero = jnp.zeros((), jnp.int32)
    at = at._replace(
        stage=at.stage + 1, done=zero, lowest=jnp.full_like(at.lowest, jnp.inf), since=zero
    )
    state = progress.state._replace(params=params)
    return Progress(state, jax.tree.map(jnp.copy, params), None, at)
