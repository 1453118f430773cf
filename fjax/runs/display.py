"""What a person sees: bars, figures and samples as they come, and the summary.

Bars have rate and time left.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fjax._trees import count_numbers
from fjax.estimators import Estimate
from fjax.evaluation import Evaluation, TextTarget
from fjax.runs.distance import Check
from fjax.runs.folder import OpenRun
from fjax.runs.names import title_of
from fjax.runs.steps import Stepper
from fjax.runs.text import count, on_one_line
from fjax.types import Params

SHOWN = 4
"""Samples under each table of figures."""


def hardware() -> str:
    """What this runs on, in words: one device, however many there are."""
    device, there = jax.devices()[0], jax.device_count()
    if device.platform == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return device.device_kind + (f", one of {there}" if there > 1 else "")


class _Rate(ProgressColumn):
    """Steps a minute, which for steps of seconds says more than steps a second."""

    def render(self, task) -> Text:
        return Text(f"{task.speed * 60:.0f}/min" if task.speed else "", style="progress.data.speed")


class Display:
    """Prints everything. Without a terminal, bars become a plain line now and then."""

    def __init__(self):
        self._console = Console(width=None if sys.stdout.isatty() else 110)

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line, in rich's markup."""
        self._console.print(text, style=style, highlight=False, soft_wrap=True)

    def start(
        self,
        title: str,
        run: OpenRun,
        steps: int,
        stepper: Stepper,
        params: Params,
        *,
        resumed_at: int,
    ) -> None:
        """Says what is about to happen, and where it will all be.

        And how many samples of a step the base model draws.
        """
        chosen = run.config.get("start")
        begin = "from the start" if chosen is None else f"from {_safe(str(chosen))}"
        at = f"going on at step {resumed_at}" if resumed_at else begin
        share = f" ({stepper.base_samples} of the base model)" if stepper.base_samples else ""
        size = count_numbers(params) / 1e6
        model = _safe(str(run.config.get("model", "a model")))
        self.say(
            f"[bold]{escape(title)}[/]: {model} ({size:.1f}M parameters), {count(steps, 'step')} "
            f"of {count(stepper.samples, stepper.unit)}{share}, {at}, on {escape(hardware())}.\n"
            f"Everything is written to {escape(str(run.path))}."
        )

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
        """A bar for what takes long and has no figures.

        Gives a function of the total, which returns a function of how much is done.
        """
        with ExitStack() as shown:

            def begin(total: int) -> Callable[[int], None]:
                bar = shown.enter_context(self.progress(what, total=total, completed=0))
                return lambda done: bar(done, {})

            yield begin

    @contextmanager
    def progress(
        self, name: str, *, total: int, completed: int, headline: str = ""
    ) -> Iterator[Callable[[int, dict], None]]:
        """A bar that shows the headline first.

        Gives a function of (completed, record of the step).
        """
        columns = (
            TextColumn(f"{name:9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        is_terminal = self._console.is_terminal
        with Progress(
            *columns, console=self._console, disable=not is_terminal, transient=name != "align"
        ) as bar:
            task = bar.add_task(name, total=total, completed=completed, note="")

            def advance(done: int, record: dict) -> None:
                bar.update(task, completed=done, note=_note(record, headline))
                if not is_terminal and record and (done % 10 == 0 or done == total):
                    self.say(
                        f"step {done}/{total}  {_note(record, headline)}  {record['seconds']:.0f} s"
                    )

            yield advance

    def evaluation(self, evaluation: Evaluation, step: int, target: TextTarget) -> None:
        """A table of figures, beside those of the base model, and a few samples."""
        found = len(evaluation.samples.texts)
        title = f"step {step}, {found} fresh samples of the policy"
        if evaluation.log_z is not None:
            title += f", continuing {len(evaluation.log_z)} unseen prompts"
        table = Table(title=title, title_justify="left")
        _add_columns(table, "figure", "value", "± std. error", "ESS")
        for name, figure in evaluation.figures.items():
            ess = f"{figure.ess:.0f}" if figure.ess < found - 0.5 else ""
            table.add_row(_name(name), _number(figure.value), _error(figure), ess)
        self._console.print(table)
        self._console.print(_samples(evaluation, target))

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table of numbers; the first column says what they are of."""
        table = Table(title=title, title_justify="left")
        _add_columns(table, *headings)
        for row in rows:
            table.add_row(*map(_safe, row))
        self._console.print(table)

    def warn(self, text: str) -> None:
        """Prints what one should know although it is no error."""
        self.say(_safe(text), style="yellow")

    def stopped(self, step: int, folder: Path) -> None:
        """Says so, and how to go on, after Ctrl-C or SIGTERM."""
        self.say(
            f"Stopped and saved at step {step}. To go on, call align again with resume=True, or "
            f"give the same command with [bold]--resume --run-folder {escape(str(folder))}[/]",
            style="yellow",
        )

    def beside(
        self,
        before: dict,
        after: Evaluation,
        target: TextTarget,
        check: Check | None,
        *,
        first: str,
        last: str,
    ) -> None:
        """Figures of a record and of an evaluation in one table.

        Below it, samples of the latter, and the check on them.
        """
        table = Table(title=_safe(f"{first} → {last}"), title_justify="left")
        _add_columns(table, "figure", _safe(first), _safe(last), "± std. error")
        for name, figure in after.figures.items():
            table.add_row(
                _name(name),
                _number(before.get(name, math.nan)),
                _number(figure.value),
                _error(figure),
            )
        self._console.print(table)
        self._console.print(_samples(after, target, shown=2 * SHOWN))
        if after.log_z is not None:
            self.say(f"Figures are means over {_prompts(after.log_z)}.")
        if check is not None:
            self.say(escape(_verdict(check)))

    def summary(
        self,
        evaluations: dict[int, dict],
        after: Evaluation,
        target: TextTarget,
        check: Check | None,
        folder: Path,
        seconds: float,
    ) -> None:
        """Before → after, the check on the figures, and where things are."""
        self.beside(evaluations.get(0, {}), after, target, check, first="before", last="after")
        self.say(
            f"Plots, samples, metrics, checkpoints and the model are in {escape(str(folder))} "
            f"({seconds:.0f} s)."
        )


def _add_columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")


def _verdict(check: Check) -> str:
    value, least, std_error = check
    said = "Check KL(p‖π) ≥ -log E_π[b]: "
    if math.isnan(value) or math.isinf(least):
        return f"{said}nothing to check, for no sample satisfies the constraint."
    below = least - value
    if below < 1e-4:  # rounding, where both are the same
        return f"{said}{value:.3f} ≥ {least:.3f} holds."
    if not below > 4 * std_error:
        return f"{said}{value:.3f} is below {least:.3f}, within error (± {std_error:.3f})."
    return (
        f"{said}{value:.3f} is below {least:.3f} by more than 4 standard errors (± "
        f"{std_error:.3f}): it FAILS. Either samples "
        "of p are too few for their own error to be right (see the ESS), or there is an error in "
        "the code: please report it."
    )


def _prompts(log_z: np.ndarray) -> str:
    """How many there are, and of how many of them the figures are."""
    known = int(np.isfinite(log_z).sum())
    if known == len(log_z):
        return f"{known} unseen prompts"
    if known == 0:
        return f"{len(log_z)} unseen prompts, the Z of none of which is known"
    unknown = f"{1 - known / len(log_z):.0%} have an unknown Z and are left out"
    return f"{known} of {len(log_z)} unseen prompts ({unknown})"


def _samples(evaluation: Evaluation, target: TextTarget, shown: int = SHOWN) -> Table:
    # No wrapping tricks: a sample is read as a sentence, marked where the constraint holds.
    table = Table(show_header=False, box=None, padding=(0, 1))
    samples = evaluation.samples
    count = len(samples.texts)
    marks = samples.features[target.bound] if target.bound else [None] * count
    # Spread over all, so that with contexts they are of different ones.
    for i in range(0, count, max(1, count // shown))[:shown]:
        sign = "" if marks[i] is None else "[green]✓[/]" if marks[i] else "[red]✗[/]"
        prompt, text = _safe(samples.prompts[i]), _safe(samples.texts[i])
        table.add_row(sign, f"[dim]{prompt}[/] {text}" if prompt else text)
    return table


def _safe(text: str) -> str:
    """What a model or a user wrote, as it is and nothing else.

    No colours of its own, and no orders to the terminal.
    """
    return escape(on_one_line(text))


def _name(figure: str) -> str:
    return _safe(title_of(figure))


def _note(record: dict, headline: str) -> str:
    shown = {headline: headline, "log_z": "log Z", "divergence": "divergence"}
    return "  ".join(
        f"{title} {_number(float(record[name]))}" for name, title in shown.items() if name in record
    )


def _number(value: Any) -> str:
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return (
        f"{value:z.4f}" if abs(value) < 1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    )


def _error(figure: Estimate) -> str:
    return f"± {_number(figure.std_error)}" if math.isfinite(figure.std_error) else ""
