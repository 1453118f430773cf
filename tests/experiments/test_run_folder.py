"""Run folders: one process each, never taken for another's, and never gone on with when something
of them is missing."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import fjax
from experiments import _inputs, _loop, _run_folder
from experiments._run_folder import RunError, check_none_saved, locked, open_run
from experiments.compare import run as compare
from experiments.compare.config import Config as Comparison
from experiments.conditional.config import Config as Conditional
from experiments.lexical_constraint.config import Config
from experiments.lexical_constraint.run import main
from experiments.sentiment_reward.config import Config as Sentiment
from fjax.training import Checkpoints, read_jsonl

from .commands import SMALL, TINY, run

FREQUENT = ("--word", "w9", *SMALL)
CONFIG = {
    "run_folder": None,
    "resume": False,
    "word": "w9",
    "steps": 4,
    "eval_every": 50,
    "checkpoint_every": 20,
}


def error_of(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def opened(**changes):
    return open_run(CONFIG | changes, experiment="task", title="a[1]-js")


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
# ---------------------------------------------------------------------------------------------------------------


def test_runs_that_begin_at_one_moment_have_folders_of_their_own(tmp_path, monkeypatch):
    """All look before any makes its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_run_folder, "_numbers", lambda *_: {})
    made = [_run_folder._make_folder("task", "same") for _ in range(3)]
    assert [str(folder) for folder in made] == [f"runs/task/same-{i}" for i in range(3)]


def test_the_newest_run_is_one_that_has_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (2, 10):
        begin(Path(f"runs/task/a[1]-js-{number}"))
    for other in ("a[1]-js-11", "a[1]-js-x", "a[1]-js-clipped-12", "b-13"):
        Path(f"runs/task/{other}").mkdir()
    with opened(resume=True) as folder:
        assert folder == Path("runs/task/a[1]-js-10")
    with opened() as folder:
        assert folder == Path("runs/task/a[1]-js-12")
        (folder / "config.json").write_text("{}")
    shutil.rmtree("runs/task")
    with (
        pytest.raises(RunError, match=r"no run runs/task/a\[1\]-js-\* to resume"),
        opened(resume=True),
    ):
        pass


def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="nothing to aim at"), opened():
        raise RunError("nothing to aim at")
    assert list(Path("runs/task").iterdir()) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    with opened(run_folder=str(mine)):
        pass
    assert mine.is_dir()


# --- one process a folder
# ------------------------------------------------------------------------------------------------


HOLDS = """
import sys, time
from experiments._run_folder import open_run
with open_run({"run_folder": sys.argv[1], "resume": False}, experiment="", title="") as folder:
    (folder / "config.json").write_text(sys.argv[2])
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
                    opened(run_folder=str(folder), resume=resume),
                ):
                    pass
        finally:
            process.kill()
    with opened(run_folder=str(folder), resume=True):
        assert f"in use by process {process.pid}, which is gone" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]


def test_a_folder_in_use_on_another_host_is_refused(tmp_path):
    folder = begin(tmp_path / "run")
    (folder / "lock").write_text(json.dumps({"host": "far", "pid": 1, "since": "then"}))
    for resume in (True, False):
        with pytest.raises(RunError, match=f"process 1 on host far.*delete {folder / 'lock'}"):  # noqa: SIM117
            with opened(run_folder=str(folder), resume=resume):
                pass
    (folder / "lock").unlink()
    with opened(run_folder=str(folder), resume=True):
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
        _run_folder.write_text(path, '{"word": "é"}')
    assert path.read_text() == "{}"


def test_a_comparison_in_use_is_refused(tmp_path):
    """Before it writes anything: two at once would start each other's runs."""
    folder = tmp_path / "comparison"
    folder.mkdir()
    with (
        locked(folder),
        pytest.raises(RunError, match=f"comparison is in use by process {os.getpid()}"),
    ):
        compare._make(
            Comparison(task="lexical_constraint", folder=folder, objectives=("jensen_shannon",)),
            folder,
            [],
        )
    assert list(folder.iterdir()) == []


