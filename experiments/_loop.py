"""The one host loop: draw, score, update; evaluate, save and show on the way; stop cleanly when told to."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fjax
from fjax._typing import Params
from fjax.models import PretrainedModel
from fjax.training import Checkpoints, JsonlLogger, read_jsonl

from . import _display, _evaluate, _plots
from ._programs import Batch, Programs, export, load_model, make_programs
from ._run_folder import RunError, check_space, open_run
from ._settings import Settings, as_json

EVALUATION_KEY, TARGET_KEY = 2**31 - 1, 2**31 - 2
"""Folded into the run's key for evaluations and for fitting a target, where no step's key is."""


class Prepared(NamedTuple):
    """What there is to fit a target with, before the first step; ``rng_key`` is for its samples."""

    settings: Settings
    folder: Path
    model: PretrainedModel
    programs: Programs
    rng_key: jax.Array
    display: _display.Display


class Run(NamedTuple):
    """What stays the same throughout a run."""

    settings: Settings
    folder: Path
    target: _evaluate.Target
    model: PretrainedModel
    programs: Programs
    rng_key: jax.Array
    checkpoints: Checkpoints
    logger: JsonlLogger
    display: _display.Display
    base_drawn: list[Batch]


class Stop:
    """Set by Ctrl-C and SIGTERM, read between steps; a second Ctrl-C interrupts at once."""

    signal: int | None = None


@contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Within it, the first SIGINT or SIGTERM only asks to stop."""
    stop = Stop()

    def ask(number, _):
        stop.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def align(
    settings: Settings, make_target: Callable[[Prepared], _evaluate.Target], *, config, experiment: str, title: str
) -> int:
    """Runs an experiment from the command line's choices to the exported model; returns the exit status.

    Args:
        settings: what all experiments share.
        make_target: called once with the loaded model, so that a target may be fitted to its samples.
        config: the experiment's whole configuration, for config.json.
        experiment: its name, the folder of its runs.
        title: of this run.
    """
    display = _display.Display()
    display.say("Loading the model.")
    model = load_model(settings)
    folder = open_run(as_json(config), experiment=experiment, title=title)
    check_space(folder, sum(leaf.size for leaf in jax.tree.leaves(model.params)))
    programs = make_programs(settings, model)
    with graceful_stop() as stop, Checkpoints(folder / "checkpoints", score=_nearest_first) as checkpoints:
        state, seconds = _begin(settings, programs, model, checkpoints)
        step = int(state.step)
        rng_key = jax.random.key(settings.seed)
        target = make_target(Prepared(settings, folder, model, programs, jax.random.fold_in(rng_key, TARGET_KEY), display))
        with JsonlLogger(folder / "metrics.jsonl", after_step=step or -1) as logger:
            run = Run(settings, folder, target, model, programs, rng_key, checkpoints, logger, display, [])
            display.start(title, folder, settings, model, resumed_at=step)
            if step:
                run.base_drawn.extend(_draw_for_evaluation(run, model.params, 0))
            return _train(run, state, seconds, stop)


def _nearest_first(metrics: dict) -> float:
    return metrics["distance"]


def _begin(settings, programs, model, checkpoints) -> tuple[fjax.TrainState, float]:
    state = programs.tuner.init(model.params)
    if not settings.resume or checkpoints.latest is None:
        return state, 0.0
    restored = checkpoints.restore(_tree(state, 0.0))
    return restored["state"], float(restored["seconds"])


def _train(run: Run, state: fjax.TrainState, seconds: float, stop: Stop) -> int:
    settings, begun = run.settings, time.monotonic() - seconds
    step = int(state.step)
    if step < settings.steps and step not in evaluations(read_jsonl(run.folder / "metrics.jsonl")):
        _evaluate_now(run, state, step, begun)
    with run.display.progress("align", total=settings.steps, completed=step, headline=run.target.headline) as bar:
        while step < settings.steps and not stop.signal:
            state, record = _one_step(run, state, step, begun)
            step += 1
            run.logger.log(record)
            bar(step, record)
            if not record["finite"]:
                _save(run, state, begun)
                raise RunError(_not_finite(run, step))
            if step % settings.eval_every == 0 and step < settings.steps:
                _evaluate_now(run, state, step, begun)
                _save(run, state, begun)
                if _is_enough(run):
                    break
            elif step % settings.checkpoint_every == 0:
                _save(run, state, begun)
    if stop.signal:
        _save(run, state, begun)
        run.checkpoints.wait()
        run.display.stopped(step, run.folder)
        return 128 + stop.signal
    _finish(run, state, step, begun)
    return 0


def _one_step(run: Run, state: fjax.TrainState, step: int, begun: float) -> tuple[fjax.TrainState, dict]:
    batch = run.programs.draw(state.params, jax.random.fold_in(run.rng_key, step))
    features = run.target.features(run.programs.decode(batch))
    log_score = run.target.log_score(np.asarray(batch.log_a), features)
    rollout = fjax.Rollout(batch.tokens, batch.where, batch.log_q, jnp.asarray(log_score))
    state, info = run.programs.tuner.update(state, rollout)
    info = jax.device_get(info)
    record = {"kind": "step", "step": step + 1, "samples": (step + 1) * run.settings.samples}
    record |= {name: np.mean(values[: batch.from_policy], dtype=float) for name, values in features.items()}
    for name, value in info._asdict().items():
        if isinstance(value, fjax.Estimate):
            record |= {name: value.value, f"{name}_std_error": value.std_error, f"{name}_ess": value.ess}
        else:
            record[name] = value.item()
    return state, record | {"seconds": time.monotonic() - begun}


