"""Two processes of four devices each do what one process with one device does."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.common.settings import Settings

from .commands import TINY

ROOT = Path(__file__).parents[2]
ARGUMENTS = (
    "--model", TINY, "--word", "w9", "--steps", 3, "--samples", 16, "--base-fraction", 0.5, "--eval-samples", 16,
    "--max-new-tokens", 4, "--eval-every", 3, "--exact-samples", None,
)  # fmt: skip


def start(folder, *arguments, devices=1):
    command = [sys.executable, "-m", "experiments.lexical_constraint", *ARGUMENTS, *arguments]
    virtual = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [str(word) for word in (*command, "--run-folder", folder)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {virtual}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def free_port():
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return there.getsockname()[1]


def numbers(folder):
    """Step and evaluation records without what a clock says."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        {k: float(v) for k, v in record.items() if k not in ("kind", "seconds")}
        for record in records
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of one process, and of two, which resume what one of them began; what they printed."""
    folder = tmp_path_factory.mktemp("hosts")
    one, two = folder / "one", folder / "two"
    finish(start(one))
    where = "--mesh", "data=4,fsdp=2", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2
    both = [start(two, *where, "--process", i, devices=4) for i in range(2)]
    return one, two, finish(*both)


@pytest.mark.command
def test_two_processes_do_what_one_does(runs):
    one, two, _ = runs
    for ours, theirs in zip(numbers(two), numbers(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)
    for name in ("samples.jsonl",):
        assert (two / name).read_text(encoding="utf-8") == (one / name).read_text(encoding="utf-8")
    mine, other = (load_file(folder / "model" / "model.safetensors") for folder in (two, one))
    for name, tensor in other.items():
        np.testing.assert_allclose(mine[name], tensor, atol=1e-2, err_msg=name)


def test_the_first_process_alone_speaks_and_writes(runs):
    _, two, (first, second) = runs
    assert "Everything is written to" in first
    assert not re.search("satisfaction|written", second)
    assert json.loads((two / "config.json").read_text(encoding="utf-8"))["devices"] == ["cpu"] * 8
    assert not (two / "lock").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coordinator": "here:1"}, "given together"),
        ({"process": 0}, "given together"),
        (
            {"coordinator": "here:1", "processes": 2, "process": 2},
            "counts from 0 to --processes - 1",
        ),
        ({"distributed": True}, "need --mesh"),
        (
            {"coordinator": "here:1", "processes": 2, "process": 0, "mesh": "data=-1"},
            "--run-folder",
        ),
    ],
)
def test_processes_that_cannot_find_one_another_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Settings(**given)
