"""Samples of an aligned model nearer its target, by quasi-rejection:
python -m experiments generate --help.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fjax.estimators import Estimate, over_contexts
from fjax.rejection import RejectionEstimate
from fjax.rollouts import Collector
from fjax.runs import RunError
from fjax.runs.endings import leave
from fjax.runs.text import on_one_line
from fjax.training import JsonlLogger

from ..common.arguments import FolderOrName, check_numbers, check_output
from ..common.build import load_aligned, load_model
from ..common.command import run
from ..tasks import TASKS
from .quasi_rejection import (
    Accepted,
    Proposals,
    beta_of_rate,
    collect,
    estimate,
    feature_means,
    propose,
)
from .rejection_costs import Cost, Half, costs, plot
from .target_of_run import Wanted, make_wanted, of_run, of_task, of_word, proposing

if TYPE_CHECKING:
    TaskConfig = Any
else:
    TaskConfig = Union[
        (
            *(Annotated[task.config, tyro.conf.subcommand(task.name)] for task in TASKS),
            Annotated[None, tyro.conf.subcommand("of-run-or-word")],
        )
    ]


@dataclass(frozen=True)
class Config:
    """Sample from an aligned model, and accept by quasi-rejection towards its target.

    A proposal x of the model π is kept with probability min(1, P(x)/(β π(x))). What is kept is
    within TV ≤ 1 - Z_β/Z of the target p; a larger β is closer to it and keeps less. Of a hard
    constraint every text that is kept satisfies it. The target is that of a run (--run), or of any
    task, named and configured behind the options of this command; --word is short for that of
    lexical_constraint. With prompts, each has a target and a β of its own.

    Examples:

        python -m experiments generate --run runs/sentiment_reward/...
        python -m experiments generate --run runs/rlhf/... \\
            --prompts my_prompts.txt --acceptance-rate 0.2
        python -m experiments generate --word amazing \\
            --model runs/lexical_constraint/amazing-jensen_shannon-0/model
        python -m experiments generate --model runs/.../model --samples 100 \\
            moments --target mine:about_food --moment 0.5
    """

    task: tyro.conf.OmitArgPrefixes[TaskConfig] = None
    """Whose target, if not that of a run or of a word; its --model is the base model."""
    run: Path | None = None
    """Folder of a run, whose target, base model and lengths are taken."""
    model: FolderOrName | None = None
    """Folder of the aligned model, the proposals' distribution. Without it that of --run."""
    word: str | None = None
    """The word it was aligned to, if the target is that of lexical_constraint."""
    base: FolderOrName | None = None
    """The model it was aligned from, if not as the run or the task has it; of a word the built-in
    one."""
    prompts: Path | None = None
    """Prompts to continue, a file as the task takes them. Without it those that it evaluates
    on."""
    max_prompts: int = 8
    """How many of the prompts to continue, the first ones."""
    samples: int = 10
    """How many to accept, of each prompt where there are prompts."""
    acceptance_rate: float = 0.1
    """Share of the proposals to keep; β is chosen from the first of them, for each prompt."""
    log_beta: float | None = None
    """log β itself, the same for all prompts, in place of --acceptance-rate."""
    max_proposals: int = 20_000
    """Proposals after which it gives up, of each prompt."""
    batch_size: int = 128
    """Proposals at once."""
    max_new_tokens: int | None = None
    """Longest sample, in tokens, if not as in the alignment; of a word 40."""
    seed: int = 0
    """Seed of everything random."""
    output: Path | None = None
    """Write the accepted texts to this file too, as JSON lines."""
    plot: Path | None = None
    """Draw acceptance rate and bound against β into this file, too: predicted by half of the
    proposals, and found in the other. Of one target, so without prompts."""

    def __post_init__(self):
        check_numbers(self)
        given = [self.run is not None, self.word is not None, self.task is not None]
        if sum(given) != 1:
            names = ", ".join(task.name for task in TASKS)
            raise ValueError(
                f"Say once which target is meant: --run FOLDER, --word WORD, or a task with its "
                f"options behind those of this command ({names})."
            )
        if self.model is None and self.run is None:
            raise ValueError("--model must be the folder of the aligned model.")
        if self.word is not None and not self.word.strip():
            raise ValueError("--word must not be empty.")


