"""How a run ends before its time: the first signal asks, the second interrupts, and what was done is saved."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fjax.runs import endings

ROOT = Path(__file__).parents[2]
SIGNALS = pytest.mark.parametrize("number", endings.SIGNALS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def handlers_as_before():
    """And before them those of a terminal: under nohup, processes that tests start would ignore
    SIGHUP as well."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in endings.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in endings.SIGNALS] == before
    signal.signal(signal.SIGHUP, inherited)


@SIGNALS
def test_the_first_signal_asks_and_the_second_interrupts(number):
    with endings.graceful_stop() as stop:
        assert not stop.signal
        signal.raise_signal(number)
        assert stop.signal == number
        with pytest.raises(endings.Interrupted) as raised:
            signal.raise_signal(signal.SIGTERM)
        assert raised.value.status == 128 + signal.SIGTERM
        assert signal.getsignal(number) is endings.leave_at_once


@SIGNALS
def test_what_changes_nothing_is_left_at_once(number):
    with endings.graceful_stop() as stop:
        with pytest.raises(endings.AskedToStop), stop.obeyed_at_once():
            signal.raise_signal(number)
        assert stop.signal == number
        with pytest.raises(endings.AskedToStop), stop.obeyed_at_once():
            pytest.fail("it was asked to stop before")


def test_a_hang_up_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with endings.graceful_stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.signal
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interruption_that_is_lost_ends_the_process_all_the_same():
    code = (
        "import signal, time\nfrom fjax.runs import endings\nendings.PATIENCE = 0.2\n"
        "with endings.handled_by(endings.interrupt):\n"
        "    try:\n        signal.raise_signal(signal.SIGTERM)\n    except BaseException:\n        "
        "pass\n    time.sleep(20)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (143, "Interrupted at once (SIGTERM).\n")


@pytest.mark.parametrize("status", [0, 2, 143])
def test_a_stopped_command_is_not_taken_apart(status):
    """What is registered for the end is done all the same, and what was printed is there; what
    frees the modules is not."""
    code = (
        "import atexit, sys\nfrom fjax.runs import endings\natexit.register(print, 'told')\n"
        "class Held:\n    def __del__(self, write=sys.stderr.write): write('taken apart')\n"
        "held = Held()\nprint('said', end=' ')\n"
        f"endings.leave({status})\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (status, "said told\n")
    assert ended.stderr == ("" if status == 143 else "taken apart")
