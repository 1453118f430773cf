"""Runs as processes, several at a time: each on its share of the cores, shown as they go, stopped
so that they save."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from fjax.runs.endings import graceful_stop
from fjax.runs.text import on_one_line

from .plan import Plan, current_step, is_begun

POLL = 0.5
"""Seconds between looks at the processes."""
PATIENCE = 5.0
"""Seconds that a run has to end after a second Ctrl-C."""
QUIET = 60.0
"""Seconds between lines about how far they are, without a terminal."""
SHOWN = 10
"""Lines of what a failed run printed last."""


class Running(NamedTuple):
    """A process, when it began, and whether it goes on with an earlier one."""

    plan: Plan
    process: subprocess.Popen
    begun: float
    resumed: bool


def run_all(plans: Sequence[Plan], *, jobs: int) -> int | None:
    """Runs them, so many at a time, whether or not one fails; gives the signal that stopped it all,
    if one did.

    The first Ctrl-C or SIGTERM passes SIGINT on, upon which each run saves and ends; a second
    Ctrl-C ends them at once.
    """
    waiting = deque(plans)
    running: dict[int, Running] = {}
    told = False
    with graceful_stop() as stop, Board(plans) as board:
        try:
            while running or (waiting and not stop.signal):
                while waiting and len(running) < jobs and not stop.signal:
                    slot = min(set(range(jobs)) - set(running))
                    running[slot] = start(waiting.popleft(), share_of_cores(slot, jobs))
                    board.started(running[slot])
                if stop.signal and not told:
                    board.say(
                        "Stopping: each run saves first. Ctrl-C once more interrupts at once."
                    )
                    _interrupt(running.values())
                    told = True
                time.sleep(POLL)
                for slot, one in list(running.items()):
                    if one.process.poll() is not None:
                        del running[slot]
                        board.ended(one, stopped=told)
                board.look([one.plan for one in running.values()])
        finally:
            _end_at_once(running.values())
    return stop.signal or None


def start(plan: Plan, cores: set[int] | None) -> Running:
    """Starts or resumes it, with what it prints in its log.

    It has a session of its own: of Ctrl-C at a terminal it learns through us only, once, since
    twice would not let it save.
    """
    plan.place.log.parent.mkdir(parents=True, exist_ok=True)
    resumed = is_begun(plan.place.folder)
    with plan.place.log.open("wb") as log:
        process = subprocess.Popen(
            [*plan.command, *(["--resume"] if resumed else [])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    if cores is not None:
        with suppress(ProcessLookupError):  # it has ended already
            # From outside, as forking a process with jax in it is unsafe; threads that come later
            # inherit it.
            os.sched_setaffinity(process.pid, cores)
    return Running(plan, process, time.monotonic(), resumed)


def share_of_cores(slot: int, jobs: int) -> set[int] | None:
    """Which cores a process may use, of those that this one may; None for all, and where the system
    cannot be asked."""
    if jobs == 1 or sys.platform != "linux":
        return None
    cores = sorted(os.sched_getaffinity(0))
    share = cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs]
    return set(share) or {cores[slot % len(cores)]}


def _interrupt(running: Iterable[Running]) -> None:
    for one in running:
        one.process.send_signal(signal.SIGINT)


def _end_at_once(running: Iterable[Running]) -> None:
    """Whatever still runs is interrupted a second time, and killed if that does not help."""
    _interrupt(running)
    for one in running:
        try:
            one.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()


class Board:
    """What a person sees of the runs: a bar each on a terminal, else a line now and then."""

    def __init__(self, plans: Sequence[Plan]):
        self._console = Console(width=None if sys.stdout.isatty() else 110)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(
            *columns, console=self._console, disable=not self._console.is_terminal, transient=True
        )
        self._total = sum(plan.steps for plan in plans)
        self._at_first = {plan.place: current_step(plan.place.folder) for plan in plans}
        self._steps = dict(self._at_first)
        self._bars = {}
        self._runs, self._ended = len(plans), 0
        self._begun = self._spoke = time.monotonic()

    def __enter__(self) -> "Board":
        self._progress.start()
        self._all = self._progress.add_task("all runs", total=self._total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def started(self, one: Running) -> None:
        """A new row."""
        place = one.plan.place
        self._bars[place] = self._progress.add_task(
            f"  {place.title}", total=one.plan.steps, note="starting"
        )
        self.say(
            f"{escape(place.title)}: {'going on' if one.resumed else 'started'}; what it prints is "
            f"in {escape(str(place.log))}."
        )

    def ended(self, one: Running, *, stopped: bool) -> None:
        """The row becomes a line; what a failed run printed last is shown."""
        place, status = one.plan.place, one.process.returncode
        self._progress.remove_task(self._bars.pop(place))
        took = duration(time.monotonic() - one.begun)
        if stopped and status:
            self.say(f"{escape(place.title)}: stopped at step {current_step(place.folder)}.")
        elif status:
            self._total -= one.plan.steps - self._steps[place]
            self.say(
                f"[bold red]{escape(place.title)}: failed with status {status} after {took}.[/] "
                f"The end of {place.log}:"
            )
            lines = place.log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:]
            self.say(escape("\n".join(f"  {on_one_line(line)}" for line in lines)))
        else:
            self._ended += 1
            self._steps[place] = one.plan.steps  # also if it stopped early
            self.say(f"{escape(place.title)}: done in {took}; {self._summary()}.")

    def look(self, running: Sequence[Plan]) -> None:
        """Reads how far each is, and shows it."""
        for plan in running:
            step = self._steps[plan.place] = current_step(plan.place.folder)
            self._progress.update(
                self._bars[plan.place], completed=step, note=f"step {step} of {plan.steps}"
            )
        self._progress.update(
            self._all, completed=sum(self._steps.values()), total=self._total, note=self._summary()
        )
        if not self._console.is_terminal and running and time.monotonic() - self._spoke > QUIET:
            self._spoke = time.monotonic()
            at = "; ".join(
                f"{plan.place.title}: step {self._steps[plan.place]} of {plan.steps}"
                for plan in running
            )
            self.say(escape(f"{at}; {self._summary()}."))

    def _summary(self) -> str:
        steps, taken = (
            sum(self._steps.values()),
            sum(self._steps.values()) - sum(self._at_first.values()),
        )
        runs = f"{self._ended} of {self._runs} runs"
        if not taken or steps == self._total:
            return runs
        a_step = (time.monotonic() - self._begun) / taken
        return f"{runs}, about {duration(a_step * (self._total - steps))} left"


def duration(seconds: float) -> str:
    """In seconds, minutes, or hours and minutes, whichever says enough."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