def wanted_by(config: Config) -> Wanted:
    """Task, configuration and models that the command line stands for."""
    if config.run is not None:
        wanted = of_run(config.run)
    elif config.word is not None:
        wanted = of_word(config.word)
    else:
        wanted = of_task(config.task)
    return wanted.instead(config.model, config.base, config.max_new_tokens)


def generate(config: Config) -> int:
    """Proposes, accepts, prints, and says what it cost and how close it is."""
    check_output(config.output, "--output")
    check_output(config.plot, "--plot")
    wanted = wanted_by(config)
    make_target = wanted.task.make_target(wanted.config)  # what is wrong with it is said at once
    base = load_model(wanted.settings)
    aligned = load_aligned(wanted.settings, base, wanted.model)
    target, contexts = make_wanted(wanted, make_target, base, config.prompts)
    if contexts is not None and config.plot is not None:
        raise RunError("--plot draws one target, and each prompt has one of its own; leave it out.")
    collector = proposing(wanted, base, contexts, config.batch_size, config.max_prompts)
    console = Console(width=None if sys.stdout.isatty() else 110)
    draw = partial(propose, collector, target, aligned.params, config.seed)
    found = _collect_all(config, console, draw, _numbers(collector))
    if all(np.isnan(one.log_beta) for one in found):
        raise RunError(
            f"None of {sum(one.proposals for one in found)} proposals is possible under the target "
            f"{target.description or wanted.task.name}. Is this the model that was aligned to it?"
        )
    _write(config, found, collector)
    if contexts is None:
        _show_alone(console, config, found[0])
    else:
        _show_prompts(console, config, found, collector)
    return 0


def _numbers(collector: Collector) -> Sequence[int | None]:
    """Of the prompts; None for none."""
    contexts = collector.contexts
    return [None] if contexts is None else range(len(contexts.unseen.texts))


