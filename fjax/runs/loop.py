"""The one host loop: draw, score, update; evaluate, save and show on the way.

It stops cleanly when told to.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fjax.divergences import FDivergence
from fjax.estimators import Estimate
from fjax.evaluation import Exact, Metric, TextTarget
from fjax.hosts import are_several, fetch, if_lost, is_first
from fjax.rollouts import Collector
from fjax.runs import card, plots, report
from fjax.runs import folder as folders
from fjax.runs.aim import aim_of
from fjax.runs.display import Display
from fjax.runs.distance import check_bound, distances
from fjax.runs.endings import AskedToStop, graceful_stop
from fjax.runs.evaluating import evaluate_now, measure_policy
from fjax.runs.folder import OpenRun, describe_run
from fjax.runs.loggers import check_loggers, open_loggers
from fjax.runs.names import title_of
from fjax.runs.reading import (
    ADAPTERS,
    CHECKPOINTS,
    MODEL,
    RunError,
    by_step,
    of_target,
    read_metrics,
)
from fjax.runs.records import as_target_record
from fjax.runs.resume import Schedule, as_tree, begin_at, check_schedule, forget_later
from fjax.runs.rows import collapse
from fjax.runs.running import Kept, Model, Run
from fjax.runs.saving import after_loss, at_once, is_stopping, save
from fjax.runs.steps import Progress, Stepper, drawn_by, online, steps_of
from fjax.training import Checkpoints, Logger, Tuner
from fjax.training._digests import digest_params
from fjax.types import Params


class Result(NamedTuple):
    """How a run ended.

    Attributes:
        status: 0 for a whole run, 128 + signal for one that was stopped and saved.
        step: the last one taken.
        figures: of the last evaluation; {} for a run that was stopped.
        folder: of the run.
        params: of the aligned policy, as ``policy_of`` gives them: of the saved step that was
            nearest to the target, which is the model in the folder. Of a run that was stopped:
            those of its last step.
    """

    status: int
    step: int
    figures: dict[str, Estimate]
    folder: Path
    params: Params


def align(
    model: Model,
    target: TextTarget,
    tuner: Tuner | Stepper,
    collector: Collector,
    *,
    folder: str | Path | OpenRun,
    steps: int | None = None,
    divergences: Mapping[str, FDivergence],
    objective: str | None = None,
    seed: int = 0,
    initial: Params | None = None,
    policy_of: Callable[[Params], Params] = lambda params: params,
    save_trained: Callable[[Path, Params], None] | None = None,
    proposal_every: int | None = None,
    overlap: bool = False,
    eval_every: int = 50,
    eval_samples: int = 1024,
    checkpoint_every: int = 50,
    stop_below: float | None = None,
    patience: int | None = None,
    metrics: Mapping[str, Metric] | None = None,
    exact: Exact | None = None,
    loggers: Sequence[Logger | str] = (),
    base_card: card.FrontMatter | None = None,
    title: str = "align",
    resume: bool = False,
    resume_from: int | None = None,
    stop_if_unsaved: bool = False,
    display: Display | None = None,
) -> Result:
    """Moves a policy to a target, from the first sample to the exported model.

    Evaluates on fresh samples on the way, saves, shows a bar, and leaves in the folder metrics,
    samples, pictures, a report, checkpoints, and the model that was nearest to the target. Ctrl-C
    and SIGTERM save first; resumed, it goes on bit for bit.

    Args:
        model: the base model a.
        target: what is wanted.
        tuner: an online algorithm such as `fjax.fdpg`, or a `Stepper` of your own.
        collector: how to draw, as `fjax.rollouts.make_collector` makes it.
        folder: of the run; or one that `open_run` has opened, with the configuration to write.
        steps: in all; a resumed run may be asked for more. None: as many as the stepper has.
        divergences: D_f(π‖p) to report, by name.
        objective: which of them is the distance that stops a run and picks the model; None takes
            the first.
        seed: of everything random.
        initial: parameters to begin with, if not the base model's.
        policy_of: (trained params) -> the policy's, which the model's functions take, where the
            two differ, as with adapters: `fjax.adapters.merge_lora` or, for one copy of the base
            model and no other, `fjax.adapters.attach_lora`. The policy is what is exported.
        save_trained: (folder, trained params) -> writes them too, into ``adapters`` beside the
            model, as `fjax.models.save_adapters` does.
        proposal_every: steps between checks of an adaptive proposal, as in `online`.
        overlap: draw each batch while the one before is scored, as in `online`.
        eval_every: steps between evaluations.
        eval_samples: of the policy, in each of them.
        checkpoint_every: steps between checkpoints.
        stop_below: end once the distance is below it.
        patience: evaluations without a new lowest distance after which the run ends.
        metrics: more figures, as in `fjax.evaluation.evaluate`.
        exact: samples of p to measure by, as `fjax.evaluation.draw_exact` gives them, of a key that
            no step has; None weighs samples of the policy and the base model instead.
        loggers: objects with ``log(record)`` and ``close()``, or names, as in
            `fjax.runs.loggers.open_loggers`.
        base_card: what the front matter of the exported model's card has of the base model, such as
            {"base_model": "gpt2", "license": "mit"}.
        title: of the run.
        resume: go on with the run in the folder, from its newest checkpoint.
        resume_from: the step of another one to go on from, as when the newest is damaged; those
            after it are set aside. It implies ``resume``.
        stop_if_unsaved: end when a checkpoint cannot be written, for the disk is full, say. Else
            that is reported, and the run goes on: the next one may find room.
        display: where the run is shown; None makes one.

    Returns:
        How it ended, with the parameters of the aligned policy.

    Raises:
        RunError: for what can be put right, with what to do.
        OSError: if the last checkpoint cannot be written, or with ``stop_if_unsaved`` any.
        ValueError: for an objective that is none of the divergences, or a ``target.highlight`` that
            is no regular expression.
    """
    objective = next(iter(divergences)) if objective is None else objective
    aim = aim_of(target, divergences, objective)
    check_loggers(loggers)
    display, rng_key = display or Display(), jax.random.key(seed)
    steps = steps_of(tuner, steps)
    schedule = Schedule(steps, eval_every, eval_samples, checkpoint_every, stop_below, patience)
    check_schedule(schedule)
    if isinstance(tuner, Tuner):
        tuner = online(
            tuner,
            collector,
            target,
            rng_key,
            proposal_every=proposal_every,
            overlap=overlap,
            policy_of=policy_of,
        )
    values = schedule._asdict() | {"seed": seed, "objective": objective, "title": title}
    values |= {"samples": tuner.samples}
    with _opened(folder, values, model, resume or resume_from is not None) as opened:
        initial = model.params if initial is None else initial
        folders.check_space(opened.path, initial, model.params)
        if not opened.resume:
            describe_run(opened, aim, params=model.params)
        kept = Kept()
        nearest_first = partial(_distance_of, objective, kept)
        place = opened.checkpoints
        opening = Checkpoints(place, score=nearest_first, about=folders.identity(opened))
        lost = if_lost(partial(after_loss, opened))
        with graceful_stop() as stop, opening as checkpoints, lost:
            # nothing is lost yet
            with nullcontext() if are_several() else stop.obeyed_at_once():
                given = opened, display, tuner, initial, checkpoints, schedule
                progress, seconds = begin_at(*given, resume_from=resume_from)
            step = int(progress.state.step)
            forget_later(opened.path, step, schedule)
            asked = loggers if is_first() else ()
            with open_loggers(asked, opened, title, after_step=step or -1) as logger:
                run = Run(
                    opened, title, model, initial, policy_of, save_trained, target, collector,
                    tuner, schedule, divergences, aim, metrics, exact, rng_key, checkpoints, logger,
                    display, kept, stop, stop_if_unsaved, base_card,
                )  # fmt: skip
                records = read_metrics(opened.path)
                kept.records |= by_step(records, "evaluation")
                if exact is not None and not by_step(records, "target"):
                    logger.log(as_target_record(exact))
                display.start(title, opened, schedule.steps, tuner, model.params, resumed_at=step)
                return _train(run, progress, seconds)


def _opened(
    folder: str | Path | OpenRun, values: dict[str, Any], model: Model, resume: bool
) -> AbstractContextManager[OpenRun]:
    """As it is if it is open already; else with these values, to compare on resuming."""
    if isinstance(folder, OpenRun):
        if resume and not folder.resume:
            raise ValueError(f"{folder.path} was opened for a new run: open_run(resume=True).")
        return nullcontext(folder)
    digests = {"model": digest_params(model.params)}
    return folders.open_run(folder, values, resume=resume, digests=digests)


def _distance_of(objective: str, kept: Kept, metrics: dict) -> float:
    """Of a checkpoint: what metrics.jsonl says of its step, in the one unit of the run."""
    _, known = distances(kept.records, objective)
    return known.get(int(metrics.get("step", -1)), np.inf)


def _train(run: Run, progress: Progress, seconds: float) -> Result:
    schedule, begun = run.schedule, time.monotonic() - seconds
    step = int(progress.state.step)
    enough = False
    # Of a resumed run, what the stop kept from being done.
    if step < schedule.steps and step % schedule.eval_every == 0:
        with suppress(AskedToStop):
            if step not in run.kept.records:
                evaluate_now(run, progress, step, begun)
            enough = step > 0 and _is_enough(run)
    shown = {"headline": run.target.headline, "divergence": run.stepper.divergence}
    with run.display.progress("align", total=schedule.steps, completed=step, **shown) as bar:
        while step < schedule.steps and not is_stopping(run) and not enough:
            if run.stepper.finished(progress):
                break
            try:
                with at_once(run, progress, begun):
                    progress, figures = run.stepper.step(progress, step)
            except AskedToStop:
                break
            step += 1
            _show_step(run, progress, step, figures, begun, bar)
            if step % schedule.eval_every == 0 and step < schedule.steps:
                with suppress(AskedToStop):
                    evaluate_now(run, progress, step, begun)
                save(run, progress, begun)
                if not is_stopping(run) and _is_enough(run):
                    break
            elif step % schedule.checkpoint_every == 0:
                save(run, progress, begun)
    if not is_stopping(run):
        with suppress(AskedToStop):
            figures, params = _finish(run, progress, step, begun)
            return Result(0, step, figures, run.folder, params)
    save(run, progress, begun, last=True)
    run.display.stopped(step, run.folder)
    params = run.policy_of(progress.state.params)
    return Result(128 + run.stop.signal, step, {}, run.folder, params)


def _show_step(
    run: Run,
    progress: Progress,
    step: int,
    figures: Mapping[str, Any],
    begun: float,
    bar: Callable[[int, dict], None],
) -> None:
    """What a step was like, wherever that is kept and shown.

    Raises:
        RunError: if it was not finite; the run is saved before.
    """
    drawn = drawn_by(run.stepper, progress, step)
    record = {"kind": "step", "step": step, "samples": drawn, **figures}
    record["seconds"] = time.monotonic() - begun
    run.logger.log(record)
    bar(step, record)
    if (warning := collapse(record)) is not None:
        run.display.warn(f"Step {step}. {warning}")
    if not record["finite"]:
        save(run, progress, begun, last=True)
        raise RunError(_not_finite(run, step))


def _is_enough(run: Run) -> bool:
    """Whether the distance or patience ends the run here, and says so."""
    schedule = run.schedule
    unit, known = distances(run.kept.records, run.aim.objective)
    found = [value for step, value in sorted(known.items()) if step > 0]
    name = title_of(unit)
    newest = known.get(max(run.kept.records), np.inf)
    if schedule.stop_below is not None and newest < schedule.stop_below:
        limit = schedule.stop_below
        run.display.say(f"{name} is {newest:.4f}, below {limit:g} (--stop-below): done.")
        return True
    since = len(found) - 1 - int(np.argmin(found)) if found else 0
    if schedule.patience is not None and since >= schedule.patience:
        run.display.say(
            f"No lower {name} in the last {since} evaluations, with a patience of "
            f"{schedule.patience} (--patience): done."
        )
        return True
    return False


def nearest(run: Run) -> int | None:
    """The saved step nearest to the target; None where that is known of none."""
    _, known = distances(run.kept.records, run.aim.objective)
    saved = (step for step in run.checkpoints.steps if step in known)
    return min(saved, key=known.__getitem__, default=None)


def _finish(
    run: Run, progress: Progress, step: int, begun: float
) -> tuple[dict[str, Estimate], Params]:
    """The last evaluation, and the policy that is exported; pictures and the report on the way."""
    if step not in run.kept.records:
        after = evaluate_now(run, progress, step, begun)
        save(run, progress, begun, last=True)
    else:  # the distance or patience ended it at an evaluation
        after = measure_policy(run, progress, step, begun)
    best, trained = _nearest_params(run, progress, step)
    params = run.policy_of(trained)
    run.checkpoints.wait()
    with at_once(run, progress, begun):  # everything is saved, and a resumed run does it again
        _export(run, params, trained)
        card.write(run.folder, best, run.base_card)
        plots.write(run.folder, run.aim)
        report.write(run.folder)
    records = read_metrics(run.folder)
    evaluations, of_p = by_step(records, "evaluation"), of_target(records)
    check = check_bound(after, run.target.bound)
    seconds = time.monotonic() - begun
    run.display.summary(evaluations, after, of_p, run.aim, check, run.folder, seconds)
    if best != step:
        unit, _ = distances(run.kept.records, run.aim.objective)
        run.display.say(
            f"The model is that of step {best}, where {title_of(unit)} was lowest; the table is of "
            f"step {step}."
        )
    return after.figures, params


def _export(run: Run, params: Params, trained: Params) -> None:
    """The aligned model, and before it the adapters; what a killed export left is deleted."""
    adapters = ADAPTERS, run.save_trained, trained
    for name, write, tree in (adapters, (MODEL, run.model.save, params)):
        for left in run.folder.glob(f".{name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        if write is not None:
            whole = fetch(tree) if are_several() else tree
            if is_first():
                write(run.folder / name, whole)


def _nearest_params(run: Run, progress: Progress, step: int) -> tuple[int, Params]:
    """The saved step that is nearest to the target, and what was trained by then.

    The last one where that checkpoint is damaged.
    """
    best = nearest(run)
    if best in (None, step):
        return step, progress.state.params
    try:
        restored = run.checkpoints.restore(as_tree(progress, 0.0), step=best)
        return best, restored["state"].params
    except OSError as error:
        run.display.warn(
            f"{error} The model is that of the last step, {step}, though it was nearer at step "
            f"{best}."
        )
        return step, progress.state.params


def _not_finite(run: Run, step: int) -> str:
    return (
        f"The gradient of step {step} was not finite. The parameters were left as they were and "
        f"saved in {run.folder / CHECKPOINTS}. To go on: lower the learning rate "
        f"(--learning-rate); and where the divergence is infinite since the target is 0 somewhere, "
        f"as reverse KL is, bound f' with clip=(-8, 8) (--clip -8 8), smooth the target, or take "
        f"another divergence (--divergence)."
    )
