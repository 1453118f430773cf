"""One step of a run: draw, score in Python, update.

With a proposal that adapts, or a batch drawn ahead.

Whatever the next step needs is in `Progress`, and so in the checkpoint: a run that goes on takes
the very steps it would have taken.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax.divergences import FDivergence
from fjax.estimators import Estimate, estimate_proposal_gain
from fjax.evaluation import Features, TextTarget, given_of
from fjax.hosts import fetch, join_rows, own_part, own_rows
from fjax.rollouts import Batch, Collector, to_rollout
from fjax.sharding import jit_update
from fjax.training import TrainState, Tuner
from fjax.types import Params, PRNGKeyArray


class Progress(NamedTuple):
    """What changes from step to step.

    Attributes:
        state: of the tuner.
        proposal: parameters that are sampled from, where that is an adaptive copy of the policy's;
            else None.
        ahead: the batch of the next step, where it has been drawn already; else None.
        staged: where a run in stages is, see `fjax.runs.staged`; else None.
    """

    state: TrainState
    proposal: Params | None = None
    ahead: Batch | None = None
    staged: Any = None


class Drawn(NamedTuple):
    """A batch with what Python says of it."""

    batch: Batch
    log_score: np.ndarray


class Stepper(NamedTuple):
    """How a run moves.

    Attributes:
        begin: params -> progress of step 0.
        go_on: a restored progress -> (), to be called before the first step after a restore.
        step: (progress, number of the step) -> (progress, figures of the step); ``finite`` must be
            one of them, and pictures are of those that a `fjax.training.StepInfo` has.
        samples: of a step: texts that were drawn, or pairs of a file.
        base_samples: how many of them are of the base model.
        unit: what they are.
        divergence: what the figure ``divergence`` of a step is; None where it is not known, or
            there is none.
        steps: how many there are, where that is not for the run to say; else None.
        finished: progress -> whether it has come to an end of its own.
        drawn: progress -> how many have been drawn; None: ``samples`` in every step.
        plan: what is going to happen, in words, where steps are not all alike.
    """

    begin: Callable[[Params], Progress]
    go_on: Callable[[Progress], None]
    step: Callable[[Progress, int], tuple[Progress, dict]]
    samples: int
    base_samples: int = 0
    unit: str = "sample"
    divergence: FDivergence | None = None
    steps: int | None = None
    finished: Callable[[Progress], bool] = lambda progress: False
    drawn: Callable[[Progress], int] | None = None
    plan: str = ""


def steps_of(tuner: Tuner | Stepper, steps: int | None) -> int:
    """As many as are asked for, or else as the stepper has."""
    if steps is None:
        steps = tuner.steps if isinstance(tuner, Stepper) else None
    if steps is None:
        raise ValueError("steps must be given: only a run in stages has a number of its own.")
    return steps


def drawn_by(stepper: Stepper, progress: Progress, step: int) -> int:
    """How many samples, or pairs, until then."""
    return step * stepper.samples if stepper.drawn is None else stepper.drawn(progress)


def online(
    tuner: Tuner,
    collector: Collector,
    target: TextTarget,
    rng_key: PRNGKeyArray,
    *,
    proposal_every: int | None = None,
    overlap: bool = False,
    policy_of: Callable[[Params], Params] = lambda params: params,
) -> Stepper:
    """Samples of the policy, or of its proposal, scored by the target.

    Args:
        tuner: the algorithm; its update is compiled here, and given its state to keep.
        collector: how to draw.
        target: what to score by.
        rng_key: of the whole run; every step has its own, by its number.
        proposal_every: sample from a copy of the policy, which is renewed after so many steps if
            the policy has come nearer to the target by forward KL (KL-adaptive DPG); None samples
            from the policy itself.
        overlap: draw each batch while the one before is scored; it is then of the policy one step
            back, and the off-policy weights keep the gradient exact.
        policy_of: (params that are trained) -> what is sampled from, where they are not the
            policy's own, as with adapters.
    """
    update = jit_update(tuner.update)
    window: list[Drawn] = []  # since the proposal was last looked at

    def draw(params: Params, step: int) -> Batch:
        return collector.draw(policy_of(params), jax.random.fold_in(rng_key, step))

    def begin(params: Params) -> Progress:
        state = tuner.init(params)
        proposal = jax.tree.map(jnp.copy, state.params) if proposal_every else None
        return Progress(state, proposal, draw(state.params, 0) if overlap else None)

    def go_on(progress: Progress) -> None:
        if proposal_every and progress.proposal is not None:
            step = int(progress.state.step)
            since = range(step - step % proposal_every, step)
            drawn = (draw(progress.proposal, earlier) for earlier in since)
            window.extend(score_batch(collector, target, batch)[0] for batch in drawn)

    def step(progress: Progress, number: int) -> tuple[Progress, dict]:
        params = progress.state.params if progress.proposal is None else progress.proposal
        batch = draw(params, number) if progress.ahead is None else progress.ahead
        # The device starts on the next batch, of this step's policy, while Python scores this one.
        ahead = draw(params, number + 1) if overlap else None
        drawn, features = score_batch(collector, target, batch)
        rollout = to_rollout(*drawn, contexts=collector.contexts)
        state, info = update(progress.state, rollout)
        record = features | as_record(info)
        if progress.proposal is None or not proposal_every:
            return Progress(state, None, ahead), record
        window.append(drawn)
        proposal = progress.proposal
        if (number + 1) % proposal_every == 0:
            gain = proposal_gain(collector, policy_of(state.params), window)
            window.clear()
            record["proposal_gain"] = float(gain.value)
            record["proposal_gain_std_error"] = float(gain.std_error)
            proposal = jax.tree.map(jnp.copy, state.params) if float(gain.value) > 0 else proposal
        return Progress(state, proposal), record

    base_samples = collector.samples - collector.policy_samples
    return Stepper(begin, go_on, step, collector.samples, base_samples, divergence=tuner.divergence)


def score_batch(collector: Collector, target: TextTarget, batch: Batch) -> tuple[Drawn, dict]:
    """What Python says of a batch, and the means over the samples that are not the base model's."""
    training = None if collector.contexts is None else collector.contexts.training
    rows, count = own_rows(batch.tokens), len(batch.tokens)
    texts = collector.decode(own_part(batch.tokens), own_part(batch.where))
    contexts = None if batch.contexts is None else fetch(batch.contexts)[rows]
    found: Features = target.features(given_of(training, contexts, len(texts)), texts)
    features = {name: join_rows(values, rows, count) for name, values in found.items()}
    log_score = target.log_score(fetch(batch.log_a), features)
    n = batch.from_policy
    means = {name: float(np.mean(values[:n], dtype=float)) for name, values in features.items()}
    return Drawn(batch, log_score), means


