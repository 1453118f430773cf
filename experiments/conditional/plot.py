"""Satisfaction prompt by prompt, runs beside one another:
python -m experiments.conditional.plot --help.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro

from fjax.runs import RunError
from fjax.runs.endings import leave
from fjax.runs.plots import STYLE, per_context
from fjax.runs.reading import read_config, read_contexts

from ..common.arguments import check_output
from ..common.command import run

PARTS = ("hardest third", "middle third", "easiest third")


@dataclass(frozen=True)
class Config:
    """Draw the satisfaction of each unseen prompt, of the base model against the aligned one, for
    runs of this experiment.

    Examples:

        python -m experiments.conditional.plot \\
            runs/conditional/repeats-jensen_shannon-0 \\
            runs/conditional/repeats-jensen_shannon-global-z-0
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    output: Path = Path("normalizers.png")
    """The picture."""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("Name at least one run folder.")


def read(folder: Path) -> tuple[str, list[dict]]:
    """What a run's Z is, and its contexts.

    Raises:
        RunError: if it is no finished run of this experiment.
    """
    try:
        config, records = read_config(folder, "normalizer"), read_contexts(folder)
        records = [_with_rate(record) for record in records]
    except (KeyError, RunError) as error:
        raise RunError(f"{folder} is no run of conditional with an evaluation: {error}.") from error
    if not records:
        raise RunError(f"{folder} has no evaluation yet.")
    return config["normalizer"], records


def _with_rate(record: dict) -> dict:
    """Before the first step satisfaction is Z_c, of many more samples than an evaluation has of one
    prompt."""
    satisfaction = math.exp(record["log_z"]) if record["step"] == 0 else record["satisfaction"]
    return record | {"satisfaction": satisfaction}


def by_thirds(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Mean satisfaction before and after of the prompts where it was lowest, middling and highest
    before."""
    first, last = (
        {r["prompt"]: r["satisfaction"] for r in records if r["step"] == end}
        for end in (0, records[-1]["step"])
    )
    order = np.array_split(sorted(first, key=lambda prompt: first[prompt]), 3)

    def means(part):
        return np.array([np.mean([part[prompt] for prompt in prompts]) for prompts in order])

    return means(first), means(last)


def draw(config: Config) -> int:
    """Draws, and prints the means."""
    check_output(config.output, "--output")
    found = [read(folder) for folder in config.runs]
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, len(found) + 1, figsize=(4.2 * (len(found) + 1), 4.2))
        for i, (name, records) in enumerate(found):
            per_context(axes[i], records, "satisfaction", label="an unseen prompt", color=f"C{i}")
            axes[i].set(
                title=f"{name} Z",
                xlabel="satisfaction of the base model",
                ylabel="of the aligned model",
                ylim=(-0.03, 1.05),
            )
        width = 0.8 / (len(found) + 1)
        before, _ = by_thirds(found[0][1])
        axes[-1].bar(
            np.arange(3) - 0.4 + width / 2, before, width, color="grey", label="base model"
        )
        for i, (name, records) in enumerate(found):
            _, after = by_thirds(records)
            axes[-1].bar(
                np.arange(3) - 0.4 + width * (i + 1.5),
                after,
                width,
                color=f"C{i}",
                label=f"{name} Z",
            )
            shares = (f"{part} {share:.3f}" for part, share in zip(PARTS, after, strict=True))
            print(f"{name} Z: {', '.join(shares)}")
        axes[-1].set_xticks(range(3), PARTS)
        axes[-1].set(
            title="by how easy it is for the base model", ylabel="mean satisfaction", ylim=(0, 1.12)
        )
        axes[-1].legend(
            frameon=False, ncols=3, loc="upper center", columnspacing=0.8, handlelength=1
        )
        figure.savefig(config.output)
        plt.close(figure)
    print(f"The picture is {config.output}.")
    return 0


main = partial(run, Config, draw, name="conditional.plot", computes=False)

if __name__ == "__main__":
    leave(main())
