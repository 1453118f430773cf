"""Exact resume, whole-or-nothing saves, other meshes, one writer and many lookers, and errors that
say what differs."""

import gc
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fjax import enumeration, jensen_shannon
from fjax.training import Checkpoints, Rollout, _lock, fdpg

LOG_PROB_FN, PREFIXES = enumeration.tabular_log_prob_fn(3, 2)
SPACE = enumeration.sequences(3, 2, eos_id=0)
TUNER = fdpg(LOG_PROB_FN, optax.adam(0.05), divergence=jensen_shannon())


@jax.jit
def step(state, rng_key):
    """Draws from the policy with the step's key, as a run does."""
    log_pi = LOG_PROB_FN(state.params, *SPACE)
    drawn = jax.random.categorical(jax.random.fold_in(rng_key, state.step), log_pi, shape=(32,))
    log_q = log_pi[drawn]
    log_score = jnp.where((SPACE.tokens == 2).any(1)[drawn], log_q, -jnp.inf)
    return TUNER.update(state, Rollout(SPACE.tokens[drawn], SPACE.where[drawn], log_q, log_score))[
        0
    ]


def run(state, steps):
    for _ in range(steps):
        state = step(state, jax.random.key(3))
    return state


def test_k_steps_restore_k_steps_equal_2k_steps_bit_for_bit(tmp_path):
    start = TUNER.init(jnp.zeros((PREFIXES, 3)))
    with Checkpoints(tmp_path) as checkpoints:
        half = run(start, 5)
        checkpoints.save(5, half)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(start)
    jax.tree.map(np.testing.assert_array_equal, restored, half)
    jax.tree.map(np.testing.assert_array_equal, run(restored, 5), run(start, 10))


def test_what_is_restored_is_asked_for_and_nothing_is_warned_of(tmp_path):
    """NumPy leaves have no sharding; orbax would warn, and warnings are errors here."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"seconds": np.asarray(2.5), "w": np.arange(3)})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore({"seconds": np.zeros(()), "w": np.zeros(3, int)})
    assert float(restored["seconds"]) == 2.5
    np.testing.assert_array_equal(restored["w"], np.arange(3))


def test_a_saved_tree_may_be_donated_at_once(tmp_path):
    """The save goes on in the background, from a copy."""
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = [jnp.zeros((500, 500)) for _ in range(8)]
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for i in range(3):
            checkpoints.save(i, tree)
            tree = add(tree)
        for i in range(3):
            saved = checkpoints.restore(tree, step=i)
            assert all((leaf == i).all() for leaf in saved)


def test_the_newest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, score=lambda metrics: metrics["divergence"]) as checkpoints:
        for i, value in enumerate([3.0, 1.0, 2.0, 5.0, 4.0]):
            checkpoints.save(i, {"i": jnp.int32(i)}, metrics={"divergence": value})
        assert (checkpoints.latest, checkpoints.best) == (4, 1)
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [1, 3, 4]


def test_nothing_saved_yet(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        assert checkpoints.best is None
        with pytest.raises(FileNotFoundError, match="No checkpoint of step None"):
            checkpoints.restore({"w": jnp.zeros(2)})


@pytest.mark.parametrize(
    ("like", "differs"),
    [
        ({"w": jnp.zeros(5)}, r"w is float32\[4\] there, float32\[5\] asked for"),
        ({"w": jnp.zeros(3)}, r"w is float32\[4\] there, float32\[3\] asked for"),
        ({"v": jnp.zeros(4)}, "w is there, but not asked for; v is asked for, but not there"),
        ({"w": jnp.zeros(4), "v": jnp.zeros(4)}, "saved run: v is asked for, but not there"),
        ({"w": jax.random.split(jax.random.key(0), 4)}, "w is float32.* there, key<fry>"),
    ],
    ids=["longer", "shorter", "another name", "one more", "keys"],
)
def test_another_tree_is_refused(tmp_path, like, differs):
    """Above all it is never padded or cut into shape, nor called damaged."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(4.0)}, wait=True)
        with pytest.raises(ValueError, match=f"holds another tree.*{differs}"):
            checkpoints.restore(like)


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 2)])
def test_restores_onto_another_mesh(tmp_path, before, after):
    def sharded(devices):
        return NamedSharding(Mesh(jax.devices()[:devices], "data"), PartitionSpec("data"))

    values = np.arange(16.0, dtype=np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"w": jax.device_put(values, sharded(before))})
        like = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharded(after))}
        restored = checkpoints.restore(like)["w"]
    assert len(restored.sharding.device_set) == after
    np.testing.assert_array_equal(restored, values)


