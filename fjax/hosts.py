"""Several processes, each with devices and rows of its own.

All run the same program over the same global arrays (`jax.distributed`). What Python does with a
row, decoding it or asking a reward, is done by the process whose devices hold it, and the answers
are exchanged; so every process knows the same numbers, and takes the same decisions. With one
process all of this is a plain copy to the host.

Source: jax.distributed; multi-controller JAX.
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from fjax._peers import Peers, meet
from fjax.types import PyTree

__all__ = [
    "abandon",
    "agree",
    "any_of",
    "are_several",
    "connect",
    "end_if_lost",
    "fetch",
    "from_first",
    "if_lost",
    "is_first",
    "join_rows",
    "own_part",
    "own_rows",
    "say",
    "share_of_rows",
    "write_for_all",
]

HEARTBEAT = 30
"""Seconds without a word from a process after which JAX ends the others, if nothing else has."""

WAIT = 300.0
"""Seconds that the first process waits for the others to come."""

_peers: list[Peers] = []


def connect(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the processes of one run, before JAX computes anything.

    From then on, where one is lost the others end within half a minute and say which.

    Args:
        coordinator: host:port of process 0. None for all three: as the environment says, which
            JAX reads of SLURM, Open MPI, Kubernetes and Cloud TPU.
        processes: how many there are.
        process: the number of this one, from 0.

    Raises:
        RuntimeError: if the environment is none of these, the others do not come, or they were told
            something else.
    """
    try:
        coordinator, processes, process = _as_the_environment_says(coordinator, processes, process)
        peers = meet(coordinator, process, processes, timeout=WAIT)
        # Its handler of SIGTERM would take the place of Python's.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(
            f"The processes of this run did not find one another: {lines[0]}"
        ) from error
    _peers.append(peers)
    atexit.register(_end)  # before JAX waits for the others, as it does then
    state = distributed.global_state
    if state.service is not None:
        state.service = LastToGo(state.service, peers)


class LastToGo:
    """JAX's service in the first process, which goes once the others have ended.

    By itself it goes as soon as all have said that they are done: one that is slow to be told so
    finds its connection broken, and dies of it with a page of C++, though everything is done.
    """

    def __init__(self, service: Any, peers: Peers):
        self._service, self._peers = service, peers

    def shutdown(self) -> None:
        """What JAX asks of it, once every process has come to its end."""
        self._peers.wait_until_ended()
        self._service.shutdown()


def _as_the_environment_says(
    coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str, int, int]:
    """What is not given, as JAX finds it."""
    wait = int(WAIT)
    coordinator, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
        coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        processes,
        process,
        None,
        None,
        wait,
    )
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            "neither SLURM nor Open MPI, Kubernetes or Cloud TPU has started this one. Give each "
            "the coordinator's host:port, their number, and its own, from 0."
        )
    return coordinator, processes, process


@contextmanager
def if_lost(advice: Callable[[], str]) -> Iterator[None]:
    """Within it, this process says so and what ``advice`` gives before it ends for another's loss.

    >>> with if_lost(lambda: "Start again."):
    ...     pass
    """
    before = [peers.advice for peers in _peers]
    for peers in _peers:
        peers.advice = advice
    yield
    # Not after an error, for the loss may be what brought it about.
    for peers, earlier in zip(_peers, before, strict=True):
        peers.advice = earlier


def end_if_lost() -> None:
    """Ends this process if that is why something failed in it: another one is lost."""
    for peers in _peers:
        peers.end_if_lost()


def abandon(status: int) -> int:
    """The status; where there are other processes, ends this one with it at once, and so them.

    They would wait for it for ever, and at its end it for them.

    >>> abandon(2)
    2
    """
    for peers in _peers:
        peers.abandon()
        _leave_at_once(status)
    return status


def _end() -> None:
    """At the end of this process, which is a good one unless an error brought it about."""
    if hasattr(sys, "last_value"):
        end_if_lost()
        abandon(1)
    for peers in _peers:
        peers.leave()


