"""What finished runs wrote, read back; and their mean and spread over seeds."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fjax.runs import RunError
from fjax.runs.folder import MAY_CHANGE
from fjax.runs.reading import by_step, of_target, read_config, read_metrics

from .plan import Place

COMPARED = {"divergence", "alpha", "algorithm", "seed"}
"""Settings that are expected to differ."""
NOTES = {
    "aim",
    "versions",
    "devices",
    "command",
    "digests",
    "tensorboard",
    "wandb_project",
    "wandb_mode",
}
"""What config.json has that no step depends on, beside what --resume may change."""


class Result(NamedTuple):
    """A finished run: its configuration, its records in order of steps, and figures of exact
    samples of p, where it was measured by some."""

    place: Place
    config: dict
    evaluations: list[dict]
    steps: list[dict]
    of_p: dict | None = None

    @property
    def last(self) -> dict:
        """The evaluation at its end."""
        return self.evaluations[-1]


class Spread(NamedTuple):
    """Mean over seeds and standard deviation between them; of one seed its value, and NaN."""

    mean: float
    deviation: float


class Curve(NamedTuple):
    """A figure against samples or seconds: mean over seeds and standard deviation between them (NaN
    where there is one)."""

    at: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def read_result(place: Place) -> Result:
    """A run's folder.

    Raises:
        RunError: if it has no metrics, or no evaluation.
    """
    config, records = read_config(place.folder), read_metrics(place.folder)
    evaluations, steps = (list(by_step(records, k).values()) for k in ("evaluation", "step"))
    if not evaluations:
        raise RunError(f"{place.folder} has no evaluation yet.")
    return Result(place, config, evaluations, steps, of_target(records))


def place_of(folder: Path, labels: dict[str, str]) -> Place:
    """What a run is called: by its folder's name if that is like LABEL-seed0, else by what it
    minimised.

    Args:
        folder: of the run.
        labels: what file names stand for, as in compare.json.

    Raises:
        RunError: if it is no run folder.
    """
    config = read_config(folder, "seed", "divergence")
    named = re.fullmatch(r"(.+)-seed(-?\d+)", folder.name)
    label = labels.get(named[1], named[1]) if named else label_of(config)
    return Place(label, config["seed"], folder)


def label_of(config: dict) -> str:
    """An objective in a word, from a run's configuration."""
    if config.get("algorithm", "fdpg") != "fdpg":
        return config["algorithm"]
    label = config["divergence"]
    if label == "alpha":  # of a run from before the value was a part of the name
        label = f"alpha={config['alpha']:g}"
    clip = f", f' clipped to {config['clip']}" if config.get("clip") else ""
    return label + clip + (", adaptive proposal" if config.get("proposal") == "adaptive" else "")


def check_distinct(places: Sequence[Place]) -> None:
    """Each label has each seed once.

    Raises:
        RunError: if not.
    """
    seen: dict[tuple[str, int], Path] = {}
    for place in places:
        other = seen.setdefault((place.label, place.seed), place.folder)
        if other != place.folder:
            raise RunError(
                f"{other} and {place.folder} are both {place.title}. Rename one folder to "
                f"LABEL-seed{place.seed}, "
                "with a label of its own."
            )


def by_label(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each objective, in the order in which they were named."""
    groups = defaultdict(list)
    for result in results:
        groups[result.place.label].append(result)
    return dict(groups)


def figures_of_p(results: Sequence[Result]) -> dict | None:
    """Of exact samples of p; None where no run had any, or not all had the same."""
    found = {json.dumps(result.of_p, sort_keys=True) for result in results if result.of_p}
    return json.loads(found.pop()) if len(found) == 1 else None


def spread(values: Sequence[float]) -> Spread:
    """Of one figure over seeds. One that is infinite makes the mean so, one that is unknown makes
    it unknown."""
    values = [float(value) for value in values]
    if not np.isfinite(values).all():
        return Spread(math.nan if np.isnan(values).any() else float(np.sum(values)), math.nan)
    return Spread(
        float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    )


def curve(runs: Sequence[Sequence[dict]], name: str) -> Curve:
    """Of one figure against samples, from the records of each seed; where it is infinite or unknown
    for one of them, NaN."""
    at = by_samples(runs, name)
    return _curve(list(at), list(at.values()))


def curve_of_time(runs: Sequence[Sequence[dict]], name: str) -> Curve:
    """The same against seconds: those that the seeds took to the same step, on average."""
    seconds, values = by_step_of(runs, "seconds"), by_step_of(runs, name)
    return _curve([spread(taken).mean for taken in seconds.values()], list(values.values()))


def _curve(at: Sequence[float], values: Sequence[Sequence[float]]) -> Curve:
    spreads = [spread(of_seeds) for of_seeds in values]
    mean = np.array([s.mean if math.isfinite(s.mean) else math.nan for s in spreads])
    return Curve(np.array(at), mean, np.array([s.deviation for s in spreads]))


def by_samples(runs: Sequence[Sequence[dict]], name: str) -> dict[int, list[float]]:
    """Samples drawn, in order -> the figure then, a value for each run that has a record there: the
    last, for stages learn many times from what was drawn."""
    return _grouped([{r["samples"]: r for r in records} for records in runs], name)


def by_step_of(runs: Sequence[Sequence[dict]], name: str) -> dict[int, list[float]]:
    """Steps, in order -> the figure then, a value for each run that has a record of it."""
    return _grouped([{r["step"]: r for r in records} for records in runs], name)


def _grouped(runs: Sequence[dict[int, dict]], name: str) -> dict[int, list[float]]:
    at = defaultdict(list)
    for records in runs:
        for number, record in records.items():
            at[number].append(float(record.get(name, math.nan)))
    return dict(sorted(at.items()))


def differing_settings(results: Sequence[Result]) -> dict[str, dict[str, list[str]]]:
    """Setting -> value -> labels with it, of those that the runs do not share although they are not
    what is compared."""
    shared = (
        set.intersection(*(set(result.config) for result in results))
        - COMPARED
        - NOTES
        - MAY_CHANGE
    )
    differing = {}
    for name in sorted(shared):
        values = defaultdict(list)
        for result in results:
            labels = values[json.dumps(result.config[name])]
            if result.place.label not in labels:
                labels.append(result.place.label)
        if len(values) > 1:
            differing[name] = dict(values)
    return differing
