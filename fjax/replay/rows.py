"""The rows of a replay: room for them, what it takes, and how a rollout is added."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import is_concrete, one_number
from fjax.training import Rollout
from fjax.training._doors import check_counts, checked_rollout
from fjax.types import Array, Bool, Float, Int


class Replay(NamedTuple):
    """Everything drawn so far, in arrays of R rows: donate it, save it, shard it along its rows.

    Attributes:
        tokens: prompt and completion, padded on the right.
        where: tokens that count.
        log_q: log-probability of each completion under what it was drawn from at the time, the base
            model's share included. Where a part could not be given the same share of every stratum,
            less what makes up for it.
        log_score: log P(x) under the unnormalised target.
        batches: which batch each row is of, from 0; -1 for rows that are not there yet.
        held_out: rows that are never trained on.
        contexts: which context each row is of; None if there are none.
        size: how many rows there are.
    """

    tokens: Int[Array, "R T"]
    where: Bool[Array, "R T"]
    log_q: Float[Array, "R"]
    log_score: Float[Array, "R"]
    batches: Int[Array, "R"]
    held_out: Bool[Array, "R"]
    contexts: Int[Array, "R"] | None
    size: Int[Array, ""]


def init_replay(rollout: Rollout, capacity: int) -> Replay:
    """A replay with room for ``capacity`` rows like those of the rollout, and without any.

    Args:
        rollout: one as will be added: it says how many columns there are, and whether contexts.
        capacity: R.

    Raises:
        ValueError: for a rollout whose arrays do not belong together, or no room.

    >>> tokens = jnp.ones((4, 3), int)
    >>> rollout = Rollout(tokens, tokens > 0, jnp.zeros(4), jnp.zeros(4))
    >>> replay = init_replay(rollout, 100)
    >>> replay.tokens.shape, int(replay.size)
    ((100, 3), 0)

    Source: Lin 1992 (experience replay).
    """
    check_counts(capacity=capacity)
    rollout = checked_rollout(rollout, None)
    return _empty(
        rollout.tokens.shape[-1],
        capacity,
        contexts=rollout.contexts is not None,
        dtypes=(rollout.tokens.dtype, rollout.log_q.dtype),
    )


def replay_bytes(columns: int, capacity: int, *, contexts: bool = False) -> int:
    """How much memory a replay takes, known before the first sample: in float32 and int32.

    Args:
        columns: T, of prompt and completion together.
        capacity: R.
        contexts: whether rows are of contexts.

    Raises:
        ValueError: unless both are whole numbers from 1 on.

    >>> replay_bytes(40, 60_000) / 1e6
    12.780004

    Source: definition.
    """
    check_counts(columns=columns, capacity=capacity)
    dtypes = (jnp.dtype("int32"), jnp.dtype("float32"))
    replay = jax.eval_shape(lambda: _empty(columns, capacity, contexts=contexts, dtypes=dtypes))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(replay))


def _empty(columns, capacity, *, contexts, dtypes) -> Replay:
    of_tokens, of_numbers = dtypes
    return Replay(
        tokens=jnp.zeros((capacity, columns), of_tokens),
        where=jnp.zeros((capacity, columns), bool),
        log_q=jnp.zeros(capacity, of_numbers),
        log_score=jnp.full(capacity, -jnp.inf, of_numbers),
        batches=jnp.full(capacity, -1, jnp.int32),
        held_out=jnp.zeros(capacity, bool),
        contexts=jnp.zeros(capacity, jnp.int32) if contexts else None,
        size=jnp.zeros((), jnp.int32),
    )


def add_to_replay(
    replay: Replay, rollout: Rollout, *, batch: int | Int[Array, ""], held_out: float = 0.1
) -> Replay:
    """The replay with a rollout more; which of its rows are held out is settled here, for good.

    Of each context and stratum the same share is held out, at even distances: its rows are alike,
    so it does not matter which. Where a share is no whole number of rows, log q makes up for what
    a stratum has too many or too few of, so that the mean over either part is still of all.

    Args:
        replay: what there is.
        rollout: what was drawn, ``[N]``, or ``[C, N]`` of contexts. It must not have been weighted
            by what was learned from it: ``log_q`` is of what it was drawn from.
        batch: its number. Rollouts drawn from the same proposal may have the same.
        held_out: share of the rows that are never trained on; 0 for none.

    Raises:
        ValueError: if the rollout is not like those before, there is no room, the share is not from
            0 to below 1, or a stratum of a context has a single row, which cannot be in both parts.
            Within `jax.jit` the room is not known: rows without any are lost, and ``size`` says so
            by being more than there is room for.

    >>> tokens = jnp.ones((4, 3), int)
    >>> rollout = Rollout(tokens, tokens > 0, jnp.zeros(4), jnp.zeros(4))
    >>> replay = add_to_replay(init_replay(rollout, 6), rollout, batch=0, held_out=0.25)
    >>> replay.batches.tolist(), replay.held_out.tolist()
    ([0, 0, 0, 0, -1, -1], [False, False, False, True, False, False])

    Source: stratified sampling, Owen 2013, section 8.4.
    """
    _check_added(batch, held_out)
    rollout = checked_rollout(rollout, None)
    _check_room(replay, rollout)
    strata = np.zeros(rollout.log_q.shape) if rollout.strata is None else rollout.strata
    if held_out and is_concrete(strata):
        _check_strata(np.asarray(strata), held_out)
    return _add(replay, rollout, batch, held_out)


@partial(jax.jit, static_argnums=3)  # many small operations
def _add(replay: Replay, rollout: Rollout, batch, held_out: float) -> Replay:
    is_held_out, log_share = _split(rollout, held_out)
    added = {
        "tokens": rollout.tokens,
        "where": rollout.where,
        "log_q": rollout.log_q - log_share,
        "log_score": rollout.log_score,
        "batches": jnp.full(rollout.log_q.shape, batch),
        "held_out": is_held_out,
    }
    if rollout.contexts is not None:
        added["contexts"] = jnp.broadcast_to(rollout.contexts[:, None], rollout.log_q.shape)
    rows = replay.size + jnp.arange(rollout.log_q.size)
    columns = {name: _put(getattr(replay, name), rows, x) for name, x in added.items()}
    return replay._replace(**columns, size=replay.size + rollout.log_q.size)


def _put(column, rows, values):
    values = values.reshape(len(rows), *column.shape[1:]).astype(column.dtype)
    return column.at[rows].set(values, mode="drop")


def _split(rollout: Rollout, share: float) -> tuple[Bool[Array, "C N"], Float[Array, "C N"]]:
    """Which rows are held out; and the log of what each counts in the mean over its part.

    That is 1, unless strata could not be divided in proportion.
    """
    c, n = rollout.log_q.shape
    strata = jnp.zeros((c, n), jnp.int32) if rollout.strata is None else rollout.strata
    rank, count = jax.vmap(_places)(strata)
    kept_out = jnp.clip(jnp.round(share * count).astype(int), 1, count - 1) if share else 0 * count
    is_held_out = (rank + 1) * kept_out // count > rank * kept_out // count
    own = jnp.where(is_held_out, kept_out, count - kept_out)
    part = jnp.where(is_held_out, is_held_out.sum(), (~is_held_out).sum())
    dtype = rollout.log_q.dtype
    return is_held_out, jnp.log((count * part).astype(dtype) / (c * n * own).astype(dtype))


def _places(strata: Int[Array, "N"]) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """The place of each row among those of its stratum, and how many they are."""
    order = jnp.argsort(strata, stable=True)
    first, last = (jnp.searchsorted(strata[order], strata, side=side) for side in ("left", "right"))
    return jnp.argsort(order) - first, last - first


def _check_added(batch, held_out: float) -> None:
    one_number(batch=batch, held_out=held_out)
    if is_concrete(batch) and not batch >= 0:
        raise ValueError(f"Batches are numbered from 0, got batch={batch}.")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a share of the rows, from 0 to below 1; got {held_out}.")


def _check_strata(strata: np.ndarray, held_out: float) -> None:
    """Whether each stratum of each context can be in both parts."""
    for row in strata:
        numbers, counts = np.unique(row, return_counts=True)
        if counts.min() == 1:
            raise ValueError(
                f"held_out={held_out} cannot be taken of a stratum with a single row, as stratum "
                f"{numbers[counts.argmin()]} among {len(row)} samples is. Draw at least two of "
                f"each, or hold out none."
            )


def _check_room(replay: Replay, rollout: Rollout) -> None:
    """Whether the rows of the rollout are like those of the replay, and there is room for them."""
    columns = replay.tokens.shape[1], replay.contexts is not None
    given = rollout.tokens.shape[-1], rollout.contexts is not None
    if columns != given:
        having = {True: "with contexts", False: "without contexts"}
        raise ValueError(
            f"The replay has rows of {columns[0]} tokens {having[columns[1]]}, the rollout "
            f"{given[0]} tokens {having[given[1]]}. Make the replay for rollouts like this one."
        )
    capacity, n = len(replay.batches), rollout.log_q.size
    if is_concrete(replay.size) and int(replay.size) + n > capacity:
        raise ValueError(
            f"The replay has room for {capacity} rows and holds {int(replay.size)}, so {n} more do "
            f"not fit. Make it larger: init_replay(rollout, {int(replay.size) + n})."
        )
