"""Checkpoints through orbax: written in the background, whole or not at all.

They are restored onto whatever mesh there is. A checkpoint appears under its final name only once
every byte of it is on disk, so a process that is killed in the middle of a save finds the one
before. Keys and data positions follow from ``state.step``, hence a tree of arrays is all there is
to save, and k steps, a restore and k steps more equal 2k steps bit for bit.

Beside the arrays lies their record: dtype, shape and SHA-256 of each, and who saved them. It says
at a restore whether another tree or run is asked for, or whether what is on disk is no longer what
was saved. Whoever looks changes nothing; whoever saves has the folder for itself.
"""

import errno
import gc
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from fjax._trees import name_leaves
from fjax.hosts import agree, is_first
from fjax.training import _record
from fjax.training._digests import describe_arrays
from fjax.training._lock import FolderLock, NoLock
from fjax.training._record import is_key, make_record, sealed
from fjax.types import PyTree

RECORD = "record"
"""What is saved beside the tree: its arrays' dtypes, shapes and digests, the metrics, and whose it
is."""


class Checkpoints:
    """The checkpoints of one run: the newest few, and the best.

    A context manager; leaving it waits for the last save. The first save makes this process the
    folder's only writer, until it is closed; only then is anything deleted. Any number of others
    may look at the same time: what is there when they ask is what they are told of.

    Args:
        folder: of the run's checkpoints; made if it is not there.
        keep: how many of the newest to keep.
        score: metrics -> number, the lower the better; the best checkpoint is kept beside the
            newest. None: no best.
        about: what the run is, as plain values, such as its configuration. It is saved beside every
            checkpoint, and one that says otherwise is refused. None: nothing is compared.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(3, {"w": jnp.arange(2.0)}, wait=True)
    ...     checkpoints.latest, checkpoints.restore({"w": jnp.zeros(2)})["w"].tolist()
    (3, [0.0, 1.0])
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        score: Callable[[dict], float] | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        self._folder, self._keep, self._score = Path(folder).absolute(), keep, score
        self._about = about
        self._pending, self._lock, self._hushed = None, None, ExitStack()
        self._metrics: dict[int, Any] = {}  # of the steps that were asked for; they never change
        self._orbax = self._open()

    def _open(self, *, clean: bool = False) -> ocp.training.Checkpointer:
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=RECORD)
        context = ocp.Context()
        context.checkpointables.registry = registry
        return ocp.training.Checkpointer(
            str(self._folder),
            context=context,
            preservation_policy=_Kept(self._choose),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=clean,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the last save, and lets others save here."""
        try:
            self._orbax.close()
        finally:
            self._hushed.close()
            if self._lock is not None:
                self._lock.release()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:
            self._give_up(error)

    @property
    def steps(self) -> list[int]:
        """The steps that are saved whole, in order."""
        self.wait()
        if self._lock is None:  # another process may write and delete
            self._reopen()
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    @property
    def latest(self) -> int | None:
        """The newest step that is saved whole; None if there is none."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The saved step with the lowest score.

        None without ``score``, or before any checkpoint has metrics.
        """
        return self._best(self.steps)

    def save(
        self,
        step: int,
        tree: PyTree,
        *,
        metrics: dict[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Copies the tree and writes it in the background; the arrays may be donated at once.

        The digests are taken before it returns: about a second for each gigabyte and core.

        Args:
            step: its number; a step that is saved already is left as it is.
            tree: of arrays.
            metrics: numbers for ``score``.
            wait: return only once it is on disk.

        Raises:
            OSError: when this save or the one before could not be written (a full disk, say), or
                another process saves here (`BlockingIOError`).
        """
        self.wait()
        self._own()
        if step in self.steps:
            return
        self._metrics[step] = (
            None if metrics is None else {name: float(value) for name, value in metrics.items()}
        )
        record = make_record(tree, self._metrics[step], self._about)
        try:
            self._pending = self._orbax.save_checkpointables_async(
                step, {"tree": tree, RECORD: record}, force=True
            )
        except OSError as error:
            self._give_up(error)
        if wait:
            self.wait()

    def restore(self, like: PyTree, *, step: int | None = None) -> Any:
        """Loads a checkpoint into the structure, dtypes and shardings of ``like``.

        Args:
            like: arrays or `jax.ShapeDtypeStruct`s; their shardings may be of another mesh than
                that of the save. NumPy arrays are restored as such.
            step: which one; None means the newest.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if it holds another tree than ``like``, is of another run, or of a newer
                fjax that saves otherwise; with what differs.
            OSError: if it is damaged: what is on disk is not what was saved.
        """
        there = self.steps
        step = max(there, default=None) if step is None else step
        if step not in there:
            raise FileNotFoundError(
                f"No checkpoint of step {step} in {self._folder}; there are {there}."
            )
        record = self._read_record(step)
        if record is not None:
            self._check_same(step, record, like)
        arrays = None if record is None else record["arrays"]
        loaded = self._load(step, like, arrays)
        if arrays is not None:
            found = describe_arrays(loaded)
            bad = [
                name
                for name in arrays
                if None is not arrays[name]["sha256"] != found[name]["sha256"]
            ]
            if bad:
                raise OSError(self._damaged(step, f"{', '.join(bad[:8])} is not what was saved"))
        return jax.tree.map(_cast, loaded, like)

    def set_aside(self, step: int) -> Path:
        """Renames a checkpoint so that nothing takes it for one; returns its new path."""
        self.wait()
        self._own()
        place = self._folder / f"aside-{step}"
        while place.exists():
            place = place.with_name(place.name + "-again")
        if is_first():
            (self._folder / str(step)).rename(place)
        agree(step)  # the others look only then
        self._metrics.pop(step, None)
        self._reopen()
        return place

    def _give_up(self, error: Exception) -> NoReturn:
        """Forgets a save that failed, and drops its half, which a full disk has no room for."""
        with suppress(Exception):  # orbax's close says the same again
            self._orbax.close()
        self._orbax = self._open(clean=self._lock is not None)
        raise OSError(
            f"A checkpoint could not be written to {self._folder}: {_reason(error)}."
        ) from error

    def _check_same(self, step: int, record: Mapping[str, Any], like: PyTree) -> None:
        """Whether it is what is asked for, by whom it may be asked for.

        Raises:
            ValueError: if not.
        """
        why = _record.too_new(record) or _record.other_run(record, self._about)
        if why is not None:
            raise ValueError(f"The checkpoint of step {step} in {self._folder} {why}.")
        differing = _record.other_tree(record, name_leaves(like))
        if differing is not None:
            raise ValueError(f"{self._other_tree(step)}: {differing}.")

    def _own(self) -> None:
        """From here on nobody else saves here, and what a kill left half-written may go."""
        if self._lock is None:
            # Of several processes the first has the folder for all.
            self._lock = FolderLock(self._folder) if is_first() else NoLock()
            self._hushed.enter_context(_without_late_news())
            self._reopen(clean=True)

    def _reopen(self, *, clean: bool = False) -> None:
        """Sees what is there now.

        orbax's own way of doing so would read every file of metrics, damaged ones too.
        """
        self._orbax.close()
        self._orbax = self._open(clean=clean)

    def _choose(self, steps: Sequence[int]) -> set[int]:
        """Those to keep."""
        return {*sorted(steps)[-self._keep :], self._best(steps)} - {None}

    def _best(self, steps: Sequence[int]) -> int | None:
        if self._score is None:
            return None
        metrics = {step: self._metrics_of(step) for step in steps}
        scores = {step: self._score(found) for step, found in metrics.items() if found is not None}
        return min(
            (step for step in scores if math.isfinite(scores[step])),
            key=scores.__getitem__,
            default=None,
        )

    def _metrics_of(self, step: int) -> dict | None:
        """None if it has none, or they are damaged."""
        if step not in self._metrics:
            self._metrics[step] = None
            with suppress(OSError):
                record = self._read_record(step)
                before_records = {
                    checkpoint.step: checkpoint.metrics for checkpoint in self._orbax.checkpoints
                }
                self._metrics[step] = before_records[step] if record is None else record["metrics"]
        return self._metrics[step]

    def _read_record(self, step: int) -> dict | None:
        """Arrays and metrics of a checkpoint.

        None for one that was saved before there were records.

        Raises:
            OSError: if it is damaged.
        """
        if not (self._folder / str(step) / RECORD).is_dir():
            return None
        try:
            found = self._orbax.load_checkpointables(step, {RECORD: None})[RECORD]
            if found["sha256"] == sealed(found)["sha256"]:
                return found
        except PermissionError:
            raise
        except Exception:  # whatever orbax and we make of what is not a record
            self._check_there(step)
        raise OSError(self._damaged(step, f"{RECORD}/ is not what was saved"))

    def _load(self, step: int, like: PyTree, arrays: dict | None) -> PyTree:
        with _quiet():
            try:
                return self._orbax.load_checkpointables(step, {"tree": _abstract(like, arrays)})[
                    "tree"
                ]
            except Exception as error:
                if isinstance(error, (MemoryError, PermissionError)) or "RESOURCE_EXHAUSTED" in str(
                    error
                ):
                    raise
                reason = _brief(error)
            gc.collect()
        self._check_there(step)
        if arrays is not None or not (self._folder / str(step) / "tree").is_dir():
            raise OSError(self._damaged(step, "its arrays cannot be read"))
        raise ValueError(f"{self._other_tree(step)}, or is damaged. orbax says: {reason}")

    def _check_there(self, step: int) -> None:
        if not (self._folder / str(step)).is_dir():
            raise FileNotFoundError(
                f"The checkpoint of step {step} in {self._folder} was deleted while it was read."
            )

    def _damaged(self, step: int, how: str) -> str:
        return (
            f"The checkpoint of step {step} in {self._folder} is damaged: {how}. Delete "
            f"{self._folder / str(step)} to go on "
            "from the one before."
        )

    def _other_tree(self, step: int) -> str:
        return (
            f"The checkpoint of step {step} in {self._folder} holds another tree than the one "
            f"asked for: the model or the "
            "optimiser differs from that of the saved run"
        )


class _Kept:
    """orbax's view of which checkpoints to keep."""

    def __init__(self, choose: Callable[[Sequence[int]], set[int]]):
        self._choose = choose

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._choose([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _abstract(like: PyTree, arrays: Mapping[str, dict] | None) -> PyTree:
    """What orbax is to load: in the dtypes that were saved, since digests are of those."""
    leaves, structure = jax.tree.flatten(like)
    saved = [
        leaf.dtype if arrays is None else arrays[name]["dtype"]
        for name, leaf in zip(name_leaves(like), leaves, strict=True)
    ]
    return structure.unflatten(
        _abstract_leaf(leaf, str(dtype)) for leaf, dtype in zip(leaves, saved, strict=True)
    )


def _abstract_leaf(leaf: Any, dtype: str) -> Any:
    keep = is_key(dtype) or (
        str(leaf.dtype) == dtype and jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype
    )
    # another dtype is cast after the check; devices may cut 64 bits off
    if _is_on_host(leaf) or not keep:
        return np.empty(leaf.shape, dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))


def _cast(loaded: Any, like: Any) -> Any:
    if not _is_on_host(loaded):
        return loaded
    cast = loaded.astype(like.dtype, copy=False)
    return cast if _is_on_host(like) else jax.device_put(cast, _sharding(like))


def _is_on_host(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | np.generic)


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)  # a ShapeDtypeStruct may have none
    return (
        jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
    )


def _brief(error: Exception) -> str:
    """Its kind and first line; orbax and tensorstore say pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _reason(error: Exception) -> str:
    """What the system said, out of the pages around it; else the first line."""
    text = str(error)
    return next(
        (os.strerror(number) for number in errno.errorcode if os.strerror(number) in text),
        _brief(error),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """A failed load leaves coroutines of orbax's behind, whose collection would print pages.

    And tasks, of which asyncio says at their end that nobody asked what became of them; at whatever
    time, where a thread of tensorstore's holds them still.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    news = logging.getLogger("asyncio")
    news.addFilter(_not_of_orbax)
    spoken, news.disabled = news.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook, news.disabled = hook, spoken


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.getMessage()


@contextmanager
def _without_late_news() -> Iterator[None]:
    """Keeps quiet what threads tell orbax of a save that failed, when its loop is closed.

    tensorstore tells it array by array: each would print a page, and `Checkpoints.wait` raises the
    failure anyway.
    """
    hook = sys.unraisablehook

    def heard(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = heard
    try:
        yield
    finally:
        if sys.unraisablehook is heard:  # and nobody else's since
            sys.unraisablehook = hook
