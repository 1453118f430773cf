"""Plans the runs, makes those that are left, and reports on all of them."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from fjax.runs import RunError
from fjax.runs.aim import read_aim
from fjax.runs.folder import locked, write_text
from fjax.runs.reading import is_begun, is_finished

from ..common.command import called
from ..tasks import TASKS
from . import plots, table
from .config import Config
from .objectives import parse_objectives
from .plan import (
    Place,
    Plan,
    default_folder,
    is_complete,
    make_plans,
    places,
    read_notes,
)
from .processes import run_all
from .results import check_distinct, place_of, read_result


def main(config: Config) -> int:
    """Runs and reports; the exit status is 0 for a whole comparison, 1 with runs missing, 128 +
    signal if stopped."""
    elsewhere = [place_of(path, {}) for path in config.runs]
    folder = config.folder or default_folder(config)
    if config.only_report:
        wanted = [*_existing(config, folder), *elsewhere]
        done = [place for place in wanted if is_finished(place.folder)]
    else:
        plans = make_plans(config, folder)
        wanted = [*(plan.place for plan in plans), *elsewhere]
        check_distinct(wanted)
        stopped = _make(config, folder, plans)
        if stopped:
            print(
                f"Stopped. The same command goes on; what is there so far: --only-report --folder "
                f"{folder}"
            )
            return 128 + stopped
        done = [plan.place for plan in plans if is_complete(plan)]
        done += [place for place in elsewhere if is_finished(place.folder)]
    check_distinct(wanted)
    return report(config, folder, done, [place for place in wanted if place not in done])


def _make(config: Config, folder: Path, plans: Sequence[Plan]) -> int | None:
    """Makes all runs that are left; gives the signal that stopped it, if one did."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _take_notes(config, folder)
        left = [plan for plan in plans if not is_complete(plan)]
        if not left:
            return None
        print(
            f"{len(left)} of {len(plans)} runs are to be made, {config.jobs} at a time. Everything "
            f"is written to {folder}."
        )
        return run_all(left, jobs=config.jobs)


def _take_notes(config: Config, folder: Path) -> None:
    """compare.json: what --only-report and the next command want to know."""
    labels = read_notes(folder).get("labels", {})
    labels |= {
        objective.file_name: objective.label for objective in parse_objectives(config.objectives)
    }
    command = shlex.join(called("compare"))
    notes = {
        "task": config.task,
        "arguments": config.arguments,
        "command": command,
        "labels": labels,
    }
    write_text(folder / "compare.json", json.dumps(notes, indent=2))


def _existing(config: Config, folder: Path) -> list[Place]:
    """What --only-report is about: the objectives named, or else all runs of the folder."""
    if config.objectives:
        return places(folder, parse_objectives(config.objectives), config.seeds)
    labels = read_notes(folder).get("labels", {})
    found = [place_of(path, labels) for path in sorted(folder.glob("*-seed*")) if is_begun(path)]
    order = {label: i for i, label in enumerate(labels.values())}
    return sorted(
        found, key=lambda place: (order.get(place.label, len(order)), place.label, place.seed)
    )


def report(config: Config, folder: Path, done: Sequence[Place], missing: Sequence[Place]) -> int:
    """Writes table.md and the pictures, and prints the table; the exit status says whether a run is
    missing.

    Raises:
        RunError: if there is nothing to report on.
    """
    if not done:
        raise RunError(f"There is no finished run of {config.task} in {folder} to report on.")
    results = [read_result(place) for place in done]
    headlines = next(task.headlines for task in TASKS if task.name == config.task)
    headlines = headlines or read_aim(results[0].config).headlines
    figures = config.figures or (*headlines, *table.REPORTED)
    unknown = [
        name for name in config.figures if not any(name in result.last for result in results)
    ]
    if unknown:
        print(
            f"No run has the figures {', '.join(unknown)}; they are left out. There are "
            f"{', '.join(_names(results[0].last))}."
        )
    command = read_notes(folder).get("command", shlex.join(called("compare")))
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.write(folder, results, headlines)
    write_text(
        folder / "table.md", table.page(config.task, command, results, missing, figures, pictures)
    )
    print(
        "\n".join([*table.rows(results, missing, figures), "", *table.notes(results, missing), ""])
    )
    print(f"Written to {folder}: table.md, {', '.join(pictures)}.")
    return 1 if missing else 0


def _names(record: dict) -> list[str]:
    """Figures of an evaluation."""
    return [name.removesuffix("_std_error") for name in record if name.endswith("_std_error")]