def test_what_a_kill_left_is_tidied_and_does_not_count_as_a_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("lock", "config.json.tmp"):
        (folder / name).write_text("")
    with opened(run_folder=str(folder)):
        assert [path.name for path in folder.iterdir()] == ["lock"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"), opened(run_folder=str(folder)):
        pass
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


# --- what is missing, damaged or changed
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", '{"word": "w9"', "[]", "5", "null", "\ufffe"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    folder = begin(tmp_path / "run")
    (folder / "config.json").write_bytes(text.encode("utf-16"))
    for data in (text.encode(), text.encode("utf-16")):
        (folder / "config.json").write_bytes(data)
        with (
            pytest.raises(RunError, match=r"config.json is damaged"),
            opened(run_folder=str(folder), resume=True),
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
        opened(run_folder=str(folder), resume=True),
    ):
        pass
    assert (folder / "metrics.jsonl").read_bytes() == kept
    (folder / "checkpoints" / "20").mkdir(parents=True)
    (folder / "metrics.jsonl").unlink()
    with (
        pytest.raises(RunError, match=r"has checkpoints, but .*metrics.jsonl is gone"),
        opened(run_folder=str(folder), resume=True),
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
        with opened(run_folder=str(folder), resume=True):
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
    config = CONFIG | {"checkpoint_every": every}
    if refused:
        with pytest.raises(RunError, match=f"has {taken} steps, but no checkpoint of them is left"):
            check_none_saved(folder, config)
    else:
        check_none_saved(folder, config)
        assert ("it begins again" in capsys.readouterr().out) == (taken > 0)


def test_changed_inputs_are_named(tmp_path, capsys):
    folder = begin(tmp_path / "run")
    with open_run(
        CONFIG | {"run_folder": str(folder), "resume": True},
        experiment="",
        title="",
        digests={"--model": "1"},
    ):
        pass
    for digests, named in (
        ({"--model": "2"}, "--model"),
        ({"--model": "1", "--pairs p": "3"}, "--pairs p"),
        ({}, "--model"),
    ):
        with pytest.raises(RunError, match=f"begun with another content of {named}. Put back"):  # noqa: SIM117
            with open_run(
                CONFIG | {"run_folder": str(folder), "resume": True},
                experiment="",
                title="",
                digests=digests,
            ):
                pass
    old = json.loads((folder / "config.json").read_text())
    del old["digests"]
    (folder / "config.json").write_text(json.dumps(old))
    with open_run(
        CONFIG | {"run_folder": str(folder), "resume": True},
        experiment="",
        title="",
        digests={"--model": "2"},
    ):
        assert "begun before fjax took digests" in capsys.readouterr().out


def test_digests_are_of_all_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("prompts.txt", "unseen.txt"):
        Path(name).write_text("w1 w2\n")
    Path("digested.py").write_text("def holds(prompt, text):\n    return True\n")
    Path("reward").mkdir()
    for name in ("model.safetensors", "config.json", "README.md"):
        Path("reward", name).write_text(name)
    conditional = Conditional(
        predicate="digested:holds", prompts=Path("prompts.txt"), unseen_prompts=Path("unseen.txt")
    )
    model = fjax.from_pretrained(TINY)

    def changed(config, path, text):
        before = _inputs.input_digests(config, model, None)
        kept = Path(path).read_text()
        Path(path).write_text(text)
        after = _inputs.input_digests(config, model, None)
        Path(path).write_text(kept)
        assert before.keys() == after.keys()
        return [name for name in before if before[name] != after[name]]

    assert changed(conditional, "prompts.txt", "w1\n") == ["--prompts prompts.txt"]
    assert changed(conditional, "unseen.txt", "w1\n") == ["--unseen-prompts unseen.txt"]
    assert changed(conditional, "digested.py", "def holds(*_):\n    return False\n") == [
        "--predicate digested:holds"
    ]
    assert changed(Sentiment(reward="reward"), "reward/model.safetensors", "") == [
        "--reward reward"
    ]
    assert changed(Sentiment(reward="reward"), "reward/README.md", "") == []
    assert changed(Sentiment(reward_folder=Path("reward")), "reward/config.json", "") == [
        "--reward-folder reward"
    ]
    assert list(_inputs.input_digests(Sentiment(reward_folder=Path("nowhere")), model, None)) == [
        "--model"
    ]

    params = jax.tree.map(
        lambda x: x.at[(0,) * x.ndim].add(1e-7) if x.ndim == 2 else x, model.params
    )
    other = _inputs.input_digests(Config(), model._replace(params=params), model)
    assert (
        other["--start"]
        == _inputs.input_digests(Config(), model, None)["--model"]
        != other["--model"]
    )


# --- whole runs
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def experiment(monkeypatch):
    return lambda *arguments: run(monkeypatch, Config, main, *arguments)


def figures(folder: Path) -> list[str]:
    records = read_jsonl(folder / "metrics.jsonl")
    # of NaN as of others
    return [repr({k: v for k, v in record.items() if k != "seconds"}) for record in records]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    experiment, tmp_path, capsys, monkeypatch
):
    """To the same end, bit for bit; and when none is whole, it says so. Nothing is in its files
    twice."""
    folder, reads = tmp_path / "run", []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: reads.append(path.name) or read_bytes(path)
    )
    arguments = (*FREQUENT, "--checkpoint-every", 2, "--run-folder", folder, "--steps", 4)
    assert experiment(*arguments) == 0
    # At the beginning and for the report, but at no save and no evaluation: each would take longer
    # than the one before.
    assert reads.count("metrics.jsonl") <= 4
    assert reads.count("samples.jsonl") == 1
    assert not (folder / "lock").exists()
    whole, first = figures(folder), fjax.from_pretrained(folder / "model").params
    samples = (folder / "samples.jsonl").read_bytes()
    (folder / "checkpoints" / "4" / "tree" / "manifest.ocdbt").write_bytes(b"")
    shutil.rmtree(folder / "model")
    capsys.readouterr()
    assert experiment(*arguments, "--resume") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"The checkpoint of step 4 in {folder / 'checkpoints'} is damaged" in printed
    assert (
        f"Going on from step 2; the damaged one is now {folder / 'checkpoints' / 'damaged-4'}"
        in printed
    )
    assert figures(folder) == whole
    assert (folder / "samples.jsonl").read_bytes() == samples
    jax.tree.map(
        np.testing.assert_array_equal, fjax.from_pretrained(folder / "model").params, first
    )
    for path in (folder / "checkpoints").glob("[0-9]*/record/data.json"):
        path.write_bytes(b"{}")
    assert experiment(*arguments, "--resume") == 2
    assert f"All checkpoints of {folder} are damaged. Delete it" in error_of(capsys)


