"""The one host loop: draw, score, update; evaluate, save and show on the way; stop cleanly when
told to."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from fjax.models import PretrainedModel
from fjax.training import Checkpoints, JsonlLogger, Logger, read_jsonl
from fjax.types import Params

from . import _display, _evaluate, _plots, _report
from ._endings import AskedToStop, Stop, graceful_stop
from ._inputs import input_digests
from ._loggers import check_loggers, open_loggers
from ._programs import Batch, Contexts, Programs, export, load_aligned, load_model, make_programs
from ._run_folder import RunError, check_none_saved, check_space, describe_run, last_step, open_run
from ._settings import Settings, as_json, reported_divergences
from ._steps import Progress, Stepper, online

EVALUATION_KEY, TARGET_KEY = 2**31 - 1, 2**31 - 2
"""Folded into the run's key for evaluations and for fitting a target, where no step's key is."""

NO_STEP = 2**31 - 1
"""In place of its number, for samples of the base model that no step's evaluation shares."""


class Prepared(NamedTuple):
    """What there is to make a target with, before the first step; ``rng_key`` is for its
    samples."""

    settings: Settings
    folder: Path
    model: PretrainedModel
    programs: Programs
    rng_key: jax.Array
    display: _display.Display


class Kept:
    """What an evaluation leaves for those after it: samples of the base model, and the records of
    all, by step."""

    base: _evaluate.Base | None = None

    def __init__(self):
        self.records: dict[int, dict] = {}


class Run(NamedTuple):
    """What stays the same throughout a run."""

    settings: Settings
    folder: Path
    target: _evaluate.Target
    model: PretrainedModel
    programs: Programs
    stepper: Stepper
    rng_key: jax.Array
    checkpoints: Checkpoints
    logger: Logger
    display: _display.Display
    kept: Kept
    stop: Stop


def align(
    settings: Settings,
    make_target: Callable[[Prepared], _evaluate.Target],
    *,
    config,
    experiment: str,
    title: str,
    make_contexts: Callable[[PretrainedModel], Contexts] | None = None,
    make_stepper: Callable[[Prepared], Stepper] | None = None,
) -> int:
    """Runs an experiment from the command line's choices to the exported model; returns the exit
    status.

    Args:
        settings: what all experiments share.
        make_target: called once with the loaded model, so that a target may be fitted to its
            samples.
        config: the experiment's whole configuration, for config.json.
        experiment: its name, the folder of its runs.
        title: of this run.
        make_contexts: the prompts of a conditional target.
        make_stepper: how to move, if not by samples of the policy.
    """
    check_loggers(settings)
    display = _display.Display()
    display.say("Loading the model.")
    model = load_model(settings)
    begin_at = model if settings.start is None else load_aligned(settings, model, settings.start)
    contexts = None if make_contexts is None else make_contexts(model)
    programs = make_programs(settings, model, contexts)
    digests = input_digests(config, model, None if settings.start is None else begin_at)
    with open_run(as_json(config), experiment=experiment, title=title, digests=digests) as folder:
        check_space(folder, sum(leaf.size for leaf in jax.tree.leaves(model.params)))
        rng_key = jax.random.key(settings.seed)
        prepared = Prepared(
            settings, folder, model, programs, jax.random.fold_in(rng_key, TARGET_KEY), display
        )
        target = make_target(prepared)
        stepper = (
            online(settings, programs, target, rng_key)
            if make_stepper is None
            else make_stepper(prepared)
        )
        if not settings.resume:
            describe_run(folder, as_json(config), experiment=experiment, digests=digests)
        kept = Kept()
        nearest_first = partial(_distance_of, settings, kept)
        with (
            graceful_stop() as stop,
            Checkpoints(folder / "checkpoints", score=nearest_first) as checkpoints,
        ):
            progress, seconds = _begin(
                prepared, stepper, programs.tuner.init(begin_at.params), checkpoints
            )
            step = int(progress.state.step)
            _forget_later(settings, folder, step)
            with open_loggers(
                settings, as_json(config), folder, title, after_step=step or -1
            ) as logger:
                run = Run(
                    settings,
                    folder,
                    target,
                    model,
                    programs,
                    stepper,
                    rng_key,
                    checkpoints,
                    logger,
                    display,
                    kept,
                    stop,
                )
                kept.records |= evaluations(read_jsonl(folder / "metrics.jsonl"))
                of_base = settings.samples - programs.policy_samples if make_stepper is None else 0
                display.start(title, folder, settings, model, resumed_at=step, of_base=of_base)
                return _train(run, progress, seconds)


