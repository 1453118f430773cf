"""What a person sees: bars, figures and samples as they come, and the summary.

Bars have rate and time left.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

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
from rich.table import Column, Table
from rich.text import Text

from fjax._trees import count_numbers
from fjax.divergences import FDivergence
from fjax.evaluation import Evaluation
from fjax.hosts import is_first
from fjax.runs import rows
from fjax.runs.aim import Aim, most_of
from fjax.runs.distance import Check
from fjax.runs.folder import OpenRun
from fjax.runs.names import title_of
from fjax.runs.rows import Record, short
from fjax.runs.steps import Stepper, as_numbers
from fjax.runs.text import count, on_one_line, pieces
from fjax.runs.verdict import verdict
from fjax.sharding import devices_of
from fjax.types import Params

QUIET = 20
"""Seconds without a word, where no terminal shows a bar."""

SHOWN = 4
"""Samples under each table of figures."""


def hardware(params: Params = ()) -> str:
    """What a run with these parameters is on, in words."""
    used, there = devices_of(params), jax.device_count()
    device, several = used[0], len(used) > 1
    if device.platform == "cpu" and not several:
        return f"{os.cpu_count()} CPU cores"
    if several:
        return f"{len(used)} × {device.device_kind}"
    # whoever has several wants to know
    return device.device_kind + (f", one of {there} (--mesh takes more)" if there > 1 else "")


class _Rate(ProgressColumn):
    """Steps a minute, which for steps of seconds says more than steps a second."""

    def render(self, task) -> Text:
        return Text(f"{task.speed * 60:.0f}/min" if task.speed else "", style="progress.data.speed")


class Display:
    """Prints everything. Without a terminal, bars become a plain line now and then."""

    def __init__(self):
        width = None if sys.stdout.isatty() else 110
        self._console = Console(width=width, quiet=not is_first())  # all would say the same

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
        each = f"of {count(stepper.samples, stepper.unit)}{share}"
        size = count_numbers(params) / 1e6
        model = _safe(str(run.config.get("model", "a model")))
        self.say(
            f"[bold]{escape(title)}[/]: {model} ({size:.1f}M parameters), {count(steps, 'step')} "
            f"{stepper.plan or each}, {at}, on {escape(hardware(params))}.\n"
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
        self,
        name: str,
        *,
        total: int,
        completed: int,
        headline: str = "",
        divergence: FDivergence | None = None,
    ) -> Iterator[Callable[[int, dict], None]]:
        """A bar that shows the headline first, then the divergence of a step, with its limit.

        Gives a function of (completed, record of the step).
        """
        is_terminal = self._console.is_terminal
        with Progress(
            *self._columns(name),
            console=self._console,
            disable=not is_terminal,
            transient=name != "align",
            expand=True,
        ) as bar:
            task = bar.add_task(name, total=total, completed=completed, note="")
            said = time.monotonic()

            def advance(done: int, record: dict) -> None:
                nonlocal said
                note = _note(record, headline, divergence)
                bar.update(task, completed=done, note=note)
                if is_terminal:
                    return
                if record and (done % 10 == 0 or done == total):
                    self.say(f"step {done}/{total}  {escape(note)}  {record['seconds']:.0f} s")
                elif not record and time.monotonic() - said >= QUIET:
                    said = time.monotonic()
                    self.say(f"{name}  {done}/{total}")

            yield advance

    def _columns(self, name: str) -> tuple[ProgressColumn, ...]:
        """Of a bar. Where there is little room, figures are cut; count, rate and time never are."""
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        return (
            TextColumn(name),
            BarColumn(bar_width=30 if self._console.width >= 110 else 5),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", table_column=rest, markup=False),
        )

    def evaluation(self, evaluation: Evaluation, step: int, aim: Aim) -> None:
        """A table of figures, and a few samples."""
        found = len(evaluation.samples.texts)
        title = f"step {step}, {found} fresh samples of the policy"
        if evaluation.log_z is not None:
            title += f", continuing {len(evaluation.log_z)} unseen prompts"
        self._figures(title, {"value ± std. error": _record(evaluation)}, aim, ess_below=found)
        self._console.print(_samples(evaluation, aim))

    def _figures(
        self, title: str, columns: Mapping[str, Record], aim: Aim, ess_below: int | None = None
    ) -> None:
        """Of one or more records, with the effective samples of the last where they are fewer."""
        table = Table(title=title, title_justify="left")
        _add_columns(table, "figure", *columns, *(["ESS"] if ess_below else []))
        *_, last = records = list(columns.values())
        for name in rows.shown(records, aim):
            row = [rows.titled(name, aim), *(rows.cell(record, name, aim) for record in records)]
            if ess_below:
                ess = float(last[f"{name}_ess"])
                row.append(f"{ess:.0f}" if ess < ess_below - 0.5 else "")
            table.add_row(*map(_safe, row))
        self._console.print(table)
        for note in rows.notes(records, aim):
            self.say(_safe(note), style="dim")

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
        before: Record,
        after: Evaluation,
        aim: Aim,
        check: Check | None,
        *,
        first: str,
        last: str,
        of_p: Record | None = None,
    ) -> None:
        """Figures of a record and of an evaluation in one table, and of p where they are known.

        Below it, samples of the latter, a sentence on what was reached, and the check on figures.
        """
        record, first, last = _record(after), _safe(first), _safe(last)
        columns = {first: before, last: record} | ({"p": of_p} if of_p else {})
        self._figures(f"{first} → {last}", columns, aim)
        self._console.print(_samples(after, aim, shown=2 * SHOWN))
        if after.log_z is not None:
            self.say(f"Figures are means over {_prompts(after.log_z)}.")
        self.say(f"[bold]{_safe(verdict(before, record, aim, of_p))}[/]")
        if check is not None:
            self.say(escape(_verdict(check)))

    def summary(
        self,
        evaluations: dict[int, dict],
        after: Evaluation,
        of_p: Record | None,
        aim: Aim,
        check: Check | None,
        folder: Path,
        seconds: float,
    ) -> None:
        """Before → after, what that is worth, the check on the figures, and where things are."""
        named = {"first": "before", "last": "after", "of_p": of_p}
        self.beside(evaluations.get(0, {}), after, aim, check, **named)
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


def _record(evaluation: Evaluation) -> Record:
    """As metrics.jsonl has it."""
    return {k: v for item in evaluation.figures.items() for k, v in as_numbers(*item).items()}


def _samples(evaluation: Evaluation, aim: Aim, shown: int = SHOWN) -> Table:
    # No wrapping tricks: a sample is read as a sentence, marked where the constraint holds.
    table = Table(show_header=False, box=None, padding=(0, 1))
    samples = evaluation.samples
    count = len(samples.texts)
    marks = samples.features[aim.bound] if aim.bound else [None] * count
    # Spread over all, so that with contexts they are of different ones.
    for i in range(0, count, max(1, count // shown))[:shown]:
        sign = "" if marks[i] is None else "[green]✓[/]" if marks[i] else "[red]✗[/]"
        prompt, found = on_one_line(samples.prompts[i]), pieces(samples.texts[i], aim.highlight)
        text = [(piece, "bold green" if hit else "") for piece, hit in found]
        table.add_row(sign, Text.assemble(*[(f"{prompt} ", "dim")] * bool(prompt), *text))
    return table


def _safe(text: str) -> str:
    """What a model or a user wrote, as it is and nothing else.

    No colours of its own, and no orders to the terminal.
    """
    return escape(on_one_line(text))


def _note(record: Record, headline: str, divergence: FDivergence | None) -> str:
    parts = [f"stage {record['stage']}"] if "stage" in record else []
    if headline in record:
        parts.append(f"{on_one_line(headline)} {short(rows.value_of(record, headline))}")
    if "divergence" in record:
        parts.append(_of_step(rows.value_of(record, "divergence"), divergence))
    if "held_out" in record:
        parts.append(f"on held-out samples {short(rows.value_of(record, 'held_out'))}")
    if "log_z" in record:
        parts.append(f"log Z {short(rows.value_of(record, 'log_z'))}")
    return "  ".join(parts)


def _of_step(value: float, divergence: FDivergence | None) -> str:
    """A step's own divergence with its limit.

    Its estimate has weights without a limit, and may be above; then it says no more than the limit.
    """
    most = None if divergence is None else most_of(divergence)
    name = "divergence" if divergence is None else title_of(divergence.name).removesuffix("(π, p)")
    if most is None:
        return f"{name} {short(value)}"
    if value > most:
        return f"{name} at most {short(most)}"
    return f"{name} {short(value)} of at most {short(most)}"
