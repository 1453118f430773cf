"""What is to be run: every objective with every seed, checked against the task and against what is
there already."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fjax.runs import RunError
from fjax.runs.folder import check_same
from fjax.runs.reading import (
    by_step,
    current_step,
    is_begun,
    is_finished,
    read_config,
    read_json,
    read_metrics,
)

from ..common import arguments as command_lines
from ..common.command import PROGRAM
from ..common.settings import as_json
from ..tasks import TASKS
from .config import Config
from .objectives import Objective, parse_objectives


class Place(NamedTuple):
    """A run by what it is called, and where it is."""

    label: str
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        """Of objective and seed."""
        return f"{self.label}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.with_name(self.folder.name + ".log")


class Plan(NamedTuple):
    """A run to be made: its command without --resume, and the configuration that the task makes of
    it; and how many steps it takes, unless it stops early."""

    place: Place
    command: list[str]
    config: dict
    steps: int


def places(folder: Path, objectives: Sequence[Objective], seeds: Sequence[int]) -> list[Place]:
    """Of a whole comparison: all objectives with the first seed, then with the next."""
    return [
        Place(o.label, seed, folder / f"{o.file_name}-seed{seed}")
        for seed in seeds
        for o in objectives
    ]


def make_plans(config: Config, folder: Path) -> list[Plan]:
    """All runs of a comparison.

    Raises:
        RunError: if the task does not take the flags, or a folder has something else in it.
    """
    objectives = {objective.label: objective for objective in parse_objectives(config.objectives)}
    parsed = {
        label: parse(config.task, (*config.arguments, *o.flags), label)
        for label, o in objectives.items()
    }
    plans = []
    for place in places(folder, list(objectives.values()), config.seeds):
        values, steps = parsed[place.label]
        command = [
            sys.executable,
            "-m",
            __name__.replace("compare.plan", config.task),
            *config.arguments,
            *objectives[place.label].flags,
        ]
        command += ["--seed", str(place.seed), "--run-folder", str(place.folder)]
        plans.append(
            Plan(
                place,
                command,
                values | {"seed": place.seed, "run_folder": str(place.folder)},
                steps,
            )
        )
    for plan in plans:
        _check_folder(plan)
    return plans


def parse(task: str, arguments: Sequence[str], label: str) -> tuple[dict, int]:
    """What the task would make of its command line, and its number of steps; found out in this
    process, before minutes are lost.

    Raises:
        RunError: if it would refuse it.
    """
    (task_config,) = (known.config for known in TASKS if known.name == task)
    try:
        config = command_lines.parse(task_config, f"{PROGRAM} {task}", arguments)
        return as_json(config), config.settings.all_steps
    except ValueError as error:
        raise RunError(f"{task} refuses the objective {label!r}: {error}") from error
    except SystemExit as exit:
        if not exit.code:  # --help
            raise
        raise RunError(f"{task} refuses the objective {label!r} for the reason above.") from None


def _check_folder(plan: Plan) -> None:
    folder = plan.place.folder
    if is_begun(folder):
        try:
            check_same(folder, plan.config)
        except RunError as error:
            raise RunError(
                f"{error} In a comparison, that is another --folder or another label."
            ) from error
        if current_step(folder) > plan.steps:
            raise RunError(
                f"{folder} has taken more than --steps {plan.steps} already. Ask for more, or give "
                f"another --folder."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} holds something else than a run. Give another --folder.")


def is_complete(plan: Plan) -> bool:
    """Whether nothing is left to do: all steps are taken, or it stopped early by the very rules
    that are asked for."""
    folder = plan.place.folder
    if not is_finished(folder):
        return False
    saved = read_config(folder)
    rules = plan.config.keys() & {"steps", "eval_every", "stop_below", "patience"}
    last = max(by_step(read_metrics(folder), "evaluation"), default=0)
    return last >= plan.steps or all(saved.get(name) == plan.config[name] for name in rules)


def default_folder(config: Config) -> Path:
    """The newest comparison of this task with the same arguments, or for --only-report the newest;
    else a new one.

    Raises:
        RunError: if there is none to report on.
    """
    base = Path("runs") / "compare"
    numbers = [path.name.removeprefix(f"{config.task}-") for path in base.glob(f"{config.task}-*")]
    taken = sorted(int(number) for number in numbers if number.isdecimal())
    for number in reversed(taken):
        folder = base / f"{config.task}-{number}"
        # Without objectives it is about runs made elsewhere, and no comparison's table is to be
        # lost for theirs.
        same = config.objectives and read_notes(folder).get("arguments") == list(config.arguments)
        if config.only_report or same:
            return folder
    if config.only_report:
        raise RunError(
            f"There is no comparison {base / config.task}-* to report on. Name one with --folder."
        )
    return base / f"{config.task}-{taken[-1] + 1 if taken else 0}"


def read_notes(folder: Path) -> dict:
    """What a comparison wrote down about itself: task, arguments, command, and the label of each
    file name."""
    path = folder / "compare.json"
    notes = read_json(path) if path.is_file() else {}
    if not isinstance(notes.get("labels", {}), dict):
        raise RunError(f"{path} is damaged: its labels are {type(notes['labels']).__name__}.")
    return notes
