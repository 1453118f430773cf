"""What can be set on the command line of this experiment."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..common.arguments import check_numbers
from ..tasks import TASKS
from .objectives import parse_objectives

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(task.name for task in TASKS)]

OURS = ("--seed", "--run-folder", "--resume")
"""Flags of a task that the comparison gives itself."""


@dataclass(frozen=True)
class Config:
    """Compare objectives on one task over several seeds, and write the figures of this literature
    and a table.

    Every objective with every seed is a run of the task in a process of its own. Runs that are
    complete are not run again and interrupted ones go on, so after Ctrl-C, a failure, or with one
    more objective or seed, the same command does what is left. What stands after -- goes to the
    task as it is.

    An objective is one of

        jensen_shannon, alpha=0.5, ...  --divergence of that name
        rloo, ppo, filter_sft           --algorithm of that name, with its --divergence
        "any label: --flag value"       those flags of the task

    Examples:

        python -m experiments.compare --task lexical_constraint \\
            --objectives jensen_shannon forward_kl total_variation \\
            "reverse_kl clipped: --divergence reverse_kl --clip -8 8" \\
            --seeds 0 1 2 --jobs 2 -- --word great --steps 90
        python -m experiments.compare --task sentiment_reward \\
            --objectives reverse_kl rloo ppo alpha=0.25 alpha=0.75
        python -m experiments.compare --task gender_balance \\
            --objectives forward_kl "adaptive proposal: --proposal adaptive"
        python -m experiments.compare --task preference_pairs \\
            --objectives "dpo: --loss dpo" "chi_po: --loss chi_po"
        python -m experiments.compare --task sentiment_reward --only-report
        python -m experiments.compare --task lexical_constraint \\
            --runs runs/lexical_constraint/great-*
    """

    task: TaskName
    """The experiment that is run."""
    objectives: tuple[str, ...] = ()
    """What is compared, as above."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each objective is run with each of them; tables and curves show the mean and the spread."""
    jobs: int = 1
    """Runs side by side, each on its share of the cores: small models get more done that way. Leave
    it at 1 where the runs would have to share a GPU or TPU."""
    folder: Path | None = None
    """Where everything goes. Without it runs/compare/TASK-0, TASK-1 and so on, one for each other
    list of arguments after --; with --only-report the newest of them."""
    figures: tuple[str, ...] = ()
    """Columns of the table, by their names in metrics.jsonl. Without it, those that papers
    report."""
    only_report: bool = False
    """Run nothing; make table and figures of the runs that are there, all of the folder if no
    --objectives are given."""
    runs: tuple[Path, ...] = ()
    """Folders of more finished runs of the task, made elsewhere. They are labelled by their names,
    if these are like LABEL-seed0, or else by what they minimised."""
    arguments: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="-- ARGUMENTS")
    ] = ()
    """For the task, after --, as in -- --word great --steps 90."""

    def __post_init__(self):
        check_numbers(self)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"--seeds must be at least one, and each once; got "
                f"{' '.join(map(str, self.seeds)) or 'none'}."
            )
        if not (self.objectives or self.only_report or self.runs):
            raise ValueError(
                "Name what to compare with --objectives, as in --objectives jensen_shannon "
                "forward_kl."
            )
        given = [
            *self.arguments,
            *(flag for objective in parse_objectives(self.objectives) for flag in objective.flags),
        ]
        taken = [word for word in given if word.split("=")[0].replace("_", "-") in OURS]
        if taken:
            raise ValueError(
                f"{taken[0]} is given to each run by the comparison; choose with --seeds and "
                f"--folder instead."
            )
