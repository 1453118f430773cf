"""How near any saved model is to any target: python -m experiments.evaluate --help."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from . import _display, _evaluate
from ._arguments import FolderOrName
from ._command import run
from ._loop import EVALUATION_KEY, NO_STEP, TARGET_KEY, Prepared, draw_base, draw_for_evaluation
from ._programs import Contexts, load_aligned, load_model, make_programs
from ._run_folder import check_output, write_text
from ._settings import Settings, reported_divergences
from .conditional import config as conditional_config
from .conditional import run as conditional
from .gender_balance import config as gender_config
from .gender_balance import run as gender
from .lexical_constraint import config as lexical_config
from .lexical_constraint import run as lexical
from .sentiment_reward import config as sentiment_config
from .sentiment_reward import run as sentiment

Task = (
    Annotated[lexical_config.Config, tyro.conf.subcommand("lexical_constraint")]
    | Annotated[sentiment_config.Config, tyro.conf.subcommand("sentiment_reward")]
    | Annotated[gender_config.Config, tyro.conf.subcommand("gender_balance")]
    | Annotated[conditional_config.Config, tyro.conf.subcommand("conditional")]
)


@dataclass(frozen=True)
class Config:
    """Evaluate a saved model against a target: divergences with standard errors, KL from the base,
    entropy, diversity.

    The target is that of an experiment, named after the options of this command and configured as
    there; its --model is the base model, --eval-samples and --max-new-tokens say how many samples
    to draw, and how long. Nothing is trained.

    Examples:

        python -m experiments.evaluate --aligned runs/.../model lexical_constraint --word great
        python -m experiments.evaluate --aligned my/folder sentiment_reward --beta 0.5
        --eval-samples 4096 python -m experiments.evaluate --aligned my/folder lexical_constraint
        --help
    """

    aligned: FolderOrName
    """The model to evaluate: a folder, or a name on the hub. It must have the base model's shape
    and tokenizer."""
    task: tyro.conf.OmitArgPrefixes[Task]
    """Whose target."""
    output: Path | None = None
    """A JSON file of the figures, too."""


def make_target(task, prepared: Prepared) -> _evaluate.Target:
    """The target of a task's configuration."""
    if isinstance(task, gender_config.Config):
        return gender.make_target(task, prepared)
    if isinstance(task, sentiment_config.Config):
        return sentiment.make_target(task)
    if isinstance(task, conditional_config.Config):
        return conditional.make_target(task)
    return lexical.make_target(task)


def make_contexts(task, model) -> Contexts | None:
    """The prompts of a conditional task."""
    return (
        conditional.make_contexts(task, model)
        if isinstance(task, conditional_config.Config)
        else None
    )


def main(config: Config) -> int:
    """Draws from both models, estimates, and prints the one beside the other."""
    check_output(config.output, "--output")
    settings: Settings = config.task.settings
    display = _display.Display()
    base = load_model(settings)
    aligned = load_aligned(settings, base, config.aligned)
    programs = make_programs(settings, base, make_contexts(config.task, base))
    key = jax.random.key(settings.seed)
    prepared = Prepared(
        settings, Path(), base, programs, jax.random.fold_in(key, TARGET_KEY), display
    )
    target = make_target(config.task, prepared)
    rng_key, divergences = jax.random.fold_in(key, EVALUATION_KEY), reported_divergences(settings)
    known = (
        draw_base(prepared, target, jax.random.fold_in(rng_key, NO_STEP))
        if programs.z_rounds
        else None
    )
    found = []
    for i, model in enumerate((base, aligned)):
        drawn = draw_for_evaluation(prepared, model.params, target, jax.random.fold_in(rng_key, i))
        found.append(_evaluate.evaluate(programs, model.params, target, drawn, known, divergences))
        known = known or _evaluate.make_base(*drawn)
    before, after = found
    display.beside(
        _evaluate.as_record(before, 0, 0.0, 0), after, target, first="base", last=config.aligned
    )
    if config.output is not None:
        record = {name: figure._asdict() for name, figure in after.figures.items()}
        write_text(
            config.output,
            json.dumps(
                {"aligned": config.aligned, "samples": after.samples, "figures": record}, indent=2
            ),
        )
    return 0


if __name__ == "__main__":
    sys.exit(run(Config, main, module="experiments.evaluate"))