def proposal_gain(collector: Collector, params: Params, window: list[Drawn]) -> Estimate:
    """By how much the policy is nearer to the target than its proposal.

    From what was drawn since it was last looked at; see `fjax.estimators.estimate_proposal_gain`.
    """
    log_pi = [collector.score(params, batch.tokens, batch.where) for batch, _ in window]
    proposal, log_q = (
        jnp.concatenate([getattr(batch, name) for batch, _ in window])
        for name in ("log_proposal", "log_q")
    )
    log_score = jnp.concatenate([jnp.asarray(score) for _, score in window])
    return estimate_proposal_gain(jnp.concatenate(log_pi), proposal, log_score, log_q)


def as_record(info: Any) -> dict:
    """The figures of an update, a named tuple, on the host; an estimate becomes three."""
    record = {}
    for name, value in fetch(info)._asdict().items():
        if isinstance(value, Estimate):
            record |= as_numbers(name, value)
        else:
            record[name] = value.item()
    return record


def on_host(figure: Estimate) -> Estimate:
    """An estimate of Python's floats, from one of arrays."""
    return Estimate(*(x.item() for x in fetch(figure)))


def as_numbers(name: str, figure: Estimate) -> dict:
    """A figure as its three numbers in a record."""
    return {name: figure.value, f"{name}_std_error": figure.std_error, f"{name}_ess": figure.ess}
