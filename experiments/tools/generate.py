"""Samples of an aligned model that satisfy the constraint, all of them:
python -m experiments generate --help.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fjax.estimators import estimate_log_z
from fjax.rejection import RejectionEstimate, accept, choose_log_beta, estimate_rejection
from fjax.runs import RunError
from fjax.runs.text import on_one_line
from fjax.training import JsonlLogger

from ..common.arguments import FolderOrName, check_numbers, check_output
from ..common.build import load_aligned, load_model, make_collector
from ..common.command import run
from ..common.settings import Settings
from ..common.words import contains_any
from .rejection_costs import Cost, Half, costs, plot

BASE_FRACTION = 0.25
"""Of what is drawn, for Z alone: samples of the aligned model show too small a one, where it does
not cover the target."""


@dataclass(frozen=True)
class Config:
    """Sample from a model that was aligned to a word, and accept by quasi-rejection towards p(x) ∝
    a(x)·[word in x].

    A proposal x of the model π is kept with probability min(1, P(x)/(β π(x))). What is kept always
    has the word, and is within TV ≤ 1 - Z_β/Z of the target p; a larger β is closer to it and keeps
    less.

    Examples:

        python -m experiments generate --word amazing \\
            --model runs/lexical_constraint/amazing-jensen_shannon-0/model
        python -m experiments generate --word amazing --model runs/.../model \\
            --acceptance-rate 0.01 --samples 100
    """

    model: FolderOrName
    """Folder of the aligned model, the proposals' distribution."""
    word: str
    """The word it was aligned to."""
    base: FolderOrName = "built-in"
    """The model it was aligned from, as for --model of the experiments."""
    samples: int = 10
    """How many to accept."""
    acceptance_rate: float = 0.1
    """Share of the proposals to keep; β is chosen from the first of them."""
    max_proposals: int = 20_000
    """Proposals after which it gives up."""
    batch_size: int = 128
    """Proposals at once."""
    max_new_tokens: int = 40
    """Longest sample, in tokens: as in the alignment."""
    seed: int = 0
    """Seed of everything random."""
    output: Path | None = None
    """Write the accepted texts to this file too, as JSON lines."""
    plot: Path | None = None
    """Draw acceptance rate and bound against β into this file, too: predicted by half of the
    proposals, and found in the other."""

    def __post_init__(self):
        check_numbers(self)
        if not self.word.strip():
            raise ValueError("--word must not be empty.")


class Proposals(NamedTuple):
    """Texts of the model, with what target and model say of them; and P/q of these and some of the
    base model's, for Z."""

    texts: list[str]
    log_score: np.ndarray
    log_q: np.ndarray
    log_weights: np.ndarray


def propose(config: Config) -> Iterator[Proposals]:
    """Batches of proposals, without end."""
    sizes = {
        "samples": max(config.batch_size, 2),
        "base_fraction": BASE_FRACTION,
        "max_new_tokens": config.max_new_tokens,
    }
    settings = Settings(model=config.base, **sizes)
    base = load_model(settings)
    aligned = load_aligned(settings, base, config.model)
    collector = make_collector(settings, base)
    step = 0
    while True:
        batch = collector.draw(
            aligned.params, jax.random.fold_in(jax.random.key(config.seed), step)
        )
        texts = collector.decode(batch.tokens, batch.where)
        with np.errstate(divide="ignore"):
            log_score = np.asarray(batch.log_a) + np.log(
                contains_any([config.word], texts).astype(np.float32)
            )
        n = batch.from_policy
        yield Proposals(
            texts[:n],
            log_score[:n],
            np.asarray(batch.log_proposal)[:n],
            log_score - np.asarray(batch.log_q),
        )
        step += 1


def choose_beta(log_score: np.ndarray, log_q: np.ndarray, rate: float) -> float:
    """The log β at which this share of the proposals is accepted.

    Raises:
        RunError: if none of them can be.
    """
    log_beta = float(
        choose_log_beta(jnp.asarray(log_score), jnp.asarray(log_q), acceptance_rate=rate)
    )
    if math.isnan(log_beta):
        raise RunError(
            f"None of {len(log_q)} proposals has the word. Is this the model that was aligned to "
            f"it?"
        )
    return log_beta


