"""Two processes of four devices each do what one process with one device does; and what becomes of
them when one is told to stop, or is lost."""

import json
import os
import re
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.common.settings import Settings
from fjax.training._lock import FolderLock
from tests.test_peers import free_port

from .commands import TINY
from .processes import ended, start

SIZES = (
    "--model", TINY, "--samples", 16, "--base-fraction", 0.5, "--eval-samples", 16, "--max-new-tokens", 4,
)  # fmt: skip
MESH = ("--mesh", "data=4,fsdp=2")
REWARDED = (
    "sentiment_reward", *SIZES, "--reward", "tests.experiments.processes:reward", "--steps", 4, "--eval-every", 2,
    "--checkpoint-every", 1,
)  # fmt: skip
STAGED = (
    "lexical_constraint", *SIZES, "--word", "w9", "--stages", "forward_kl:32:5", "jensen_shannon:16:5",
    "--minibatch-size", 16, "--eval-every", 3, "--exact-samples", 8, "--exact-draws", 32,
)  # fmt: skip


def slurm(process, job):
    """What srun gives a process of two on one host."""
    host, number = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}, str(process)
    return host | {"SLURM_JOB_ID": str(job), "SLURM_PROCID": number, "SLURM_LOCALID": number}


def open_mpi(process, job):
    """The same of mpirun, up to Open MPI 4."""
    uri, size = f"{job * 2**12}.0;tcp://127.0.0.1:34911", {"OMPI_COMM_WORLD_SIZE": "2"}
    ranks = {f"OMPI_COMM_WORLD_{name}": str(process) for name in ("RANK", "LOCAL_RANK")}
    return size | ranks | {"OMPI_MCA_orte_hnp_uri": uri}


