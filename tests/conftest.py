"""What every test stands on: the CPU as eight devices, no silent broadcasting of ranks, the same
examples each time."""

import functools
import gc
import os
import threading
from collections import Counter
from importlib.metadata import version
from pathlib import Path

# Before jax is imported, and in the environment so that processes which tests start are alike. Nine
# tenths of a test's time is compilation. Without optimisation the programs, all of them small, run
# about as fast; the older way to emit loops takes a third of the time, where there is it still:
# flags that an XLA does not know end the process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# FJAX_TEST_XLA=default compiles as a user does.
if os.environ.get("FJAX_TEST_XLA") != "default":
    FLAGS = " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    FLAGS += " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")
    # Once: a worker has them from the process that started it, and other flags are other programs.
    if FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
# A program is compiled once, whichever test, worker or command comes to it first, and not again by
# the next run. It is found by what it is of: the code, the flags, the versions.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import jaxtyping
import pytest
from jax._src.interpreters import mlir

# Eight devices let `pmap` and `shard_map` be tested on any machine; processes which tests start
# have one, as a user's.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# For every program jax 0.10 makes a context of MLIR, which is half the work of lowering a small one,
# and keeps it, 1.5 MB, with what it has lowered. Here a thread has one for all, as in jax 0.12.
if version("jax").startswith("0.10."):
    context_of = functools.lru_cache(lambda thread, make=mlir.make_ir_context: make())
    mlir.make_ir_context = lambda: context_of(threading.get_ident())

hypothesis.settings.register_profile(
    "fjax",
    deadline=None,  # the first example compiles
    derandomize=True,  # red for one is red for all
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fjax")

# How often jax did what, by the names of its events.
events: Counter[str] = Counter()
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.update([name]))
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


def pytest_addoption(parser):
    parser.addoption(
        "--bare", action="store_true", help="run as a user does: without the two nets below"
    )
    parser.addoption(
        "--one-case", action="store_true", help="what a second Python is for, one case of each test"
    )


# What another Python, jax or flax can break: imports, examples, what is refused, tracing under every
# transformation, models, files, and a run of each command. That the numbers are right is shown once.
SECOND = (
    "fjax/",
    "tests/experiments/",
    "tests/models/",
    "tests/runs/test_endings.py",
    "tests/runs/test_extra.py",
    "tests/sampling/test_categorical.py",
    "tests/sampling/test_transforms.py",
    "tests/test_checks.py",
    "tests/test_contracts.py",
    "tests/test_doors.py",
    "tests/test_imports.py",
    "tests/test_metrics.py",
    "tests/test_names.py",
    "tests/test_numerics.py",
    "tests/test_old_paths.py",
    "tests/test_rollouts.py",
    "tests/test_sharding.py",
    "tests/test_transformations.py",
    "tests/training/test_checkpoint.py",
)


def pytest_ignore_collect(collection_path, config):
    """Nor are the files read that a second Python has nothing of."""
    if not config.getoption("--one-case") or not collection_path.name.startswith("test_"):
        return None
    name = collection_path.relative_to(config.rootpath).as_posix()
    return None if name.startswith(SECOND) else True


def pytest_collection_modifyitems(config, items):
    """What a second Python is for, one case of each test: does all of it run there?"""
    if not config.getoption("--one-case"):
        return
    first = {item.nodeid.split("[")[0]: item for item in reversed(items)}
    kept = {item for item in first.values() if _is_for_a_second_python(item)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _is_for_a_second_python(item):
    if item.nodeid.startswith("tests/experiments/"):
        return item.get_closest_marker("command") is not None
    return item.nodeid.startswith(SECOND)


def pytest_collection_finish():
    """What is there before the first test stays; the collector need not look at it every time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_teardown():
    """jax keeps what it has lowered, up to 2048 programs, and each that is kept makes the next
    slower."""
    if events[LOWERED] > 4000:
        events.clear()
        jax.clear_caches()


def pytest_configure(config):
    if config.getoption("--bare"):
        _remove_nets()


def _remove_nets():
    """A user has neither beartype at every call nor an error where ranks are broadcast."""
    jaxtyping.config.update("jaxtyping_disable", True)
    jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.fixture
def bare():
    """One test as a user would run it; for all that the two nets would see first, wrong shapes
    above all."""
    before = jaxtyping.config.jaxtyping_disable, jax.config.jax_numpy_rank_promotion
    _remove_nets()
    yield
    jaxtyping.config.update("jaxtyping_disable", before[0])
    jax.config.update("jax_numpy_rank_promotion", before[1])


@pytest.fixture
def x64():
    """Double precision within one test, for identities that must hold to 1e-10."""
    with jax.enable_x64(True):
        yield