def _distance_of(settings: Settings, kept: Kept, metrics: dict) -> float:
    """Of a checkpoint, by its step: what counts is what metrics.jsonl says of it, in the one unit
    of the run."""
    _, known = _evaluate.distances(kept.records, settings.divergence)
    return known.get(int(metrics.get("step", -1)), np.inf)


def _begin(
    prepared: Prepared, stepper: Stepper, state, checkpoints: Checkpoints
) -> tuple[Progress, float]:
    """Step 0, or the newest checkpoint that is whole."""
    progress = stepper.begin(state)
    if not prepared.settings.resume:
        return progress, 0.0
    restored = _restore(prepared, _tree(progress, 0.0), checkpoints)
    if restored is None:
        return progress, 0.0
    progress = _from_tree(restored, progress)
    step, known = int(progress.state.step), last_step(prepared.folder)
    if known < step:
        prepared.display.warn(
            f"metrics.jsonl ends at step {known}, the checkpoint is of step {step}: what was "
            f"between is lost."
        )
    stepper.go_on(progress)
    return progress, float(restored["seconds"])


def _restore(prepared: Prepared, like: dict, checkpoints: Checkpoints) -> dict | None:
    """The newest checkpoint that is not damaged, those that are being set aside; None where none
    was saved yet.

    Raises:
        RunError: if there is none, although there must have been one.
    """
    damaged = []
    for step in reversed(checkpoints.steps):
        try:
            restored = checkpoints.restore(like, step=step)
        except ValueError as error:
            raise RunError(
                f"{error} Resume with the fjax and the settings that saved it, or start another "
                f"run."
            ) from error
        except OSError as error:
            prepared.display.warn(str(error))
            damaged.append(step)
            continue
        for bad in damaged:
            prepared.display.warn(
                f"Going on from step {step}; the damaged one is now {checkpoints.set_aside(bad)}."
            )
        return restored
    if damaged:
        raise RunError(
            f"All checkpoints of {prepared.folder} are damaged. Delete it, and begin anew without "
            f"--resume."
        )
    check_none_saved(prepared.folder, as_json(prepared.settings))
    return None


def _train(run: Run, progress: Progress, seconds: float) -> int:
    settings, begun = run.settings, time.monotonic() - seconds
    step = int(progress.state.step)
    enough = False
    # of a resumed run, what the stop kept from being done
    if step < settings.steps and step % settings.eval_every == 0:
        with suppress(AskedToStop):
            if step not in run.kept.records:
                _evaluate_now(run, progress, step, begun)
            enough = step > 0 and _is_enough(run)
    with run.display.progress(
        "align", total=settings.steps, completed=step, headline=run.target.headline
    ) as bar:
        while step < settings.steps and not run.stop.signal and not enough:
            progress, figures = run.stepper.step(progress, step)
            step += 1
            record = {
                "kind": "step",
                "step": step,
                "samples": step * run.stepper.samples,
                **figures,
            }
            record["seconds"] = time.monotonic() - begun
            run.logger.log(record)
            bar(step, record)
            if not record["finite"]:
                _save(run, progress, begun)
                raise RunError(_not_finite(run, step))
            if step % settings.eval_every == 0 and step < settings.steps:
                with suppress(AskedToStop):
                    _evaluate_now(run, progress, step, begun)
                _save(run, progress, begun)
                if not run.stop.signal and _is_enough(run):
                    break
            elif step % settings.checkpoint_every == 0:
                _save(run, progress, begun)
    if not run.stop.signal:
        with suppress(AskedToStop):
            _finish(run, progress, step, begun)
            return 0
    _save(run, progress, begun)
    run.checkpoints.wait()
    run.display.stopped(step, run.folder)
    return 128 + run.stop.signal


