"""Run folders: one process each, never taken for another's, and never gone on with when something
of them is missing."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fjax.runs import RunError, numbered, open_run
from fjax.runs.folder import check_none_saved, write_text
from fjax.runs.numbered import new_folder, newest_folder

CONFIG = {"word": "w9", "steps": 4, "eval_every": 50, "checkpoint_every": 20}


def opened(folder: Path, *, resume: bool = True, digests=None, **changes):
    return open_run(folder, CONFIG | changes, resume=resume, digests=digests)


def begin(folder: Path, *, steps: int = 0, **changes) -> Path:
    """What a run leaves behind that was stopped after so many steps, without its checkpoints."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"digests": {"--model": "1"}} | changes)
    )
    records = [{"kind": "step", "step": step} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


# --- names


def test_runs_that_begin_at_one_moment_have_folders_of_their_own(tmp_path, monkeypatch):
    """All look before any makes its folder."""
    monkeypatch.setattr(numbered, "_numbers", lambda *_: {})
    made = [new_folder(tmp_path / "task", "same") for _ in range(3)]
    assert made == [tmp_path / "task" / f"same-{i}" for i in range(3)]


def test_the_newest_run_is_one_that_has_begun(tmp_path):
    base, title = tmp_path / "task", "a[1]-js"
    for number in (2, 10):
        begin(base / f"{title}-{number}")
    for other in ("a[1]-js-11", "a[1]-js-x", "a[1]-js-clipped-12", "b-13"):
        (base / other).mkdir()
    assert newest_folder(base, title) == base / "a[1]-js-10"
    assert new_folder(base, title) == base / "a[1]-js-12"
    shutil.rmtree(base)
    with pytest.raises(RunError, match=r"no run .*task/a\[1\]-js-\* to resume"):
        newest_folder(base, title)


@pytest.mark.parametrize("ours", ["made here", "made for it", "there before"])
def test_a_run_that_does_not_begin_leaves_no_folder_of_its_own(tmp_path, ours):
    folder = tmp_path / "run"
    if ours != "made here":
        folder.mkdir()
    with (
        pytest.raises(RunError, match="nothing to aim at"),
        open_run(folder, CONFIG, ours=ours == "made for it"),
    ):
        raise RunError("nothing to aim at")
    assert folder.is_dir() == (ours == "there before")


# --- one process a folder


HOLDS = """
import sys, time
from fjax.runs import open_run
with open_run(sys.argv[1]) as run:
    (run.path / "config.json").write_text(sys.argv[2])
    print("open", flush=True)
    time.sleep(600)
"""


def test_a_run_in_use_is_refused_and_that_of_a_dead_process_taken_over(tmp_path, capsys):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDS, folder, json.dumps(CONFIG)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            in_use = f"is in use by process {process.pid} on host {socket.gethostname()}"
            for resume in (True, False):
                with (
                    pytest.raises(RunError, match=in_use),
                    opened(folder, resume=resume),
                ):
                    pass
        finally:
            process.kill()
    with opened(folder):
        assert f"in use by process {process.pid}, which is gone" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]


def test_a_folder_in_use_on_another_host_is_refused(tmp_path):
    folder = begin(tmp_path / "run")
    (folder / "lock").write_text(json.dumps({"host": "far", "pid": 1, "since": "then"}))
    for resume in (True, False):
        with pytest.raises(RunError, match=f"process 1 on host far.*delete {folder / 'lock'}"):  # noqa: SIM117
            with opened(folder, resume=resume):
                pass
    (folder / "lock").unlink()
    with opened(folder):
        assert (folder / "lock").exists()
    assert not (folder / "lock").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("{}")

    def killed(self, _):
        assert self.read_text() == '{"word": "é"}'
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, '{"word": "é"}')
    assert path.read_text() == "{}"


def test_what_a_kill_left_is_tidied_and_does_not_count_as_a_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("lock", "config.json.tmp"):
        (folder / name).write_text("")
    with opened(folder, resume=False):
        assert [path.name for path in folder.iterdir()] == ["lock"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"), opened(folder, resume=False):
        pass
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


# --- what is missing, damaged or changed


@pytest.mark.parametrize("text", ["", '{"word": "w9"', "[]", "5", "null", "\ufffe"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    folder = begin(tmp_path / "run")
    (folder / "config.json").write_bytes(text.encode("utf-16"))
    for data in (text.encode(), text.encode("utf-16")):
        (folder / "config.json").write_bytes(data)
        with (
            pytest.raises(RunError, match=r"config.json is damaged"),
            opened(folder),
        ):
            pass


def test_a_run_whose_checkpoints_or_metrics_are_gone_is_refused(tmp_path):
    """It would begin anew, and empty what is left."""
    folder = begin(tmp_path / "run", steps=3)
    kept = (folder / "metrics.jsonl").read_bytes()
    with (
        pytest.raises(
            RunError,
            match=r"metrics.jsonl has 3 steps, but .*checkpoints is gone. Put it back, or delete",
        ),
        opened(folder),
    ):
        pass
    assert (folder / "metrics.jsonl").read_bytes() == kept
    (folder / "checkpoints" / "20").mkdir(parents=True)
    (folder / "metrics.jsonl").unlink()
    with (
        pytest.raises(RunError, match=r"has checkpoints, but .*metrics.jsonl is gone"),
        opened(folder),
    ):
        pass


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken\n", "Line 2 of"),
        ('{"kind": "step"}\n', "a record has no step"),
        ('{"kind": "step", "step": "late"}\n', "late"),
    ],
)
def test_damaged_metrics_are_named(tmp_path, line, message):
    folder = begin(tmp_path / "run", steps=1)
    (folder / "checkpoints").mkdir()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(RunError, match=f"metrics.jsonl is damaged.*{message}"):  # noqa: SIM117
        with opened(folder):
            pass


@pytest.mark.parametrize(
    ("taken", "every", "refused"),
    [(0, 20, False), (39, 20, False), (40, 20, True), (40, 30, False), (60, 30, True)],
)
def test_no_checkpoint_is_right_until_one_must_have_been_whole(
    tmp_path, capsys, taken, every, refused
):
    """A save is whole when the next one begins; the larger of the two intervals, then and now,
    counts."""
    folder = begin(tmp_path / "run", steps=taken)
    if refused:
        with pytest.raises(RunError, match=f"has {taken} steps, but no checkpoint of them is left"):
            check_none_saved(folder, 50, every)
    else:
        check_none_saved(folder, 50, every)
        assert ("it begins again" in capsys.readouterr().out) == (taken > 0)


def test_changed_inputs_are_named(tmp_path, capsys):
    folder = begin(tmp_path / "run")
    with opened(folder, digests={"--model": "1"}):
        pass
    for digests, named in (
        ({"--model": "2"}, "--model"),
        ({"--model": "1", "--pairs p": "3"}, "--pairs p"),
        ({}, "--model"),
    ):
        with pytest.raises(RunError, match=f"begun with different contents of {named}. Put back"):  # noqa: SIM117
            with opened(folder, digests=digests):
                pass
    old = json.loads((folder / "config.json").read_text())
    del old["digests"]
    (folder / "config.json").write_text(json.dumps(old))
    with opened(folder, digests={"--model": "2"}):
        assert "begun before fjax took digests" in capsys.readouterr().out