def test_a_damaged_best_checkpoint_is_not_exported():
    """After all the work there is a model, and a word about which."""
    said = []

    def restore(like, *, step):
        raise OSError(f"The checkpoint of step {step} is damaged.")

    run = SimpleNamespace(
        settings=SimpleNamespace(divergence="jensen_shannon"),
        kept=SimpleNamespace(
            records={
                step: {"step": step, "jensen_shannon": value}
                for step, value in ((2, 0.1), (4, 0.2))
            }
        ),
        checkpoints=SimpleNamespace(steps=[2, 4], restore=restore),
        display=SimpleNamespace(warn=said.append),
    )
    last = SimpleNamespace(state=SimpleNamespace(params={"w": 4}), proposal=None, ahead=None)
    assert _loop._nearest_params(run, last, 4) == (4, {"w": 4})
    assert said == [
        "The checkpoint of step 2 is damaged. The model is that of the last step, 4, though it was "
        "nearer at step 2."
    ]


def test_changed_weights_and_another_tree_are_told_apart(experiment, tmp_path, capsys):
    folder, model = tmp_path / "run", shutil.copytree(TINY, tmp_path / "model")
    arguments = (*FREQUENT, "--model", model, "--steps", 1, "--run-folder", folder)
    assert experiment(*arguments) == 0
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    loaded = fjax.from_pretrained(model)
    fjax.save_pretrained(
        model, jax.tree.map(lambda x: x * 1.5, loaded.params), loaded.config, loaded.tokenizer
    )
    assert experiment(*arguments, "--resume") == 2
    assert "was begun with another content of --model. Put back what was there" in error_of(capsys)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept
    fjax.save_pretrained(model, loaded.params, loaded.config, loaded.tokenizer)
    shutil.rmtree(folder / "checkpoints")
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, {"another": np.zeros(3)}, wait=True)
    assert experiment(*arguments, "--resume") == 2
    message = error_of(capsys)
    assert "holds another tree" in message
    assert "another is there, but not asked for" in message