def draw_fresh(
    run: Run | Prepared,
    params: Params,
    rng_key: jax.Array,
    batches: int,
    *,
    what: str,
    turn: int = 1,
) -> list[Batch]:
    """So many batches, every ``turn``-th of the same prompts, with a bar."""
    with run.display.progress(what, total=batches, completed=0) as bar:
        counter = iter(range(1, batches + 1))
        return _evaluate.draw_batches(
            run.programs, params, rng_key, batches, turn, lambda: bar(next(counter), {})
        )


def draw_for_evaluation(
    run: Run | Prepared, params: Params, target: _evaluate.Target, rng_key: jax.Array
) -> tuple[_evaluate.Scored, _evaluate.Scored]:
    """As many fresh samples of the policy as are asked for, and those of the base model that come
    with them."""
    samples, turn = run.settings.eval_samples, _turn(run)
    rounds = -(-samples // (turn * run.programs.policy_samples))
    drawn = draw_fresh(run, params, rng_key, rounds * turn, what="evaluate", turn=turn)
    return _evaluate.score(run.programs, target, drawn, samples)


def draw_base(run: Run | Prepared, target: _evaluate.Target, rng_key: jax.Array) -> _evaluate.Base:
    """Samples of the base model for all evaluations; with contexts, those that the Z of each is
    estimated from."""
    if not run.programs.z_rounds:
        return _evaluate.make_base(*draw_for_evaluation(run, run.model.params, target, rng_key))
    batches = run.programs.z_rounds * _turn(run)
    drawn = draw_fresh(run, run.model.params, rng_key, batches, what="estimate Z", turn=_turn(run))
    return _evaluate.make_base(
        *_evaluate.score(run.programs, target, drawn, batches * run.settings.samples)
    )


def _turn(run: Run | Prepared) -> int:
    """How many batches continue all the prompts of an evaluation: with few samples, the first of
    them alone."""
    return min(
        run.programs.unseen_batches, -(-run.settings.eval_samples // run.programs.policy_samples)
    )


def _evaluation_key(run: Run, step: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(run.rng_key, EVALUATION_KEY), step)


def _base(run: Run, step: int) -> _evaluate.Base | None:
    """What evaluations share; None where that of step 0, still to be made, is of the base model and
    will be shared."""
    if run.settings.start is not None or run.programs.z_rounds:
        return draw_base(run, run.target, _evaluation_key(run, NO_STEP))
    return draw_base(run, run.target, _evaluation_key(run, 0)) if step else None


def _evaluate_now(run: Run, progress: Progress, step: int, begun: float) -> _evaluate.Evaluation:
    """Evaluates, and puts the figures and samples wherever they are kept and shown."""
    settings = run.settings
    evaluation = _measure(run, progress, step)
    record = _evaluate.as_record(
        evaluation, step, time.monotonic() - begun, step * run.stepper.samples
    )
    run.logger.log(record)
    run.kept.records[step] = record
    _keep_samples(run.folder, evaluation, step)
    if step < settings.steps:  # the last is shown by the summary, beside the first
        run.display.evaluation(evaluation, step, run.target)
    if (
        run.target.bound
        and step == 0
        and settings.start is None
        and evaluation.figures[run.target.bound].value == 0
    ):
        _absent(run, evaluation)
    return evaluation


def _forget_later(settings: Settings, folder: Path, step: int) -> None:
    """Drops what comes again: samples of later steps, from where on the files are only added to,
    and the evaluation that ended a run which now goes on, unless it was due at that step anyway. So
    a run in parts is as one in whole."""
    ended = 0 < step < settings.steps and step % settings.eval_every > 0
    try:
        for path in (folder / f"{name}.jsonl" for name in ("samples", "contexts")):
            if path.exists():
                JsonlLogger(path, after_step=step - ended if step else -1).close()
        path = folder / "metrics.jsonl"
        if ended and path.exists():
            taken = [
                record
                for record in read_jsonl(path)
                if record["step"] == step and record["kind"] == "step"
            ]
            with JsonlLogger(path, after_step=step - 1) as logger:
                for record in taken:
                    logger.log(record)
    except ValueError as error:
        raise RunError(
            f"A file of the run is damaged. {error} Mend or delete that line."
        ) from error


def _keep_samples(folder: Path, evaluation: _evaluate.Evaluation, step: int) -> None:
    """Some samples, from all contexts; and with contexts, the means of each."""
    with JsonlLogger(folder / "samples.jsonl") as samples:
        for i in np.linspace(0, evaluation.samples - 1, min(64, evaluation.samples)).astype(int):
            prompt = {"prompt": evaluation.prompts[i]} if evaluation.prompts[i] else {}
            samples.log(
                {"step": step, **prompt, "text": evaluation.texts[i]}
                | {k: v[i] for k, v in evaluation.features.items()}
            )
    if evaluation.log_z is None:
        return
    with JsonlLogger(folder / "contexts.jsonl") as contexts:
        means = {
            k: v.reshape(evaluation.contexts, -1).mean(axis=1)
            for k, v in evaluation.features.items()
        }
        for i, prompt in enumerate(
            evaluation.prompts[:: evaluation.samples // evaluation.contexts]
        ):
            contexts.log(
                {"step": step, "prompt": prompt, "log_z": evaluation.log_z[i]}
                | {k: v[i] for k, v in means.items()}
            )


def _measure(run: Run, progress: Progress, step: int) -> _evaluate.Evaluation:
    params, kept, divergences = progress.state.params, run.kept, reported_divergences(run.settings)
    with run.stop.obeyed_at_once():  # it may take minutes, and changes nothing
        kept.base = kept.base or _base(run, step)
        drawn = draw_for_evaluation(run, params, run.target, _evaluation_key(run, step))
        evaluation = _evaluate.evaluate(
            run.programs, params, run.target, drawn, kept.base, divergences
        )
        kept.base = kept.base or _evaluate.make_base(*drawn)
        return evaluation


def _absent(run: Run, evaluation: _evaluate.Evaluation) -> None:
    """The constraint held for no sample of the base model: says what is known of its rate, and goes
    on or gives up."""
    if evaluation.log_z is not None and np.isfinite(evaluation.log_z).any():
        return  # it did for one of those that Z is from
    samples = evaluation.samples
    known = (
        f"None of {samples} samples of the base model satisfies the constraint: with 95 % "
        f"confidence its rate is below {3 / samples:.2g}, and log Z below "
        f"{np.log(3 / samples):.1f}."
    )
    if run.target.stop_if_absent:
        raise RunError(
            f"{known} Look for the spelling that the model uses, or raise --eval-samples and "
            f"--samples."
        )
    run.display.warn(
        f"{known} Until a sample does, Z is unknown and steps change nothing; more --samples find "
        f"one sooner."
    )


def _save(run: Run, progress: Progress, begun: float) -> None:
    """A checkpoint; its step is what it is found by in the records, so that the nearest is kept
    beside the newest."""
    step = int(progress.state.step)
    run.checkpoints.save(
        step, _tree(progress, time.monotonic() - begun), metrics={"step": float(step)}
    )


def _tree(progress: Progress, seconds: float) -> dict:
    """The arrays of a progress, and the seconds that it took."""
    tree = {"state": progress.state, "seconds": np.asarray(seconds)}
    if progress.proposal is not None:
        tree["proposal"] = progress.proposal
    if progress.ahead is not None:
        tree["ahead"] = [x for x in progress.ahead[:-1] if x is not None]
    return tree


def _from_tree(tree: dict, like: Progress) -> Progress:
    ahead = like.ahead
    if ahead is not None:
        arrays = iter(tree["ahead"])
        ahead = Batch(
            *(None if x is None else next(arrays) for x in ahead[:-1]),
            from_policy=ahead.from_policy,
        )
    return Progress(tree["state"], tree.get("proposal"), ahead)


def distances(run: Run) -> dict[int, float]:
    """From the target, by the steps at which it is known."""
    return _evaluate.distances(run.kept.records, run.settings.divergence)[1]


def _is_enough(run: Run) -> bool:
    """Whether --stop-below or --patience ends the run here, and says so."""
    settings = run.settings
    unit, known = _evaluate.distances(run.kept.records, settings.divergence)
    found, name = (
        [value for step, value in sorted(known.items()) if step > 0],
        _evaluate.NAMES[unit],
    )
    newest = known.get(max(run.kept.records), np.inf)
    if settings.stop_below is not None and newest < settings.stop_below:
        run.display.say(
            f"{name} is {newest:.4f}, below --stop-below {settings.stop_below:g}: done."
        )
        return True
    since = len(found) - 1 - int(np.argmin(found)) if found else 0
    if settings.patience is not None and since >= settings.patience:
        run.display.say(
            f"No lower {name} in the last {since} evaluations (--patience {settings.patience}): "
            f"done."
        )
        return True
    return False


def nearest(run: Run) -> int | None:
    """The saved step at which the policy was nearest to the target; None where that is known of
    none."""
    known = distances(run)
    return min(
        (step for step in run.checkpoints.steps if step in known),
        key=known.__getitem__,
        default=None,
    )


def _finish(run: Run, progress: Progress, step: int, begun: float) -> None:
    if step not in run.kept.records:
        after = _evaluate_now(run, progress, step, begun)
        _save(run, progress, begun)
    else:  # --stop-below or --patience ended it at an evaluation
        after = _measure(run, progress, step)
    best, params = _nearest_params(run, progress, step)
    run.checkpoints.wait()
    export(run.folder / "model", params, run.model)
    records = read_jsonl(run.folder / "metrics.jsonl")
    _plots.write(run.folder, records, run.target)
    _report.write(run.folder)
    run.display.summary(
        evaluations(records), after, run.target, run.folder, time.monotonic() - begun
    )
    if best != step:
        unit, _ = _evaluate.distances(run.kept.records, run.settings.divergence)
        run.display.say(
            f"The model is that of step {best}, where {_evaluate.NAMES[unit]} was lowest; the "
            f"table is of step {step}."
        )


def _nearest_params(run: Run, progress: Progress, step: int) -> tuple[int, Params]:
    """The saved step that is nearest to the target, and the policy there; the last one where that
    checkpoint is damaged."""
    best = nearest(run)
    if best in (None, step):
        return step, progress.state.params
    try:
        return best, run.checkpoints.restore(_tree(progress, 0.0), step=best)["state"].params
    except OSError as error:
        run.display.warn(
            f"{error} The model is that of the last step, {step}, though it was nearer at step "
            f"{best}."
        )
        return step, progress.state.params


def evaluations(records: list[dict]) -> dict[int, dict]:
    """Evaluation records by step; where a resumed run repeated one, the later."""
    return {record["step"]: record for record in records if record["kind"] == "evaluation"}


def _not_finite(run: Run, step: int) -> str:
    advice = "lower --learning-rate"
    if run.settings.divergence == "reverse_kl" and run.settings.clip is None:
        advice = (
            "reverse KL is infinite where the target is 0; bound it with --clip -8 8, smooth the "
            "target, or take another --divergence"
        )
    return (
        f"The gradient of step {step} was not finite. The parameters were left as they were and "
        f"saved in {run.folder / 'checkpoints'}. To go on: {advice}."
    )