def draw_fresh(run: Run | Prepared, params: Params, rng_key: jax.Array, samples: int, *, what: str) -> list[Batch]:
    """At least so many samples in whole batches, with a bar."""
    batches = -(-samples // run.settings.samples)
    with run.display.progress(what, total=batches, completed=0) as bar:
        counter = iter(range(1, batches + 1))
        return _evaluate.draw_batches(run.programs, params, rng_key, batches, lambda: bar(next(counter), {}))


def _draw_for_evaluation(run: Run, params: Params, step: int) -> list[Batch]:
    """The fresh batches of a step's evaluation; those of step 0 are the base model's, and drawn again on resume."""
    rng_key = jax.random.fold_in(jax.random.fold_in(run.rng_key, EVALUATION_KEY), step)
    return draw_fresh(run, params, rng_key, run.settings.eval_samples, what="evaluate")


def _evaluate_now(run: Run, state: fjax.TrainState, step: int, begun: float) -> _evaluate.Evaluation:
    """Evaluates, and puts the figures and samples wherever they are kept and shown."""
    settings = run.settings
    drawn = _draw_for_evaluation(run, state.params, step)
    evaluation = _evaluate.evaluate(run.programs, state.params, run.target, drawn, run.base_drawn)
    if step == 0:
        run.base_drawn.extend(drawn)
    record = _evaluate.as_record(evaluation, step, time.monotonic() - begun, step * settings.samples)
    run.logger.log(record)
    with JsonlLogger(run.folder / "samples.jsonl", after_step=step - 1) as samples:
        for i, text in enumerate(evaluation.texts[:64]):
            samples.log({"step": step, "text": text} | {k: v[i] for k, v in evaluation.features.items()})
    if step < settings.steps:  # the last is shown by the summary, beside the first
        run.display.evaluation(evaluation, step, run.target)
    if run.target.bound and step == 0 and evaluation.figures[run.target.bound].value == 0:
        _absent(run, evaluation.samples)
    return evaluation


def _absent(run: Run, samples: int) -> None:
    """The constraint held for no sample of the base model: says what is known of its rate, and goes on or gives up."""
    known = (
        f"None of {samples} samples of the base model satisfies the constraint: with 95 % confidence its rate is below "
        f"{3 / samples:.2g}, and log Z below {np.log(3 / samples):.1f}."
    )
    if run.target.stop_if_absent:
        raise RunError(f"{known} Look for the spelling that the model uses, or raise --eval-samples and --samples.")
    run.display.warn(f"{known} Until a sample does, Z is unknown and steps change nothing; more --samples find one sooner.")


def _save(run: Run, state: fjax.TrainState, begun: float) -> None:
    """A checkpoint, with the distance from the target if the step was evaluated; the nearest one is kept."""
    step = int(state.step)
    measured = distances(run).get(step, np.nan)
    metrics = {"distance": measured} if np.isfinite(measured) else None
    run.checkpoints.save(step, _tree(state, time.monotonic() - begun), metrics=metrics)


def _tree(state: fjax.TrainState, seconds: float) -> dict:
    return {"state": state, "seconds": np.asarray(seconds)}


def distances(run: Run) -> dict[int, float]:
    """Of the target, by the steps that were evaluated so far."""
    records = evaluations(read_jsonl(run.folder / "metrics.jsonl"))
    return {step: _evaluate.distance(record, run.settings.divergence) for step, record in records.items()}


def _is_enough(run: Run) -> bool:
    """Whether --stop-below or --patience ends the run here, and says so."""
    found, settings = [value for step, value in sorted(distances(run).items()) if step > 0], run.settings
    if settings.stop_below is not None and found[-1] < settings.stop_below:
        run.display.say(f"The divergence is {found[-1]:.4f}, below --stop-below {settings.stop_below:g}: done.")
        return True
    since = len(found) - 1 - int(np.argmin(found))
    if settings.patience is not None and since >= settings.patience:
        run.display.say(f"No lower divergence in the last {since} evaluations (--patience {settings.patience}): done.")
        return True
    return False


def _finish(run: Run, state: fjax.TrainState, step: int, begun: float) -> None:
    if step not in distances(run):
        after = _evaluate_now(run, state, step, begun)
        _save(run, state, begun)
    else:  # --stop-below or --patience ended it at an evaluation
        drawn = _draw_for_evaluation(run, state.params, step)
        after = _evaluate.evaluate(run.programs, state.params, run.target, drawn, run.base_drawn)
    best = run.checkpoints.best
    nearest = state if best in (None, step) else run.checkpoints.restore(_tree(state, 0.0), step=best)["state"]
    run.checkpoints.wait()
    export(run.folder / "model", nearest.params, run.model)
    records = read_jsonl(run.folder / "metrics.jsonl")
    _plots.write(run.folder, records, run.target)
    run.display.summary(evaluations(records), after, run.target, run.folder, time.monotonic() - begun)
    if nearest is not state:
        run.display.say(f"The model is that of step {best}, where the divergence was lowest; the table is of step {step}.")


def evaluations(records: list[dict]) -> dict[int, dict]:
    """Evaluation records by step; where a resumed run repeated one, the later."""
    return {record["step"]: record for record in records if record["kind"] == "evaluation"}


def _not_finite(run: Run, step: int) -> str:
    advice = "lower --learning-rate"
    if run.settings.divergence == "reverse_kl" and run.settings.clip is None:
        advice = (
            "reverse KL is infinite where the target is 0; bound it with --clip -8 8, smooth the target, or take another "
            "--divergence"
        )
    return (
        f"The gradient of step {step} was not finite. The parameters were left as they were and saved in "
        f"{run.folder / 'checkpoints'}. To go on: {advice}."
    )
