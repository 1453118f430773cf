"""Processes of a comparison: so many at a time, each on its cores; failures, and Ctrl-C once or
twice. They stand for runs."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.compare import processes
from experiments.compare.plan import Place, Plan


def pretended(folder: Path, name: str, code: str, steps: int = 2) -> Plan:
    """A process that stands for a run."""
    place = Place(name, 0, folder / name)
    return Plan(
        place,
        [sys.executable, "-c", f"import os, sys, time, signal, pathlib\n{code}"],
        {"steps": steps},
        steps,
    )


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(processes, "POLL", 0.02)


def test_a_failure_is_shown_and_the_others_go_on(quick, tmp_path, capsys):
    plans = [
        pretended(tmp_path, "bad", "print(*range(30), sep='\\n'); sys.exit('the [reason]')"),
        pretended(tmp_path, "good", "print('fine', sys.argv[1:], os.getsid(0) == os.getpid())"),
    ]
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").write_text("{}")
    assert processes.run_all(plans, jobs=1) is None
    printed = capsys.readouterr().out
    assert "bad, seed 0: failed with status 1" in printed
    assert "29\n  the [reason]" in printed
    assert "\n  20\n" not in printed  # its last ten lines
    assert "good, seed 0: going on" in printed
    assert "good, seed 0: done in 0 s; 1 of 2 runs" in printed
    # out of the terminal's reach
    assert (tmp_path / "good.log").read_text() == "fine ['--resume'] True\n"


def test_so_many_at_a_time_each_on_its_share(quick, tmp_path):
    code = "time.sleep(0.3); print(time.time() - 0.3, time.time(), sorted(os.sched_getaffinity(0)))"
    cores = sorted(os.sched_getaffinity(0))
    plans = [pretended(tmp_path, f"run{i}", code) for i in range(3)]
    assert processes.run_all(plans, jobs=2) is None
    lines = [p.place.log.read_text().split(maxsplit=2) for p in plans]
    (_, first_end, first), (second_begin, second_end, second), (third_begin, *_) = lines
    assert second_begin < first_end
    assert third_begin > min(first_end, second_end)
    shares = [set(json.loads(x)) for x in (first, second)]
    assert shares[0] | shares[1] == set(cores)
    assert len(cores) == 1 or not shares[0] & shares[1]


def test_shares_of_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 8})
    monkeypatch.setattr(sys, "platform", "linux")
    assert [processes.share_of_cores(slot, 2) for slot in range(2)] == [{2, 3}, {5, 7, 8}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3})
    assert [processes.share_of_cores(slot, 3) for slot in range(3)] == [{2}, {2}, {3}]
    assert processes.share_of_cores(0, 1) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes.share_of_cores(0, 2) is None


SAVES = """
told = 0
def count(*_):
    global told
    told += 1
signal.signal(signal.SIGINT, count)
pathlib.Path({ready!r}).touch()
while not told:
    time.sleep(0.02)
time.sleep(0.3)
pathlib.Path({path!r}).write_text(f"saved, told {{told}}")
sys.exit(130)
"""
STUBBORN = (
    "signal.signal(signal.SIGINT, signal.SIG_IGN); pathlib.Path({ready!r}).touch(); time.sleep(60)"
)


def interrupt_when(ready: list[Path], times: int = 1) -> None:
    """Ctrl-C for this process, once those files are there."""

    def wait():
        deadline = time.monotonic() + 20
        while not all(path.exists() for path in ready) and time.monotonic() < deadline:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    threading.Thread(target=wait, daemon=True).start()


def test_ctrl_c_lets_each_run_save_and_starts_no_other(quick, tmp_path, capsys):
    ready = [tmp_path / "ready0", tmp_path / "ready1"]
    codes = [
        SAVES.format(path=str(tmp_path / f"saved{i}"), ready=str(path))
        for i, path in enumerate(ready)
    ]
    plans = [
        pretended(tmp_path, f"run{i}", code) for i, code in enumerate([*codes, "print('never')"])
    ]
    interrupt_when(ready)
    assert processes.run_all(plans, jobs=2) == signal.SIGINT
    assert (tmp_path / "saved0").read_text() == (tmp_path / "saved1").read_text() == "saved, told 1"
    assert not (tmp_path / "run2.log").exists()
    printed = capsys.readouterr().out
    assert "Stopping: each run saves first" in printed
    assert "run0, seed 0: stopped at step 0" in printed
    assert "failed" not in printed


def test_ctrl_c_twice_leaves_no_process(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    started = []
    monkeypatch.setattr(
        processes,
        "start",
        lambda *a, before=processes.start: started.append(before(*a)) or started[-1],
    )
    ready = tmp_path / "ready"
    interrupt_when([ready], times=2)
    with pytest.raises(KeyboardInterrupt):
        processes.run_all([pretended(tmp_path, "run", STUBBORN.format(ready=str(ready)))], jobs=1)
    assert started[0].process.returncode == -signal.SIGKILL


def test_durations():
    assert [processes.duration(s) for s in (3.4, 99, 100, 3000, 7500)] == [
        "3 s",
        "99 s",
        "2 min",
        "50 min",
        "2 h 5 min",
    ]
