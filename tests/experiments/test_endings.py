"""How a command ends before its time: signals in every phase, a reader that leaves, and what a kill
left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import _endings, _evaluate, _loop, tabulate
from experiments.lexical_constraint.config import Config
from experiments.lexical_constraint.run import main
from fjax.training import read_jsonl

from .commands import SMALL, run

ROOT = Path(__file__).parents[2]
SIGNALS = pytest.mark.parametrize("number", _endings.SIGNALS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def handlers_as_before():
    """And before them those of a terminal: under nohup, processes that tests start would ignore
    SIGHUP as well."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in _endings.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in _endings.SIGNALS] == before
    signal.signal(signal.SIGHUP, inherited)


@SIGNALS
def test_the_first_signal_asks_and_the_second_interrupts(number):
    with _endings.graceful_stop() as stop:
        assert not stop.signal
        signal.raise_signal(number)
        assert stop.signal == number
        with pytest.raises(_endings.Interrupted) as raised:
            signal.raise_signal(signal.SIGTERM)
        assert raised.value.status == 128 + signal.SIGTERM
        assert signal.getsignal(number) is _endings.leave_at_once


@SIGNALS
def test_what_changes_nothing_is_left_at_once(number):
    with _endings.graceful_stop() as stop:
        with pytest.raises(_endings.AskedToStop), stop.obeyed_at_once():
            signal.raise_signal(number)
        assert stop.signal == number
        with pytest.raises(_endings.AskedToStop), stop.obeyed_at_once():
            pytest.fail("it was asked to stop before")


def test_a_hang_up_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _endings.graceful_stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.signal
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@SIGNALS
def test_a_signal_outside_a_run_is_one_line(number, monkeypatch, capsys):
    assert (
        run(monkeypatch, tabulate.Config, lambda _: signal.raise_signal(number) or 0, "folder")
        == 128 + number
    )
    shown = capsys.readouterr().err
    assert (
        shown
        == f"Interrupted at once ({number.name}); what had been saved before is there for --resume.\n"
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
        run(monkeypatch, tabulate.Config, lambda _: print("a table") or 0, *arguments)
        == 128 + signal.SIGHUP
    )
    assert capsys.readouterr().err.startswith("Nobody reads any more what is printed: stopping.\n")


def test_without_any_output_a_command_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert (
        run(
            monkeypatch,
            tabulate.Config,
            lambda _: print("a table", file=sys.stderr) or print("a table") or 0,
            "folder",
        )
        == 0
    )


@SIGNALS
def test_a_signal_during_imports_cannot_be_swallowed(number, tmp_path):
    """A module in jax's place sends the signal and catches whatever comes of it, as code of others
    may."""
    (tmp_path / "jax.py").write_text(
        f"import os, time\ntry:\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(5)\n"
        "except BaseException:\n    print('swallowed')\n",
        encoding="utf-8",
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    command = [sys.executable, "-m", "experiments.kl_gradients"]
    ended = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 128 + number
    assert (ended.stdout, ended.stderr) == ("", f"Interrupted at once ({number.name}).\n")


def test_an_interruption_that_is_lost_ends_the_process_all_the_same():
    code = (
        "import signal, time\nfrom experiments import _endings\n_endings.PATIENCE = 0.2\n"
        "with _endings.handled_by(_endings.interrupt):\n"
        "    try:\n        signal.raise_signal(signal.SIGTERM)\n    except BaseException:\n        "
        "pass\n    time.sleep(20)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (143, "Interrupted at once (SIGTERM).\n")


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


FREQUENT = ("--word", "w9", *SMALL, "--steps", 4)


def test_a_signal_while_loading_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_loop, "load_model", lambda _: signal.raise_signal(signal.SIGTERM))
    assert run(monkeypatch, Config, main, *FREQUENT, "--run-folder", tmp_path / "run") == 143
    assert "Interrupted at once (SIGTERM)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_signal_while_evaluating_saves_what_there_is(monkeypatch, tmp_path, capsys):
    """At the first evaluation, in the middle, and at the last: a save each time, and the run goes
    on to its end."""
    folder, evaluate = tmp_path / "run", _evaluate.evaluate

    def and_signal(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    for saved, resume in ((0, ()), (2, ("--resume",)), (4, ("--resume",))):
        calls = iter(
            [evaluate, and_signal]
            if saved == 2
            else [and_signal]
            if saved == 0
            else [evaluate, and_signal]
        )
        monkeypatch.setattr(_evaluate, "evaluate", lambda *given, calls=calls: next(calls)(*given))
        assert run(monkeypatch, Config, main, *FREQUENT, "--run-folder", folder, *resume) == 143
        assert f"Stopped and saved at step {saved}." in " ".join(capsys.readouterr().out.split())
        assert str(saved) in os.listdir(folder / "checkpoints")
    monkeypatch.setattr(_evaluate, "evaluate", evaluate)
    (folder / ".model-killed").mkdir()
    (folder / ".model-killed" / "model.safetensors").write_bytes(b"half")
    assert run(monkeypatch, Config, main, *FREQUENT, "--run-folder", folder, "--resume") == 0
    steps = [
        record["step"]
        for record in read_jsonl(folder / "metrics.jsonl")
        if record["kind"] == "step"
    ]
    assert steps == [1, 2, 3, 4]
    assert (folder / "model" / "model.safetensors").is_file()
    assert not (folder / ".model-killed").exists()
