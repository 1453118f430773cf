"""Several processes, each with devices and rows of its own.

All run the same program over the same global arrays (`jax.distributed`). What Python does with a
row, decoding it or asking a reward, is done by the process whose devices hold it, and the answers
are exchanged; so every process knows the same numbers, and takes the same decisions. With one
process all of this is a plain copy to the host.

Source: jax.distributed; multi-controller JAX.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fjax.types import PyTree

__all__ = [
    "agree",
    "any_of",
    "connect",
    "fetch",
    "are_several",
    "is_first",
    "join_rows",
    "own_part",
    "own_rows",
    "share_of_rows",
]

HEARTBEAT = 30
"""Seconds without a word from a process after which the others end."""


def connect(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the processes of one run, before JAX computes anything.

    Args:
        coordinator: host:port of process 0. None for all three: as the environment says, which
            JAX reads of SLURM, Open MPI, Kubernetes and Cloud TPU.
        processes: how many there are.
        process: the number of this one, from 0.

    Raises:
        RuntimeError: if the environment is none of these, or the others do not come.
    """
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(
            f"The processes of this run did not find one another: {lines[0]} Start as many as are "
            f"said, each with the coordinator's host:port, their number, and its own, from 0."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes what all know.

    >>> is_first()
    True
    """
    return not are_several() or jax.process_index() == 0


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


def any_of(flag: int) -> int:
    """The largest of what the processes say.

    >>> any_of(0)
    0
    """
    if not are_several():
        return flag
    return int(multihost_utils.process_allgather(np.int64(flag)).max())
