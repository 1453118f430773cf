"""One step of an online run: draw, score in Python, update; with a proposal that adapts, or a batch
drawn ahead.

Whatever the next step needs is in `Progress`, and so in the checkpoint: a run that goes on takes
the very steps it would have taken.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fjax
from fjax.estimators import estimate_mean
from fjax.types import Params

from ._evaluate import Features, Target, prompts_of
from ._programs import Batch, Programs
from ._settings import Settings


class Progress(NamedTuple):
    """What changes from step to step.

    state: of the tuner.
    proposal: parameters that are sampled from, with ``--proposal adaptive``; else None.
    ahead: the batch of the next step, drawn already, with ``--overlap``; else None.
    """

    state: fjax.TrainState
    proposal: Params | None = None
    ahead: Batch | None = None


class Scored(NamedTuple):
    """A batch with what Python says of it."""

    batch: Batch
    log_score: np.ndarray


class Stepper(NamedTuple):
    """How a run moves.

    begin: state of step 0 -> progress.
    go_on: a restored progress -> (), to be called before the first step after a restore.
    step: (progress, number of the step) -> (progress, figures of the step).
    samples: of a step: texts that were drawn, or pairs of a file.
    """

    begin: Callable[[fjax.TrainState], Progress]
    go_on: Callable[[Progress], None]
    step: Callable[[Progress, int], tuple[Progress, dict]]
    samples: int


def online(settings: Settings, programs: Programs, target: Target, rng_key: jax.Array) -> Stepper:
    """Samples of the policy, or of its proposal, scored by the target."""
    window: list[Scored] = []  # since the proposal was last looked at

    def draw(params: Params, step: int) -> Batch:
        return programs.draw(params, jax.random.fold_in(rng_key, step))

    def begin(state: fjax.TrainState) -> Progress:
        proposal = jax.tree.map(jnp.copy, state.params) if settings.proposal == "adaptive" else None
        return Progress(state, proposal, draw(state.params, 0) if settings.overlap else None)

    def go_on(progress: Progress) -> None:
        if progress.proposal is not None:
            step = int(progress.state.step)
            since = range(step - step % settings.proposal_every, step)
            window.extend(
                score(programs, target, draw(progress.proposal, earlier))[0] for earlier in since
            )

    def step(progress: Progress, number: int) -> tuple[Progress, dict]:
        params = progress.state.params if progress.proposal is None else progress.proposal
        batch = draw(params, number) if progress.ahead is None else progress.ahead
        # The device starts on the next batch, of this step's policy, while Python scores this one.
        ahead = draw(params, number + 1) if settings.overlap else None
        scored, features = score(programs, target, batch)
        state, info = programs.tuner.update(progress.state, programs.to_rollout(*scored))
        record = features | as_record(info)
        if progress.proposal is None:
            return Progress(state, None, ahead), record
        window.append(scored)
        proposal = progress.proposal
        if (number + 1) % settings.proposal_every == 0:
            gain = proposal_gain(programs, state.params, window)
            window.clear()
            record |= {
                "proposal_gain": float(gain.value),
                "proposal_gain_std_error": float(gain.std_error),
            }
            proposal = jax.tree.map(jnp.copy, state.params) if float(gain.value) > 0 else proposal
        return Progress(state, proposal), record

    return Stepper(begin, go_on, step, settings.samples)


def score(programs: Programs, target: Target, batch: Batch) -> tuple[Scored, dict]:
    """What Python says of a batch, and the means over the samples that are not the base model's."""
    features: Features = target.features(
        prompts_of(programs.training, batch.contexts, len(batch.tokens)), programs.decode(batch)
    )
    log_score = target.log_score(np.asarray(batch.log_a), features)
    means = {
        name: float(np.mean(values[: batch.from_policy], dtype=float))
        for name, values in features.items()
    }
    return Scored(batch, log_score), means


def proposal_gain(programs: Programs, params: Params, window: list[Scored]) -> fjax.Estimate:
    """KL(p‖q) - KL(p‖π) from samples around the proposal q: above 0 the policy π is nearer to the
    target.

    E_p[log π - log q] by self-normalised weights P/q, q here being what was drawn from, the share
    of the base model included; neither Z nor the entropy of p is needed. 0 while no sample has P >
    0.
    """
    log_pi = [programs.score(params, batch.tokens, batch.where) for batch, _ in window]
    gains = jnp.concatenate(
        [new - batch.log_pi for new, (batch, _) in zip(log_pi, window, strict=True)]
    )
    log_weights = jnp.concatenate(
        [jnp.asarray(log_score) - batch.log_q for batch, log_score in window]
    )
    estimate = estimate_mean(gains, log_weights)
    return estimate._replace(value=jnp.where(estimate.ess > 0, estimate.value, 0.0))


def as_record(info: NamedTuple) -> dict:
    """The figures of an update, on the host; an estimate becomes three."""
    record = {}
    for name, value in jax.device_get(info)._asdict().items():
        if isinstance(value, fjax.Estimate):
            record |= {
                name: value.value,
                f"{name}_std_error": value.std_error,
                f"{name}_ess": value.ess,
            }
        else:
            record[name] = value.item()
    return record
