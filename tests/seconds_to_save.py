"""Seconds from SIGTERM to a saved checkpoint, and to the end of the process, in every phase of a run:
python -m tests.seconds_to_save.

A run of lexical_constraint is sent the signal as a phase begins. Phases that happen to be short are
made long, as they are where the model is large or the reward slow: those in Python by a sleep, those
in which Python hears nothing, as in a compiler, by a computation in C.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import experiments.common.build
import experiments.common.exact
from experiments.lexical_constraint.__main__ import main as run_command
from fjax.runs import evaluating, loop, plots, read_metrics, steps
from fjax.training import Checkpoints

LONG = 120.0
"""Seconds that a phase lasts which is made long."""


def deaf(seconds: float) -> None:
    """Takes about so long within one call of C, during which Python's signal handlers wait."""
    begun = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000)
    each = (time.monotonic() - begun) / 10_000
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(seconds / each))


class Phase(NamedTuple):
    """What is called at its beginning, the how-manieth call counts, and how it is made long."""

    owner: object
    name: str
    call: int = 1
    longer: Callable[[float], None] = lambda seconds: None


PHASES = {
    "loading the model": Phase(experiments.common.build, "load_model", 1, time.sleep),
    "drawing exact samples": Phase(experiments.common.exact, "_draw", 1, time.sleep),
    "evaluating": Phase(evaluating, "measure", 2, time.sleep),
    "drawing, or compiling before it": Phase(steps, "score_batch", 3, deaf),
    "scoring in Python": Phase(steps, "score_batch", 3, time.sleep),
    "compiling the update": Phase(steps, "to_rollout", 3, deaf),
    "updating": Phase(steps, "as_record", 3),
    "saving": Phase(Checkpoints, "save", 1),
    "exporting": Phase(loop, "_export", 1, time.sleep),
    "drawing pictures": Phase(plots, "write", 1, time.sleep),
}


def arm(phase: Phase, sent: Path) -> None:
    """From its call on, the process gets the signal a moment later, once."""
    function, calls = getattr(phase.owner, phase.name), []

    def send() -> None:
        time.sleep(0.1)
        sent.write_text(json.dumps(time.time()), encoding="utf-8")
        os.kill(os.getpid(), signal.SIGTERM)

    def wrapped(*given, **options):
        calls.append(phase.name)
        if len(calls) == phase.call:
            threading.Thread(target=send, daemon=True).start()
            phase.longer(LONG)
        return function(*given, **options)

    setattr(phase.owner, phase.name, wrapped)


def go(folder: Path, arguments: list[str], name: str) -> None:
    """The process that is sent the signal."""
    sys.stdout = sys.stderr = folder.with_suffix(".log").open("a", encoding="utf-8")
    arm(PHASES[name], folder.with_suffix(".sent"))
    sys.argv = ["lexical_constraint", *arguments, "--run-folder", str(folder)]
    sys.argv += ["--exact-folder", str(folder.with_suffix(".exact"))]
    status = run_command()
    sys.stdout.flush()
    os._exit(status)


def measure(folder: Path, arguments: list[str], name: str) -> str:
    """A row of the table."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.lexical_constraint.__main__"])
    process = context.Process(target=go, args=(folder, arguments, name))
    process.start()
    process.join(LONG * 10)
    ended = time.time()
    process.kill()
    sent = json.loads(folder.with_suffix(".sent").read_text(encoding="utf-8"))
    saved = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdecimal()]
    if not saved:
        return f"| {name} | nothing to save | {ended - sent:.1f} | {process.exitcode} |"
    newest = folder / "checkpoints" / str(max(saved))
    at = max(path.stat().st_mtime for path in newest.rglob("*") if path.is_file())
    taken = max(r["step"] for r in read_metrics(folder))
    after = f"{at - sent:.1f}" if at > sent else "saved before"
    steps_saved = f"step {max(saved)} of {taken}"
    return f"| {name} | {after}, {steps_saved} | {ended - sent:.1f} | {process.exitcode} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="built-in")
    parser.add_argument("--word", default="great")
    parser.add_argument("--phases", nargs="*", default=list(PHASES), choices=list(PHASES))
    chosen = parser.parse_args()
    arguments = [
        *("--model", chosen.model, "--word", chosen.word, "--samples", "16", "--steps", "4"),
        *("--eval-samples", "32", "--eval-every", "3", "--checkpoint-every", "100"),
        *("--max-new-tokens", "8", "--exact-samples", "32", "--exact-draws", "512"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        print("| phase | s to the checkpoint | s to the end | status |\n| --- | --- | --- | --- |")
        for number, name in enumerate(chosen.phases):
            print(measure(Path(folder) / f"run-{number}", arguments, name), flush=True)


if __name__ == "__main__":
    main()
