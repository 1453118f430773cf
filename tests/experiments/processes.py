"""Commands in processes of their own, side by side as on several hosts. They are forked from one
that has imported everything but not begun to compute, for imports take half of such a process."""

import atexit
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import jax
import pytest
from jax._src import cache_key, compiler, distributed

from fjax import hosts
from fjax.runs import RunError, open_run
from tests import pictures

LIMIT = 400.0
"""Seconds within which a process must end; one that hangs is noticed, too."""

calls = 0


def reward(texts):
    """How often a text has w9. At one of its calls, the process that is told to is sent a signal."""
    global calls
    calls += 1
    number, at = map(int, os.environ.get("FJAX_TEST_SIGNAL", "0@0").split("@"))
    if calls == at:
        os.kill(os.getpid(), number)
    return [float(text.count("w9")) for text in texts]


def connect_alone():
    """A command that does no more, hears a signal all the same, and writes what all have, once on a
    disk that they share."""
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    hosts.connect()
    os.kill(os.getpid(), signal.SIGTERM)
    folder, process = Path(sys.argv[1]), jax.process_index()
    print(f"process {process} of {jax.process_count()}, {hosts.any_of(process)}, {heard}")
    for path in (folder / "shared", folder / f"own-{process}"):
        hosts.write_for_all(lambda path=path: append(path, f"{process}"), path.exists)
    return 0


def open_alone():
    """A command that opens its run folder, with what it was given, and takes a step with the others."""
    hosts.connect()
    try:
        with open_run(sys.argv[1], {"seed": sys.argv[2]}):
            hosts.agree(1)
    except RunError as error:
        print(error)
        return hosts.abandon(2)
    except Exception:  # of gloo
        hosts.end_if_lost()
        raise
    return 0


def lose_the_first():
    """A command of which the first process dies while the others wait."""
    hosts.connect()
    with hosts.if_lost(lambda: "Begin again."):
        hosts.agree(1)
        if hosts.is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LIMIT)


def append(path, text):
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def start(log, name, *arguments, devices=1, **environment):
    """A process with so many devices that runs the command, or the function, of that name."""
    context = multiprocessing.get_context("forkserver")
    tasks = (f"experiments.{task}.__main__" for task in ("lexical_constraint", "sentiment_reward"))
    tokenizers = "transformers.models.auto.tokenization_auto"  # what `load_tokenizer` comes to
    context.set_forkserver_preload([__name__, *tasks, tokenizers])
    words = [str(word) for word in arguments]
    process = context.Process(target=_go, args=(Path(log), name, words, devices, environment))
    process.start()
    return process


def _go(log, name, words, devices, environment):
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8")
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    os.environ.update(environment)
    pictures.small(pytest.MonkeyPatch())
    # Kept programs are found by a fingerprint of the devices, too, which here differs from process
    # to process though the devices do not. Nor would any but the first process keep its own.
    cache_key._hash_accelerator_config = lambda hashed, devices: hashed.update(b"cpu")
    compiler._cache_write = partial(_as_the_first, compiler._cache_write)
    jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = [name, *words]
    here = name in globals()
    status = (globals()[name] if here else import_module(f"experiments.{name}.__main__").main)()
    atexit._run_exitfuncs()  # a forked process does not of itself
    sys.stdout.flush()
    os._exit(status)


def _as_the_first(function, *given):
    with patch.object(distributed.global_state, "process_id", 0):
        function(*given)


def ended(*processes):
    """Their exit statuses, -9 after SIGKILL."""
    until = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(until - time.monotonic(), 0))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return found