def _collect_all(
    config: Config, console: Console, draw: Callable, contexts: Sequence[int | None]
) -> list[Accepted]:
    columns = TextColumn("accepted"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    total, found = config.samples * len(contexts), []
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("accepted", total=total)
        for i, context in enumerate(contexts):
            key = jax.random.key(config.seed + 1)
            found.append(
                collect(
                    draw(context),
                    key if context is None else jax.random.fold_in(key, context),
                    samples=config.samples,
                    max_proposals=config.max_proposals,
                    choose=partial(_choose, config),
                    advance=lambda n, i=i: bar.update(task, completed=i * config.samples + n),
                )
            )
    return found


def _choose(config: Config, first: Proposals) -> float:
    if not np.isfinite(first.log_score).any():
        return float("nan")
    if config.log_beta is not None:
        return config.log_beta
    return beta_of_rate(first, config.acceptance_rate)


def _write(config: Config, found: Sequence[Accepted], collector: Collector) -> None:
    if config.output is None:
        return
    contexts = collector.contexts
    prompts = [{}] if contexts is None else [{"prompt": c} for c in contexts.unseen.texts]
    with JsonlLogger(config.output) as logger:
        for prompt, accepted in zip(prompts, found, strict=True):
            for text in accepted.texts[: config.samples]:
                logger.log(prompt | {"text": text if prompt else " ".join(text.split())})


def _print_texts(console: Console, texts: Sequence[str]) -> None:
    for text in texts:
        console.print(escape(on_one_line(" ".join(text.split()))), highlight=False)


def _show_alone(console: Console, config: Config, accepted: Accepted) -> None:
    """The texts, what they cost, and what each β would."""
    _print_texts(console, accepted.texts[: config.samples])
    _show_features(console, accepted)
    rate, bound = estimate(accepted)
    console.print(
        f"\n{len(accepted.texts)} of {accepted.proposals} proposals accepted. Acceptance rate "
        f"{_plus_minus(rate)}; TV from the target at most {_plus_minus(bound, 3)} (Z from "
        f"{float(bound.ess):.0f} effective samples).",
        highlight=False,
    )
    if len(accepted.texts) < config.samples:
        console.print(
            f"Gave up after {accepted.proposals} proposals; raise --max-proposals or "
            f"--acceptance-rate.",
            style="yellow",
        )
    if len(accepted.batches) > 1:
        key = jax.random.key(config.seed + 2)
        found = costs(*_halves(accepted.batches), log_beta=accepted.log_beta, rng_key=key)
        _show_costs(console, found)
        if config.plot is not None:
            plot(config.plot, found)


def _show_features(console: Console, accepted: Accepted) -> None:
    table = Table(title="what the target looks at, on average")
    for heading in ("feature", "proposed", "accepted"):
        table.add_column(heading, justify="left" if heading == "feature" else "right")
    for name, means in feature_means(accepted).items():
        table.add_row(escape(name), *(f"{mean:.3f}" for mean in means))
    console.print(table)


def _show_prompts(
    console: Console, config: Config, found: Sequence[Accepted], collector: Collector
) -> None:
    """The texts of each prompt, and a row of what they cost; then the means over prompts."""
    prompts = collector.contexts.unseen.texts if collector.contexts else []
    table = Table(title="of each prompt")
    headings = ("prompt", "accepted", "of", "log β", "acceptance rate", "TV bound")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "prompt" else "right")
    estimates = []
    for prompt, accepted in zip(prompts, found, strict=True):
        console.print(escape(on_one_line(prompt)), style="bold", highlight=False)
        _print_texts(console, accepted.texts[: config.samples])
        estimates.append(estimate(accepted))
        shown = [_plus_minus(part) for part in estimates[-1]]
        counts = str(len(accepted.texts)), str(accepted.proposals), f"{accepted.log_beta:.2f}"
        table.add_row(escape(on_one_line(prompt)), *counts, *shown)
    console.print(table)
    rate, bound = _over_prompts(estimates)
    console.print(
        f"Over {len(found)} prompts: acceptance rate {_plus_minus(rate)}; TV from the targets at "
        f"most {_plus_minus(bound, 3)} on average.",
        highlight=False,
    )
    few = sum(len(accepted.texts) < config.samples for accepted in found)
    if few:
        console.print(
            f"Gave up on {few} of the prompts, where fewer than {config.samples} were accepted or "
            f"none of the first is possible; raise --max-proposals or --acceptance-rate.",
            style="yellow",
        )


def _over_prompts(estimates: Sequence[RejectionEstimate]) -> RejectionEstimate:
    """Means over the prompts where they are known, with errors from the spread between them."""
    means = (
        over_contexts(Estimate(*map(jnp.stack, zip(*part, strict=True))))
        for part in zip(*estimates, strict=True)
    )
    return RejectionEstimate(*means)


def _plus_minus(found: Estimate, digits: int = 4) -> str:
    return f"{float(found.value):.{digits}f} ± {float(found.std_error):.{digits}f}"


def _halves(batches: Sequence[Proposals]) -> list[Half]:
    middle = len(batches) // 2
    return [
        Half(*(np.concatenate([getattr(p, name) for p in part]) for name in Half._fields))
        for part in (batches[:middle], batches[middle:])
    ]


def _show_costs(console: Console, found: list[Cost]) -> None:
    table = Table(
        title="what β costs and is worth: predicted by the first half of the proposals, found in "
        "the second"
    )
    for heading in ("log β", "acceptance, predicted", "found", "TV bound, predicted", "found"):
        table.add_column(heading, justify="right")
    for cost in found:
        table.add_row(f"{cost.log_beta:.2f}", *map(_plus_minus, cost[1:]))
    console.print(table)


main = partial(run, Config, generate, name="generate")

if __name__ == "__main__":
    leave(main())
