"""Checkpoints through orbax: written in the background, whole or not at all, and restored onto whatever mesh there is.

A checkpoint appears under its final name only once every byte of it is on disk, so a process that is killed in the middle
of a save finds the one before. Keys and data positions follow from ``state.step``, hence a tree of arrays is all there is
to save, and k steps, a restore and k steps more equal 2k steps bit for bit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from fjax._typing import PyTree


class Checkpoints:
    """The checkpoints of one run: the newest few, and the best. A context manager; leaving it waits for the last save.

    Args:
        folder: of the run's checkpoints; made if it is not there.
        keep: how many of the newest to keep.
        score: metrics -> number, the lower the better; the best checkpoint is kept beside the newest. None: no best.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(3, {"w": jnp.arange(2.0)}, wait=True)
    ...     checkpoints.latest, checkpoints.restore({"w": jnp.zeros(2)})["w"].tolist()
    (3, [0.0, 1.0])
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, score: Callable[[dict], float] | None = None):
        policies = ocp.training.preservation_policies
        kept: list = [policies.LatestN(keep)]
        if score is not None:
            # "Best" is last in orbax's order, and reversed the order descends.
            kept.append(policies.BestN(get_metric_fn=score, reverse=True, n=1, keep_checkpoints_without_metrics=False))
        self._score, self._pending = score, None
        self._orbax = ocp.training.Checkpointer(
            str(Path(folder).absolute()),
            preservation_policy=policies.AnyPreservationPolicy(kept),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,  # what a kill left half-written
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._orbax.close()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @property
    def latest(self) -> int | None:
        """The newest step that is saved whole; None if there is none."""
        self.wait()
        newest = self._orbax.latest
        return None if newest is None else newest.step

    @property
    def best(self) -> int | None:
        """The saved step with the lowest score; None without ``score``, or before any checkpoint has metrics."""
        self.wait()
        score, metrics = self._score, {c.step: c.metrics for c in self._orbax.checkpoints if isinstance(c.metrics, dict)}
        return None if score is None or not metrics else min(metrics, key=lambda step: score(metrics[step]))

    def save(self, step: int, tree: PyTree, *, metrics: dict[str, float] | None = None, wait: bool = False) -> None:
        """Copies the tree and writes it in the background; the arrays may be donated at once.

        Args:
            step: its number; a step that is saved already is left as it is.
            tree: of arrays.
            metrics: numbers for ``score``.
            wait: return only once it is on disk.

        Raises:
            OSError: when an earlier save could not be written (a full disk, say).
        """
        self.wait()
        if any(c.step == step for c in self._orbax.checkpoints):
            return
        self._pending = self._orbax.save_checkpointables_async(
            step,
            {"tree": tree},
            metrics=None if metrics is None else {**metrics},
            force=True,
        )
        if wait:
            self.wait()

    def restore(self, like: PyTree, *, step: int | None = None) -> Any:
        """Loads a checkpoint into the structure, dtypes and shardings of ``like``.

        Args:
            like: arrays or `jax.ShapeDtypeStruct`s; their shardings may be of another mesh than that of the save.
            step: which one; None means the newest.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if it holds another tree than ``like``.
        """
        step = self.latest if step is None else step
        if step is None or all(c.step != step for c in self._orbax.checkpoints):
            there = [c.step for c in self._orbax.checkpoints]
            raise FileNotFoundError(f"No checkpoint of step {step} in {self._orbax.directory}; there are {there}.")
        abstract = jax.tree.map(_abstract, like)
        try:
            return self._orbax.load_checkpointables(step, {"tree": abstract})["tree"]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"The checkpoint of step {step} in {self._orbax.directory} holds another tree than the one asked for: the "
                f"model or the optimiser differs from that of the saved run. orbax says: {str(error)[:300]}"
            ) from error


def _abstract(leaf):
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:  # a NumPy array; told nothing, orbax would warn, and restore onto the devices of the save
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