def generate(config: Config) -> int:
    """Proposes, accepts, prints, and says what it cost and how close it is."""
    check_output(config.output, "--output")
    check_output(config.plot, "--plot")
    console = Console(width=None if sys.stdout.isatty() else 110)
    seen: list[Proposals] = []
    accepted: list[str] = []
    log_beta = 0.0
    columns = TextColumn("accepted"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("accepted", total=config.samples)
        for step, proposals in enumerate(propose(config)):
            seen.append(proposals)
            if step == 0:
                log_beta = choose_beta(proposals.log_score, proposals.log_q, config.acceptance_rate)
            key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
            kept = accept(
                key,
                jnp.asarray(proposals.log_score),
                jnp.asarray(proposals.log_q),
                log_beta=log_beta,
            )
            accepted += [
                text for text, keep in zip(proposals.texts, np.asarray(kept), strict=True) if keep
            ]
            bar.update(task, completed=min(len(accepted), config.samples))
            if (
                len(accepted) >= config.samples
                or len(seen) * len(proposals.texts) >= config.max_proposals
            ):
                break
    log_score, log_q = (
        np.concatenate([getattr(p, name) for p in seen]) for name in ("log_score", "log_q")
    )
    log_weights = jnp.asarray(np.concatenate([p.log_weights for p in seen]))
    log_z = estimate_log_z(log_weights, jnp.zeros_like(log_weights))
    estimate = estimate_rejection(
        jnp.asarray(log_score), jnp.asarray(log_q), log_beta=log_beta, log_z=log_z
    )
    _show(console, config, accepted, estimate, len(log_q))
    if len(seen) > 1:
        found = costs(*_halves(seen), log_beta=log_beta, rng_key=jax.random.key(config.seed + 2))
        _show_costs(console, found)
        if config.plot is not None:
            plot(config.plot, found)
    return 0


def _halves(seen: list[Proposals]) -> list[Half]:
    middle = len(seen) // 2
    parts = seen[:middle], seen[middle:]
    return [
        Half(*(np.concatenate([getattr(p, name) for p in part]) for name in Half._fields))
        for part in parts
    ]


def _show_costs(console: Console, found: list[Cost]) -> None:
    table = Table(
        title="what β costs and is worth: predicted by the first half of the proposals, found in "
        "the second"
    )
    for heading in ("log β", "acceptance, predicted", "found", "TV bound, predicted", "found"):
        table.add_column(heading, justify="right")
    for cost in found:
        table.add_row(
            f"{cost.log_beta:.2f}", *(f"{f.value:.4f} ± {f.std_error:.4f}" for f in cost[1:])
        )
    console.print(table)


def _show(
    console: Console,
    config: Config,
    accepted: list[str],
    estimate: RejectionEstimate,
    proposals: int,
) -> None:
    texts = [" ".join(text.split()) for text in accepted[: config.samples]]
    for text in texts:
        console.print(escape(on_one_line(text)), highlight=False)
    if config.output is not None:
        with JsonlLogger(config.output) as logger:
            for text in texts:
                logger.log({"text": text})
    satisfied = float(contains_any([config.word], accepted).mean()) if accepted else float("nan")
    rate, bound = estimate
    console.print(
        f"\n{len(accepted)} of {proposals} proposals accepted, of which {satisfied:.0%} have the "
        f"word. Acceptance rate {float(rate.value):.4f} ± {float(rate.std_error):.4f}; TV from the "
        f"target at most {float(bound.value):.3f} ± {float(bound.std_error):.3f} (Z from "
        f"{float(bound.ess):.0f} effective samples).",
        highlight=False,
    )
    if len(accepted) < config.samples:
        console.print(
            f"Gave up after {proposals} proposals; raise --max-proposals or --acceptance-rate.",
            style="yellow",
        )


main = partial(run, Config, generate, name="generate")

if __name__ == "__main__":
    sys.exit(main())