SAVES_FOR_EVER = """
import sys, jax.numpy as jnp
from fjax.training import Checkpoints
with Checkpoints(sys.argv[1], keep=int(sys.argv[2])) as checkpoints:
    for step in range(10**6):
        checkpoints.save(step, [jnp.full((300, 300), float(step)) for _ in range(20)])
        print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05])
def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path, delay):
    """SIGKILL some milliseconds after a save has begun; what is found is whole, and not older than
    two saves."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES_FOR_EVER, tmp_path, "2"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    begun = next(int(line) for line in process.stdout if int(line) >= 3)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split()
    last = int(rest[-1]) if rest else begun
    with Checkpoints(tmp_path) as checkpoints:
        assert last - 2 <= checkpoints.latest <= last + 1
        saved = checkpoints.restore([jnp.zeros((300, 300))] * 20)
        assert all((leaf == checkpoints.latest).all() for leaf in saved)
        checkpoints.save(10**6, saved, wait=True)
        assert checkpoints.latest == 10**6


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of its saves."""
    # so many that none is gone before it is looked at
    command = [sys.executable, "-c", SAVES_FOR_EVER, tmp_path, "50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    yield process
    process.kill()
    process.communicate()


def test_looking_harms_no_save_in_progress(tmp_path, writer):
    """A look that cleaned up would delete what another process is about to finish, which dies of
    it."""
    assert writer.stdout is not None
    seen = set()
    for _ in range(8):
        assert writer.stdout.readline()  # a save has begun since the last look
        with Checkpoints(tmp_path) as looking:
            latest = looking.latest
            if latest is not None:
                saved = looking.restore([jnp.zeros((300, 300))] * 20, step=latest)
                assert all((leaf == latest).all() for leaf in saved)
                seen.add(latest)
    assert writer.poll() is None
    assert len(seen) > 1


def test_who_looks_sees_what_others_save(tmp_path):
    with Checkpoints(tmp_path) as looking, Checkpoints(tmp_path) as saving:
        assert looking.latest is None
        saving.save(1, {"w": jnp.arange(2.0)}, wait=True)
        assert (looking.latest, looking.steps) == (1, [1])
        assert looking.restore({"w": jnp.zeros(2)})["w"].tolist() == [0.0, 1.0]


def test_there_is_one_writer(tmp_path, writer):
    with (
        Checkpoints(tmp_path) as second,
        pytest.raises(
            BlockingIOError, match=f"in use by process {writer.pid} on host {socket.gethostname()}"
        ),
    ):
        second.save(10**6, {"w": jnp.zeros(2)})
    writer.kill()
    writer.wait()
    with Checkpoints(tmp_path) as second:
        second.save(10**6, {"w": jnp.zeros(2)}, wait=True)
        assert second.latest == 10**6
    assert {path.name for path in tmp_path.iterdir() if not path.name.isdigit()} == set()


@pytest.mark.parametrize(
    ("lock", "free"),
    [
        ("", True),
        ('{"host": "far', True),
        ("[]", True),
        # a number that is used again
        (json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": "then"}), True),
        (json.dumps({"host": "far", "pid": 1, "since": "then"}), False),
    ],
    # fixed: the workers of pytest-xdist have other numbers
    ids=["empty", "torn", "no-lock", "here", "far"],
)
def test_a_lock_that_was_left_behind(tmp_path, lock, free):
    """On this host the kernel says that nobody has it. Of another host nothing is known, and the
    message says what to do."""
    (tmp_path / "lock").write_text(lock)
    with Checkpoints(tmp_path) as checkpoints:
        if not free:
            with pytest.raises(
                BlockingIOError,
                match=f"process 1 on host far, since then.*delete {tmp_path / 'lock'}",
            ):
                checkpoints.save(1, {"w": jnp.zeros(2)})
            (tmp_path / "lock").unlink()
        checkpoints.save(1, {"w": jnp.zeros(2)}, wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_without_kernel_locks_a_living_process_keeps_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("fjax.training._lock.fcntl", None)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (tmp_path / "lock").write_text(
        json.dumps({"host": socket.gethostname(), "pid": process.pid, "since": "then"})
    )
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(BlockingIOError, match=f"process {process.pid}"):
            checkpoints.save(1, {"w": jnp.zeros(2)})
        process.kill()
        process.wait()
        checkpoints.save(1, {"w": jnp.zeros(2)}, wait=True)


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_begin_at_the_same_moment_one_has_the_lock(tmp_path, monkeypatch, links):
    """Without kernel locks, as on some shared file systems: the second comes when the first has the
    file open and has not looked into it."""

    def second(file):
        monkeypatch.setattr(_lock, "_lock", lambda file: None)
        with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()}"):
            _lock.FolderLock(tmp_path)

    def refuse(*_):
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(_lock, "_lock", second)
    _lock.FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


TREE = {
    "w": np.random.default_rng(0).normal(size=(37, 11)).astype(np.float32),
    "n": np.asarray(4, np.int32),
}


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder, score=lambda metrics: metrics["distance"]) as checkpoints:
        checkpoints.save(
            3, jax.tree.map(lambda x: jnp.asarray(x) * 2, TREE), metrics={"distance": 2.0}
        )
        checkpoints.save(4, jax.tree.map(jnp.asarray, TREE), metrics={"distance": 1.5}, wait=True)
    return folder


def flip(data: bytes, source: random.Random) -> bytes:
    changed, bit = bytearray(data), source.randrange(8 * len(data))
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def changes(name: str, data: bytes) -> list[tuple[str, bytes | None]]:
    """Single bits, most of them where the arrays are; and what a full disk, or a hasty hand, leaves
    of a file."""
    flips = 8 if "ocdbt.process_0/d/" in name else 1
    source = random.Random(name.split("/d/")[0])  # the names of data files are random
    flipped = [(f"bit {i}", flip(data, source)) for i in range(flips)]
    return [*flipped, ("half", data[: len(data) // 2]), ("gone", None)]


def test_a_damaged_checkpoint_is_called_damaged_or_restored_right(two_saves, tmp_path):
    """Every file of one. Most of those without arrays in them are not needed; but nothing else is
    ever restored."""
    found = {"right": [], "damaged": []}
    folder = shutil.copytree(two_saves, tmp_path / "changed")
    # Each load that fails collects garbage, and need not look at what other tests have left.
    gc.collect()
    gc.freeze()
    for path in [path for path in sorted((folder / "4").rglob("*")) if path.is_file()]:
        name, whole = str(path.relative_to(folder)), path.read_bytes()
        for what, data in changes(name, whole):
            path.unlink() if data is None else path.write_bytes(data)
            with Checkpoints(folder, score=lambda metrics: metrics["distance"]) as checkpoints:
                assert checkpoints.latest == 4
                assert checkpoints.best == (3 if "data.json" in name else 4)
                try:
                    restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, TREE))
                except OSError as error:
                    found["damaged"].append((name, what, str(error)))
                else:
                    jax.tree.map(np.testing.assert_array_equal, restored, TREE)
                    found["right"].append((name, what))
            path.write_bytes(whole)
    assert {len(cases) > 20 for cases in found.values()} == {True}
    for name, what, message in found["damaged"]:
        assert f"step 4 in {folder} is damaged" in message, (name, what)
        assert f"Delete {folder / '4'} to go on from the one before." in message
        assert len(message) < 300 + 2 * len(str(folder))


def test_a_damaged_checkpoint_is_one_sentence_and_no_pages(tmp_path, caplog):
    """asyncio would have its say of every array that could not be read, once orbax reads others."""
    tree = [jnp.full((30, 30), float(i)) for i in range(20)]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, tree)
        checkpoints.save(4, tree, wait=True)
        (tmp_path / "4" / "tree" / "manifest.ocdbt").write_bytes(b"")
        with pytest.raises(OSError, match="cannot be read"):
            checkpoints.restore(tree)
        checkpoints.restore(tree, step=3)
    gc.collect()
    # What one that a thread has held until now would say, and what is said of anybody else's.
    late = "Task was destroyed but it is pending!\ntask: <Task coro=<A.f() running at {}/a.py:1>>"
    for package in ("site-packages/orbax", "mine"):
        logging.getLogger("asyncio").error(late.format(package))
    said = [record.message for record in caplog.records if record.name == "asyncio"]
    assert said == [late.format("mine")]


def test_metrics_that_are_damaged_win_nothing(two_saves, tmp_path):
    """2.0 against 1.5; a single bit makes 1.5 into 3.5, and would make the other one the best
    without a word."""
    folder = shutil.copytree(two_saves, tmp_path / "changed")
    path = folder / "4" / "record" / "data.json"
    path.write_text(path.read_text().replace('"distance": 1.5', '"distance": 3.5'))
    with Checkpoints(folder, score=lambda metrics: metrics["distance"]) as checkpoints:
        assert checkpoints.best == 3
        with pytest.raises(OSError, match="damaged: record/ is not what was saved"):
            checkpoints.restore(TREE)


def test_a_damaged_checkpoint_that_is_set_aside_makes_room_for_another(two_saves, tmp_path):
    folder = shutil.copytree(two_saves, tmp_path / "changed")
    (folder / "4" / "tree" / "_METADATA").unlink()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.set_aside(4) == folder / "aside-4"
        assert checkpoints.steps == [3]
        checkpoints.save(4, TREE, wait=True)
        np.testing.assert_array_equal(checkpoints.restore(TREE)["w"], TREE["w"])
        assert checkpoints.set_aside(4) == folder / "aside-4-again"


@pytest.mark.parametrize("damage", [False, True])
def test_checkpoints_from_before_there_were_records(tmp_path, damage):
    """They have no digests: what they hold is restored as ever, and what cannot be restored has two
    explanations."""
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(str(tmp_path)) as old:
        for step, distance in ((1, 0.5), (2, 0.75)):
            old.save_checkpointables(
                step, {"tree": TREE}, metrics={"distance": distance}, force=True
            )
    if damage:
        (tmp_path / "2" / "tree" / "manifest.ocdbt").write_bytes(b"")
    with Checkpoints(tmp_path, score=lambda metrics: metrics["distance"]) as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (2, 1)
        if damage:
            with pytest.raises(
                ValueError,
                match=r"another tree than the one asked for: .* saved run, or is damaged",
            ):
                checkpoints.restore(TREE)
        else:
            np.testing.assert_array_equal(checkpoints.restore(TREE)["w"], TREE["w"])


def test_64_bits_survive_and_other_dtypes_are_cast(tmp_path):
    """The device would cut float64 to float32; seconds of a long run need more."""
    tree = {
        "seconds": np.asarray(1234567.123456789),
        "w": jnp.arange(3.0),
        "key": jax.random.key(7),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, wait=True)
        same = checkpoints.restore(tree)
        assert same["seconds"].dtype == np.float64
        assert float(same["seconds"]) == 1234567.123456789
        assert (jax.random.key_data(same["key"]) == jax.random.key_data(tree["key"])).all()
        other = checkpoints.restore(
            tree | {"seconds": jnp.float32(0), "w": jnp.zeros(3, jnp.bfloat16)}
        )
    assert (other["seconds"].dtype, other["w"].dtype) == (jnp.float32, jnp.bfloat16)
    assert other["w"].tolist() == [0.0, 1.0, 2.0]


def test_a_save_that_fails_is_forgotten(tmp_path):
    """A full disk, played by a limit on the size of files: the error is raised, and the step counts
    as not saved."""
    like = {"w": np.random.default_rng(0).normal(size=10**5)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": np.arange(1e5)}, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limit[1]))
        try:
            with pytest.raises(
                OSError, match=f"could not be written to {tmp_path}: File too large.$"
            ):
                checkpoints.save(2, like, wait=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert checkpoints.steps == [1]
        checkpoints.save(2, like, wait=True)
        np.testing.assert_array_equal(checkpoints.restore(like)["w"], like["w"])


def test_a_save_that_fails_says_so_once(tmp_path, monkeypatch):
    """Not a page for every array, from threads that come too late; what others say is heard."""
    tree = [np.random.default_rng(i).normal(size=(100, 100)) for i in range(60)]
    limit, heard = resource.getrlimit(resource.RLIMIT_FSIZE), []
    other = SimpleNamespace(exc_value=RuntimeError("another"))
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    for attempt in range(3):  # one of them is almost sure to have latecomers
        with Checkpoints(tmp_path / str(attempt)) as checkpoints:
            checkpoints.save(1, tree, wait=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
            try:
                with pytest.raises(OSError, match="File too large"):
                    checkpoints.save(2, tree, wait=True)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            sys.unraisablehook(other)
    assert heard == [other] * 3
    assert sys.unraisablehook == heard.append


def test_metrics_that_are_not_numbers_are_never_best(tmp_path):
    with Checkpoints(tmp_path, keep=1, score=lambda metrics: metrics["distance"]) as checkpoints:
        for step, distance in enumerate([float("nan"), 1.0, float("nan"), 2.0, float("inf")]):
            checkpoints.save(
                step, {"i": jnp.int32(step)}, metrics={"distance": distance}, wait=True
            )
        assert (checkpoints.best, checkpoints.steps) == (1, [1, 4])
