"""An objective in a word, and the flags of the task that it stands for."""

import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from fjax.divergences import by_name

from ..common.settings import MINIMISED

ALGORITHMS = tuple(MINIMISED)


class Objective(NamedTuple):
    """What tables call it, and what the task is given."""

    label: str
    flags: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """The label as part of a path."""
        return re.sub(r"[^\w.+-]+", "-", self.label).strip("-")


def parse_objectives(texts: Sequence[str]) -> list[Objective]:
    """One a text.

    Raises:
        ValueError: if one is none, or two would share a folder.
    """
    objectives = [parse_objective(text) for text in texts]
    labels: dict[str, str] = {}
    for objective in objectives:
        place = objective.file_name.lower()
        if place in labels:
            raise ValueError(
                f"--objectives {labels[place]!r} and {objective.label!r} would share a folder: "
                f"give each its own label."
            )
        labels[place] = objective.label
    return objectives


def parse_objective(text: str) -> Objective:
    """From a divergence, ``alpha=0.5``, an algorithm, or ``label: --flag value``.

    Raises:
        ValueError: if it is none of these.
    """
    if ":" in text:
        return _labelled(text)
    if text in ALGORITHMS:
        return Objective(text, ("--algorithm", text, "--divergence", MINIMISED[text]))
    try:
        by_name(text)
    except ValueError as error:
        raise ValueError(
            f"--objectives are a divergence, {', '.join(ALGORITHMS)}, or "
            f'"label: --flag value" with flags of the task; got {text!r}. {error}'
        ) from error
    return Objective(text, ("--divergence", text))


def _labelled(text: str) -> Objective:
    label, _, rest = text.partition(":")
    try:
        flags = tuple(shlex.split(rest))
    except ValueError as error:
        raise ValueError(
            f"--objectives {text!r} has flags that cannot be read: {error}."
        ) from error
    objective = Objective(label.strip(), flags)
    if not objective.file_name or not flags or not flags[0].startswith("--"):
        raise ValueError(
            f'--objectives with a colon are "label: --flag value --flag value"; got {text!r}.'
        )
    return objective
