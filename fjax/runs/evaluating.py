"""The evaluations of a run: when they are due is the loop's to say."""

import time

import jax
import numpy as np

from fjax._trees import same_numbers
from fjax.adapters import is_adapted, merge_attached
from fjax.evaluation import (
    Base,
    Evaluation,
    Scored,
    draw_base,
    draw_scored,
    make_base,
    measure,
)
from fjax.runs.reading import RunError
from fjax.runs.records import as_record, keep_samples
from fjax.runs.running import EVALUATION_KEY, NO_STEP, Run
from fjax.runs.saving import at_once
from fjax.runs.steps import Progress, drawn_by
from fjax.types import Params, PRNGKeyArray


def _evaluation_key(run: Run, step: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.fold_in(run.rng_key, EVALUATION_KEY), step)


def _draw(run: Run, params: Params, step: int) -> tuple[Scored, Scored]:
    with run.display.counting("evaluate") as progress:
        given = run.collector, params, run.target, _evaluation_key(run, step)
        return draw_scored(*given, run.schedule.eval_samples, progress=progress)


def _base(run: Run, step: int) -> Base | None:
    """What evaluations share.

    None where that of step 0, still to be made, is of the base model and will be shared.
    """
    apart = not _begins_as_base(run) or run.collector.z_rounds
    if not apart and step == 0:
        return None
    what = "estimate Z" if run.collector.z_rounds else "evaluate"
    with run.display.counting(what) as progress:
        key = _evaluation_key(run, NO_STEP if apart else 0)
        given = run.collector, run.model.params, run.target, key
        return draw_base(*given, run.schedule.eval_samples, progress=progress)


def _begins_as_base(run: Run) -> bool:
    """Whether the first policy is the base model to the last bit, as of new adapters."""
    policy, base = run.policy_of(run.initial), run.model.params
    if policy is base:
        return True
    # One matrix after the other: merged, all of them would be another copy of the model.
    leaves = jax.tree.leaves(policy, is_leaf=is_adapted)
    pairs = zip(leaves, jax.tree.leaves(base), strict=True)
    return all(same_numbers(merge_attached(ours), theirs) for ours, theirs in pairs)


def measure_policy(run: Run, progress: Progress, step: int, begun: float) -> Evaluation:
    """On fresh samples, without a word to anybody."""
    params, kept = run.policy_of(progress.state.params), run.kept
    with at_once(run, progress, begun):  # it may take minutes, and changes nothing
        kept.base = kept.base or _base(run, step)
        drawn = _draw(run, params, step)
        options = {"exact": run.exact, "divergences": run.divergences, "metrics": run.metrics}
        found = measure(run.collector, params, run.target, drawn, kept.base, **options)
        kept.base = kept.base or make_base(*drawn)
        return found


def evaluate_now(run: Run, progress: Progress, step: int, begun: float) -> Evaluation:
    """Evaluates, and puts the figures and samples wherever they are kept and shown."""
    evaluation = measure_policy(run, progress, step, begun)
    drawn = drawn_by(run.stepper, progress, step)
    record = as_record(evaluation.figures, step, time.monotonic() - begun, drawn)
    run.logger.log(record)
    run.kept.records[step] = record
    run.logger.log_samples(keep_samples(run.folder, evaluation, step))
    if step < run.schedule.steps:  # the last is shown by the summary, beside the first
        run.display.evaluation(evaluation, step, run.aim)
    bound = run.target.bound
    if step == 0 and bound and evaluation.figures[bound].value == 0 and _begins_as_base(run):
        _absent(run, evaluation)
    return evaluation


def _absent(run: Run, evaluation: Evaluation) -> None:
    """The constraint held for no sample of the base model.

    Says what is known of its rate, and goes on or gives up.
    """
    if evaluation.log_z is not None and np.isfinite(evaluation.log_z).any():
        return  # it did for one of those that Z is from
    samples = len(evaluation.samples.texts)
    known = (
        f"None of {samples} samples of the base model satisfies the constraint: with 95 % "
        f"confidence its rate is below {3 / samples:.2g}, and log Z below "
        f"{np.log(3 / samples):.1f}."
    )
    if run.target.stop_if_absent:
        raise RunError(
            f"{known} Look for the spelling that the model uses, or raise eval_samples "
            f"(--eval-samples) and the samples of a step (--samples)."
        )
    run.display.warn(
        f"{known} Until a sample does, Z is unknown and steps change nothing; more samples a step "
        f"(--samples) find one sooner."
    )
