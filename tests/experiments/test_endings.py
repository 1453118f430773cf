"""How a command ends before its time: signals in every phase, those in a user's function too, and a reader that
leaves."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from experiments.common import build
from experiments.common.command import run as run_command
from experiments.common.functions import call, load_function
from experiments.lexical_constraint.__main__ import main
from experiments.sentiment_reward.__main__ import main as align_to_reward
from experiments.tools import tabulate
from fjax.runs.endings import SIGNALS as NUMBERS
from fjax.runs.endings import Interrupted, handled_by, interrupt

from .commands import SMALL, run

ROOT = Path(__file__).parents[2]
SIGNALS = pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)


def command(does):
    """One that is parsed as tabulate is, and does what a test wants."""
    return partial(run_command, tabulate.Config, does, name="tabulate", computes=False)


@pytest.fixture(autouse=True)
def handlers_as_before():
    """And before them those of a terminal: under nohup, processes that tests start would ignore
    SIGHUP as well."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    assert [signal.getsignal(number) for number in NUMBERS] == before
    signal.signal(signal.SIGHUP, inherited)


@SIGNALS
def test_a_signal_outside_a_run_is_one_line(number, monkeypatch, capsys):
    assert (
        run(monkeypatch, command(lambda _: signal.raise_signal(number) or 0), "folder")
        == 128 + number
    )
    shown = capsys.readouterr().err
    assert shown == (
        f"Interrupted at once ({number.name}); what had been saved before, if anything, is there for "
        f"--resume.\n"
    )


@pytest.mark.parametrize("fails", ["write", "flush"])
@pytest.mark.parametrize("begin", ["print", "--help"])
def test_a_reader_that_leaves_is_a_hang_up(fails, begin, monkeypatch, capsys):
    class Closed:
        encoding = "utf-8"

        def write(self, text):
            return self.flush() if fails == "write" else len(text)

        def flush(self):
            raise BrokenPipeError

        def isatty(self):
            return False

        def fileno(self):
            raise OSError

    monkeypatch.setattr(sys, "stdout", Closed())
    arguments = ["folder"] if begin == "print" else ["--help"]
    assert (
        run(monkeypatch, command(lambda _: print("a table") or 0), *arguments)
        == 128 + signal.SIGHUP
    )
    assert capsys.readouterr().err.startswith("Nobody reads any more what is printed: stopping.\n")


def test_without_any_output_a_command_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert (
        run(
            monkeypatch,
            command(lambda _: print("a table", file=sys.stderr) or print("a table") or 0),
            "folder",
        )
        == 0
    )


@SIGNALS
@pytest.mark.parametrize(
    "words",
    [["experiments.tools.kl_gradients"], ["experiments", "kl_gradients"]],
    ids=("module", "word"),
)
def test_a_signal_during_imports_cannot_be_swallowed(number, words, tmp_path):
    """A module in jax's place sends the signal and catches whatever comes of it, as code of others
    may."""
    (tmp_path / "jax.py").write_text(
        f"import os, time\ntry:\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(5)\n"
        "except BaseException:\n    print('swallowed')\n",
        encoding="utf-8",
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    command = [sys.executable, "-m", *words]
    ended = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 128 + number
    assert (ended.stdout, ended.stderr) == ("", f"Interrupted at once ({number.name}).\n")


def test_importing_experiments_otherwise_takes_no_signal_over():
    command = [
        sys.executable,
        "-c",
        "import signal, experiments; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)",
    ]
    assert (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
        == "True\n"
    )


def test_a_signal_while_loading_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build, "load_model", lambda _: signal.raise_signal(signal.SIGTERM))
    assert run(monkeypatch, main, "--word", "w9", *SMALL, "--run-folder", tmp_path / "run") == 143
    assert "Interrupted at once (SIGTERM)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@SIGNALS
def test_a_signal_in_a_user_s_function_is_no_fault_of_it(number):
    """It passes through what turns everything else that a function raises into a sentence."""
    with handled_by(interrupt), pytest.raises(Interrupted) as raised:
        call(lambda texts: signal.raise_signal(number), "reward", "2 texts", ["a", "b"])
    assert raised.value.status == 128 + number


@SIGNALS
def test_a_signal_while_a_user_s_module_is_imported_too(number, monkeypatch, tmp_path):
    name = f"signals_{number.name.lower()}"
    (tmp_path / f"{name}.py").write_text(f"import signal\nsignal.raise_signal({int(number)})\n")
    monkeypatch.syspath_prepend(tmp_path)
    with handled_by(interrupt), pytest.raises(Interrupted) as raised:
        load_function(f"{name}:reward", "--reward")
    assert raised.value.status == 128 + number


def stops(texts):
    signal.raise_signal(signal.SIGTERM)
    return [0.0 for _ in texts]


def test_a_command_that_is_stopped_in_a_reward_ends_with_the_signal_s_status(
    monkeypatch, tmp_path, capsys
):
    """With the model loaded and the reward asked for the first time."""
    reward = f"{__name__}:stops"
    arguments = "--reward", reward, *SMALL, "--run-folder", tmp_path / "run"
    assert run(monkeypatch, align_to_reward, *arguments) == 143
    captured = capsys.readouterr()
    assert "Interrupted at once (SIGTERM)" in captured.err
    assert "failed" not in captured.err
