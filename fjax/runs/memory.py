"""Memory of the device, and of the process."""

import ctypes
import math
import os
from typing import Any

import jax

from fjax.types import PyTree

# <malloc.h> of glibc
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets a process keep what it frees; to be called before JAX computes anything.

    On a CPU each call of a compiled program takes its working memory anew, some hundred megabytes
    in a step of training, and gives it back. The kernel must then clear every page of it each time,
    which is up to a third of the step. glibc keeps memory only if it is in one heap, and threads
    that have begun keep the heaps that they have.

    Returns:
        Whether that is so; False where there is no glibc.

    fjax's commands do this. In a script of your own it is the first line:

        fjax.runs.keep_freed_memory()

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    options = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
    taken = [mallopt(option, value) for option, value in options.items()]
    return all(taken)


def device_memory() -> int:
    """Bytes of the device that arrays are made on."""
    of_device = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in of_device:
        return of_device["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bytes_per_device(tree: PyTree) -> int:
    """Of arrays, or of their shapes, on each device of what they lie on.

    >>> import jax.numpy as jnp
    >>> bytes_per_device({"w": jnp.zeros((3, 4)), "b": jnp.zeros(4, jnp.bfloat16)})
    56
    """
    return sum(_part(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    return math.prod(leaf.shape if sharding is None else sharding.shard_shape(leaf.shape))
