"""How near any saved model is to any target: python -m experiments evaluate --help."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import jax
import tyro

from fjax.evaluation import draw_base, draw_scored, make_base, measure
from fjax.runs import Display
from fjax.runs.aim import aim_of
from fjax.runs.distance import check_bound
from fjax.runs.endings import leave
from fjax.runs.folder import write_text
from fjax.runs.records import as_record, as_target_record
from fjax.runs.running import EVALUATION_KEY, NO_STEP

from ..common.arguments import FolderOrName, check_output
from ..common.build import (
    contexts_of,
    load_aligned,
    load_model,
    make_built,
    reported_divergences,
)
from ..common.command import run
from ..common.exact import exact_of
from ..common.inputs import input_digests
from ..common.settings import Settings
from ..tasks import TASKS

ONLINE = tuple(task for task in TASKS if task.make_stepper is None)
if TYPE_CHECKING:
    TaskConfig = Any
else:
    TaskConfig = Union[  # noqa: UP007 - of as many as there are
        tuple(Annotated[task.config, tyro.conf.subcommand(task.name)] for task in ONLINE)
    ]


@dataclass(frozen=True)
class Config:
    """Evaluate a saved model against a target: divergences with standard errors, KL from the base,
    entropy, diversity.

    The target is that of an experiment, named after the options of this command and configured as
    there; its --model is the base model, --eval-samples and --max-new-tokens say how many samples
    to draw, and how long. Nothing is trained.

    Examples:

        python -m experiments evaluate --aligned runs/.../model \\
            lexical_constraint --word great
        python -m experiments evaluate --aligned my/folder \\
            sentiment_reward --beta 0.5 --eval-samples 4096
        python -m experiments evaluate --aligned my/folder \\
            lexical_constraint --help
    """

    aligned: FolderOrName
    """The model to evaluate: a folder, or a name on the hub. It must have the base model's shape
    and tokenizer."""
    task: tyro.conf.OmitArgPrefixes[TaskConfig]
    """Whose target."""
    output: Path | None = None
    """Write the figures to this JSON file, too."""


def run_evaluate(config: Config) -> int:
    """Draws from both models, estimates, and prints the one beside the other."""
    check_output(config.output, "--output")
    (task,) = (task for task in ONLINE if isinstance(config.task, task.config))
    settings: Settings = config.task.settings
    make_target, display = task.make_target(config.task), Display()
    base = load_model(settings)
    aligned = load_aligned(settings, base, config.aligned)
    built = make_built(settings, base, contexts_of(task, config.task, base), display)
    target, collector, samples = make_target(built), built.collector, settings.eval_samples
    rng_key = jax.random.fold_in(jax.random.key(settings.seed), EVALUATION_KEY)
    known = None
    if collector.z_rounds:
        with display.counting("estimate Z") as progress:
            key = jax.random.fold_in(rng_key, NO_STEP)
            known = draw_base(collector, base.params, target, key, samples, progress=progress)
    exact = exact_of(config.task, built, target, input_digests(config.task, base, None))
    divergences, found = reported_divergences(settings), []
    for i, model in enumerate((base, aligned)):
        key = jax.random.fold_in(rng_key, i)
        with display.counting("evaluate") as progress:
            drawn = draw_scored(collector, model.params, target, key, samples, progress=progress)
        given = collector, model.params, target, drawn, known
        found.append(measure(*given, exact=exact, divergences=divergences))
        known = known or make_base(*drawn)
    before, after = found
    check = check_bound(after, target.bound)
    record, aim = (
        as_record(before.figures, 0, 0.0, 0),
        aim_of(target, divergences, settings.divergence),
    )
    of_p = None if exact is None else as_target_record(exact)
    display.beside(record, after, aim, check, first="base", last=config.aligned, of_p=of_p)
    if config.output is not None:
        figures = {name: figure._asdict() for name, figure in after.figures.items()}
        written = {"aligned": config.aligned, "samples": len(after.samples.texts)}
        write_text(config.output, json.dumps(written | {"figures": figures}, indent=2))
    return 0


main = partial(run, Config, run_evaluate, name="evaluate")

if __name__ == "__main__":
    leave(main())