def start_both(folder, command, *arguments, second):
    """By address; the second process in an environment of its own."""
    where = (*MESH, "--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2)
    given = (*command, *arguments, *where, "--run-folder", folder)
    return [
        start(f"{folder}.log{i}", *given, "--process", i, devices=4, **(second if i else {}))
        for i in range(2)
    ]


def read(path):
    return path.read_text(encoding="utf-8")


def numbers(folder):
    """All records without what a clock says, and what no two sums agree on where weights are equal."""
    records = map(json.loads, read(folder / "metrics.jsonl").splitlines())
    return [
        {k: float(v) for k, v in record.items() if k not in ("kind", "seconds", "pareto_k")}
        for record in records
    ]


def assert_same(ours, theirs):
    """Of two runs: every figure but for rounding, every sample, the model."""
    for mine, other in zip(numbers(ours), numbers(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert read(ours / "samples.jsonl") == read(theirs / "samples.jsonl")
    mine, other = (load_file(folder / "model" / "model.safetensors") for folder in (ours, theirs))
    for name, tensor in other.items():
        np.testing.assert_allclose(mine[name], tensor, atol=1e-2, err_msg=name)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a run that was never interrupted, and of one of which the second process was
    told to stop, then killed; what was said; and what was saved by then."""
    folder = tmp_path_factory.mktemp("interrupted")
    one, two = folder / "one", folder / "two"
    whole = start(f"{one}.log", *REWARDED, "--run-folder", one)
    assert ended(whole) == [0], read(folder / "one.log")

    # The reward is asked as it is loaded, for each evaluation, and for each step.
    stopped = ended(*start_both(two, REWARDED, second={"FJAX_TEST_SIGNAL": "15@4"}))
    said = [read(folder / f"two.log{i}") for i in range(2)]
    assert stopped == [128 + 15, 128 + 15], said

    first, second = start_both(two, REWARDED, "--resume", second={"FJAX_TEST_SIGNAL": "9@3"})
    assert ended(second) == [-9], read(folder / "two.log1")
    since = time.monotonic()
    (status,) = ended(first)
    seconds, lost = time.monotonic() - since, read(folder / "two.log0")
    assert status == 75, lost
    saved = max(int(path.name) for path in two.glob("checkpoints/*") if path.name.isdecimal())

    left = start(f"{folder / 'two.log'}", *REWARDED, "--run-folder", two, "--resume")
    assert ended(left) == [0], read(folder / "two.log")
    return one, two, said, lost, seconds, saved


def test_whatever_happens_to_one_the_run_is_the_same(interrupted):
    """One step and an evaluation each of two processes, stopped and killed, of one process."""
    one, two, *_ = interrupted
    assert_same(two, one)


def test_a_signal_to_one_of_them_stops_and_saves_both(interrupted):
    _, _, (first, second), *_ = interrupted
    assert "Stopped and saved at step 2." in first
    assert not re.search("Stopped|written|reward", second)  # the first alone speaks


def test_one_that_is_killed_ends_the_other_with_a_sentence(interrupted):
    _, two, _, lost, seconds, saved = interrupted
    assert seconds < 60
    assert saved in (2, 3)  # the kill is in step 4, and may be sooner than the third one is written
    *_, last = lost.strip().splitlines()
    assert last == (
        f"Process 1 of 2 (counted from 0) no longer answers. The newest checkpoint in {two}/checkpoints "
        f"is of step {saved}. To go on, give the same command with --resume, to one process or to several."
    )
    assert "Traceback" not in lost
    assert not (two / "lock").exists()


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """Folders of a run in stages by one process, and by two that SLURM has started."""
    folder = tmp_path_factory.mktemp("staged")
    runs, processes = [folder / "one", folder / "two"], []
    for i in (None, 0, 1):
        run = runs[0 if i is None else 1]
        there = "--run-folder", run, "--exact-folder", folder / f"exact-{run.name}"
        more = {} if i is None else slurm(i, os.getpid()) | {"devices": 4}
        given = STAGED if i is None else (*STAGED, *MESH, "--distributed")
        processes.append(start(f"{run}.log{i or 0}", *given, *there, **more))
    statuses = ended(*processes)
    assert statuses == [0, 0, 0], [read(path) for path in folder.glob("*.log*")]
    return runs


@pytest.mark.command
def test_a_replay_is_the_same_on_several_hosts(staged):
    one, two = staged
    assert_same(two, one)
    kept = [
        sorted(path.name for path in one.parent.glob(f"exact-{name}/*")) for name in ("one", "two")
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 1
    assert json.loads(read(two / "config.json"))["devices"] == ["cpu"] * 8
    assert not (two / "lock").exists()


def by_mpirun(folder, command, *arguments):
    """Statuses of two processes, each with arguments of its own, and what they said."""
    logs = [folder / f"log{i}" for i in range(2)]
    both = [
        start(logs[i], command, *arguments[i], **open_mpi(i, os.getpid() + 1)) for i in range(2)
    ]
    return ended(*both), [read(log) for log in logs]


def test_open_mpi_starts_them_too(tmp_path):
    """They meet; and what all have made alike is written once on each disk."""
    statuses, said = by_mpirun(tmp_path, "connect_alone", [tmp_path], [tmp_path])
    assert statuses == [0, 0], said
    assert all(f"process {i} of 2, 1, ['SIGTERM']\n" in said[i] for i in range(2))
    assert read(tmp_path / "shared") == "0"
    assert [read(tmp_path / f"own-{i}") for i in range(2)] == ["0", "1"]


@pytest.mark.parametrize(
    ("folder", "seed", "why"),
    [
        (
            "run",
            1,
            "This process was given something else than the first one (seed: '0' there, '1' here)",
        ),
        ("another", 0, "is not the run folder that the first process has opened"),
    ],
)
def test_what_one_process_is_given_otherwise_ends_both(folder, seed, why, tmp_path):
    statuses, said = by_mpirun(
        tmp_path, "open_alone", [tmp_path / "run", 0], [tmp_path / folder, seed]
    )
    assert statuses == [75, 2], said
    assert why in said[1]
    assert "Process 1 of 2 (counted from 0) has ended early, and says itself why.\n" in said[0]


def test_a_folder_that_a_living_process_has_is_refused_to_all(tmp_path):
    """By the first, which waits until the others have said so, for JAX's service goes with it."""
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder)
    statuses, said = by_mpirun(tmp_path, "open_alone", [folder, 0], [folder, 0])
    lock.release()
    assert statuses == [2, 75], said
    assert f"{folder} is in use by process {os.getpid()} on host" in said[0]
    assert said[1].endswith(
        "Process 0 of 2 (counted from 0) has ended early, and says itself why.\n"
    )
    assert "Check failure" not in said[1]


@pytest.mark.command
def test_the_first_may_be_the_one_that_is_lost(tmp_path):
    """With it goes what JAX's processes keep in touch by, which ends them with a page of C++."""
    statuses, said = by_mpirun(tmp_path, "lose_the_first", [], [])
    assert statuses == [-9, 75], said
    assert "Process 0 of 2 (counted from 0) no longer answers. Begin again.\n" in said[1]


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
