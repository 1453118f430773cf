"""Runs beside one another as a Markdown table, and what they write before and after: python -m
experiments tabulate --help."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from fjax.runs import card
from fjax.runs.endings import leave
from fjax.runs.names import title_of
from fjax.runs.reading import read_config, read_evaluations, read_samples

from ..common.arguments import check_numbers
from ..common.command import run
from ..compare.results import label_of

DEFAULT = (
    "satisfaction",
    "kl_to_base",
    "entropy",
    "distinct_2",
    "forward_kl",
    "total_variation",
    "jensen_shannon",
    "log_z",
)


@dataclass(frozen=True)
class Config:
    """Print the last evaluation of several runs as a Markdown table, with standard errors, samples
    and seconds; and with --samples what each writes, before and after, side by side.

    Examples:

        python -m experiments tabulate runs/lexical_constraint/amazing-*
        python -m experiments tabulate runs/rlhf/beta-1-reverse_kl --samples 16
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    figures: tuple[str, ...] = DEFAULT
    """Which figures, by their names in metrics.jsonl."""
    samples: int | None = None
    """Show so many samples of each run's first evaluation beside those of its last: the same
    prompts where there are prompts, and not chosen by what they say."""

    def __post_init__(self):
        check_numbers(self)
        if not self.runs:
            raise ValueError("Name at least one run folder.")


def run_tabulate(config: Config) -> int:
    """One row a run, after a row for the base model of the first."""
    header = ["", *(title_of(name) for name in config.figures), "samples drawn", "seconds"]
    rows = [
        header,
        ["---"] * len(header),
        row("base model", read_evaluations(config.runs[0])[0], config.figures),
    ]
    for folder in config.runs:
        label = label_of(read_config(folder, "divergence"))
        rows.append(row(label, read_evaluations(folder)[-1], config.figures))
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
    for folder in config.runs:
        if config.samples is not None:
            steps = [record["step"] for record in read_evaluations(folder)]
            beside = card.beside(read_samples(folder), steps[0], steps[-1], config.samples)
            print(f"\n{folder.name}:\n\n{beside}")
    return 0


def row(title: str, record: dict, figures: tuple[str, ...]) -> list[str]:
    """Title, figures with their errors, samples and seconds."""
    cells = [
        _cell(*(float(record.get(key, "nan")) for key in (name, f"{name}_std_error")))
        for name in figures
    ]
    return [title, *cells, f"{record['samples']:,}", f"{record['seconds']:.0f}"]


def _cell(value: float, error: float) -> str:
    if math.isnan(value):  # unknown, or no figure of this run
        return "–"
    digits = 4 if abs(value) < 0.1 else 3 if abs(value) < 1 else 1
    spread = f" ± {error:.{digits}f}" if error == error and abs(error) < float("inf") else ""
    return f"{value:z.{digits}f}{spread}"


main = partial(run, Config, run_tabulate, name="tabulate", computes=False)

if __name__ == "__main__":
    leave(main())