def _leave_at_once(status: int) -> NoReturn:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def is_first() -> bool:
    """Whether this process is the one that writes what all know.

    >>> is_first()
    True
    """
    return not are_several() or jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line that all processes would print alike, once.

    >>> say("done")
    done
    """
    if is_first():
        print(text)


def are_several() -> bool:
    """Whether there is more than one process.

    >>> are_several()
    False
    """
    # Asked first: the number of processes is the backend's to say, which takes the devices.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def fetch(tree: PyTree) -> PyTree:
    """The arrays of a tree on the host, each whole, in every process.

    >>> import jax.numpy as jnp
    >>> fetch({"x": jnp.arange(3)})
    {'x': array([0, 1, 2], dtype=int32)}
    """
    if not are_several():
        return jax.device_get(tree)
    return jax.tree.map(_fetch_one, tree)


def _fetch_one(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if x.is_fully_replicated:  # as all figures are: nothing to ask of others, or to wait for
        return np.asarray(x.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def own_rows(x: Any) -> np.ndarray:
    """Numbers of the rows that this process's devices hold; all where it holds all.

    >>> own_rows(np.zeros((3, 2))).tolist()
    [0, 1, 2]
    """
    numbers = np.arange(len(x))
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return numbers
    return np.concatenate([numbers[index] for index, _ in _own_shards(x)])


def own_part(x: Any) -> np.ndarray:
    """These rows, on the host.

    >>> own_part(np.zeros((3, 2))).shape
    (3, 2)
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    return np.concatenate([np.asarray(data) for _, data in _own_shards(x)])


def _own_shards(x: jax.Array) -> list[tuple[slice, jax.Array]]:
    """Each of its rows once: what is sharded over rows alone has copies on other axes."""
    shards = {
        shard.index[0].start or 0: (shard.index[0], shard.data) for shard in x.addressable_shards
    }
    return [shards[start] for start in sorted(shards)]


def share_of_rows(count: int) -> np.ndarray:
    """Numbers of the rows that are this process's to look at, where all processes have all rows.

    Every process has as many, some of them twice if need be.

    >>> share_of_rows(3).tolist()
    [0, 1, 2]
    """
    if not are_several():
        return np.arange(count)
    processes = jax.process_count()
    return np.resize(np.arange(count), -(-count // processes) * processes)[
        jax.process_index() :: processes
    ]


def join_rows(values: Any, rows: np.ndarray, count: int) -> np.ndarray:
    """What each process found for its own rows, of all ``count`` rows, in every process.

    Args:
        values: ``[m, …]``, of this process's rows.
        rows: their numbers, as `own_rows` gives them; every process has as many.
        count: of all rows.

    >>> join_rows([5.0, 6.0], np.array([0, 1]), 2).tolist()
    [5.0, 6.0]
    """
    values = np.asarray(values)
    if not are_several():
        return values
    everywhere = multihost_utils.process_allgather((rows, values))
    numbers, found = (np.concatenate(list(x)) for x in everywhere)
    joined = np.zeros((count, *values.shape[1:]), values.dtype)
    joined[numbers] = found
    return joined


def agree(value: int) -> int:
    """What the first process says, in all: where each would look at a file at another moment.

    >>> agree(3)
    3
    """
    if not are_several():
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def from_first(text: str) -> str:
    """What the first process has, in all.

    >>> from_first("steps")
    'steps'
    """
    if not are_several():
        return text
    given = np.frombuffer(text.encode(), np.uint8)
    row = np.zeros(agree(len(given)), np.uint8)
    row[: len(given)] = given[: len(row)]
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(row))).decode()


def any_of(flag: int) -> int:
    """The largest of what the processes say.

    >>> any_of(0)
    0
    """
    if not are_several():
        return flag
    return int(multihost_utils.process_allgather(np.int64(flag)).max())


def write_for_all(write: Callable[[], None], is_there: Callable[[], bool]) -> None:
    """Writes what all processes have made alike, where it is not there yet.

    The first writes; and then whoever does not see it, for that one has a disk of its own.

    >>> write_for_all(lambda: print("written"), is_there=lambda: False)
    written
    """
    if is_first() and not is_there():
        write()
    if are_several():
        agree(True)
        if not is_first() and not is_there():
            write()
