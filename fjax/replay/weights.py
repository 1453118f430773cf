"""How batches are combined, and the Z of all of them together."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import is_concrete
from fjax.estimators import Estimate
from fjax.replay.rows import Replay
from fjax.training._doors import check_counts
from fjax.types import Array, Bool, Float, Int

BatchWeights = np.ndarray | Float[Array, "B"]
"""c_b, one number a batch."""

LogZ = float | np.ndarray | Float[Array, "*k"]
"""One number, or one a context."""


def weights_by_count(replay: Replay, *, num_batches: int) -> Float[Array, "B"]:
    """Weights c_b of the batches by their numbers of rows: all rows count alike.

    Args:
        replay: what there is.
        num_batches: B; batches are numbered from 0 to B - 1.

    Raises:
        ValueError: unless there are as many.

    >>> from fjax.replay import add_to_replay, init_replay
    >>> from fjax.training import Rollout
    >>> tokens = jnp.ones((4, 3), int)
    >>> rollout = Rollout(tokens, tokens > 0, jnp.zeros(4), jnp.zeros(4))
    >>> replay = add_to_replay(init_replay(rollout, 6), rollout, batch=1)
    >>> weights_by_count(replay, num_batches=2).tolist()
    [0.0, 1.0]

    Source: Owen 2013, section 9.1.
    """
    check_counts(num_batches=num_batches)
    batches = _batch_ids(replay, num_batches)
    counts = _sums(jnp.ones_like(replay.log_q), batches, num_batches)
    return counts / jnp.maximum(counts.sum(), 1)


def weights_by_ess(
    replay: Replay,
    *,
    num_batches: int,
    held_out: bool = True,
    log_z: LogZ = 0.0,
) -> Float[Array, "B"]:
    """Weights c_b of the batches by how many samples of p each is worth.

    c_b ∝ (Σw)²/Σw² + n_b/n with w = P/q over the held-out rows of the batch: one effective sample
    is divided among the batches by their numbers of rows, so that all count, and nothing but these
    numbers does where no held-out row has P > 0.

    For the training part the weights are constants, so given the proposals what is summed with them
    has no bias. For what is estimated on the held-out part, take those of the training part. Where
    a proposal depends on an earlier batch, as it does in training, only weights fixed beforehand
    have none at all; these have one of order 1/n_b, as a batch is judged by those it brought about.

    Args:
        replay: what there is.
        num_batches: B; batches are numbered from 0 to B - 1.
        held_out: whether it is the held-out rows that are looked at, or those of the training part.
        log_z: log Z of each context, ``[K]``, to bring them to one scale. One number for all does
            not matter.

    Returns:
        One weight a batch; they sum to 1.

    Raises:
        ValueError: unless there are as many batches, or for other shapes of log Z.

    >>> from fjax.replay import add_to_replay, init_replay
    >>> from fjax.training import Rollout
    >>> tokens = jnp.ones((4, 3), int)
    >>> rollout = Rollout(tokens, tokens > 0, jnp.zeros(4), jnp.zeros(4))
    >>> replay = add_to_replay(init_replay(rollout, 8), rollout, batch=0, held_out=0.5)
    >>> missed = rollout._replace(log_score=jnp.full(4, -jnp.inf))
    >>> replay = add_to_replay(replay, missed, batch=1, held_out=0.5)
    >>> [round(x, 3) for x in weights_by_ess(replay, num_batches=2).tolist()]  # 2 + ½ to 0 + ½
    [0.833, 0.167]

    Source: Kong 1992; Owen 2013, section 9.3.
    """
    counts = weights_by_count(replay, num_batches=num_batches)
    ids = _batch_ids(replay, num_batches)
    log_p, known = normalised(replay, log_z)
    counted = (ids < num_batches) & (replay.held_out == held_out) & known
    log_weights = jnp.where(counted, log_p - replay.log_q, -jnp.inf)
    _, sums, squares = _log_sums(log_weights, ids, num_batches)
    ess = jnp.where(sums > 0, sums**2 / jnp.where(sums > 0, squares, 1.0), 0.0)
    return (ess + counts) / jnp.maximum(jnp.sum(ess + counts), 1)


def replay_log_z(
    replay: Replay,
    *,
    batch_weights: BatchWeights,
    num_contexts: int | None = None,
    held_out: bool = False,
) -> Estimate:
    """Log Z = log Σ_b c_b · mean over the rows of b of P/q_b, or that of each context.

    Z itself has no bias, for any weights that are fixed beforehand: each batch's mean is unbiased
    under its own q_b, whatever that learned from earlier ones. The standard error is that of Z,
    divided by Z.

    Args:
        replay: what there is.
        batch_weights: c_b ≥ 0. Those of batches that have rows in this part are divided by their
            sum.
        num_contexts: K, for a Z of each context, whose rows alone count for it. None: one Z.
        held_out: whether of the held-out rows; else of the training part.

    Returns:
        Numbers, or arrays ``[K]``; -inf with an infinite error where no row has P > 0.

    Raises:
        ValueError: for weights that are none; or if Z are wanted of contexts that rows do not have.

    >>> from fjax.replay import add_to_replay, init_replay
    >>> from fjax.training import Rollout
    >>> tokens = jnp.ones((4, 3), int)
    >>> rollout = Rollout(tokens, tokens > 0, jnp.zeros(4), jnp.ones(4))
    >>> replay = add_to_replay(init_replay(rollout, 6), rollout, batch=0)
    >>> float(replay_log_z(replay, batch_weights=jnp.ones(1)).value)
    1.0

    Source: Owen 2013, section 9.1; Veach and Guibas 1995 for several proposals.
    """
    share = row_weights(replay, batch_weights, replay.held_out == held_out)
    if num_contexts is None:
        one = _log_z(replay, share, jnp.zeros_like(replay.batches), 1)
        return Estimate(*(x[0] for x in one))
    check_counts(num_contexts=num_contexts)
    return _log_z(replay, share, _context_ids(replay, num_contexts), num_contexts)


@partial(jax.jit, static_argnums=3)
def _log_z(replay: Replay, share: Float[Array, "R"], ids: Int[Array, "R"], number: int) -> Estimate:
    """Of each of some groups of rows, whose shares are divided by their sum."""
    total = _sums(share, ids, number)
    share = share / jnp.where(total > 0, total, 1.0).at[ids].get(mode="fill", fill_value=1.0)
    log_weights = jnp.where(share > 0, replay.log_score - replay.log_q + jnp.log(share), -jnp.inf)
    value, sums, squares = _log_sums(log_weights, ids, number)
    # Deviations of w/Z from 1 by row; the divisor is the n/(n - 1) of shares that are not alike.
    unit = jnp.where(jnp.isneginf(value), 0.0, value).at[ids].get(mode="clip")
    deviations = jnp.exp(log_weights - unit) - share
    spread = _sums(deviations**2, ids, number) / (1 - _sums(share**2, ids, number))
    some = sums != 0
    ess = jnp.where(some, sums**2 / jnp.where(some, squares, 1.0), 0.0)
    return Estimate(value, jnp.where(some, jnp.sqrt(spread), jnp.inf), ess)


def row_weights(
    replay: Replay, batch_weights: BatchWeights, counted: Bool[Array, "R"]
) -> Float[Array, "R"]:
    """c_b/n_b for each row that counts, 0 for others; they sum to 1 if there are any."""
    weights = _checked_weights(replay, batch_weights)
    return _row_weights(weights, _batch_ids(replay, len(weights)), counted)


@jax.jit
def _row_weights(weights, ids, counted):
    counted &= ids < len(weights)
    n = _sums(counted.astype(weights.dtype), ids, len(weights))
    weights = jnp.where(n > 0, weights / jnp.maximum(n, 1), 0.0)
    total = jnp.sum(weights * n)
    weights = weights / jnp.where(total > 0, total, 1.0)
    return jnp.where(counted, weights.at[ids].get(mode="clip"), 0.0)


def normalised(replay: Replay, log_z: LogZ) -> tuple[Float[Array, "R"], Bool[Array, "R"]]:
    """Log p of each row, -inf where its Z is unknown; and whether it is known."""
    log_z = jnp.asarray(log_z, replay.log_score.dtype)
    if log_z.ndim > 1:
        raise ValueError(
            f"log_z must be one number, or one a context, [K]; got {list(log_z.shape)}."
        )
    if log_z.ndim:
        ids = _context_ids(replay, len(log_z))
        log_z = log_z.at[ids].get(mode="fill", fill_value=-jnp.inf)
    known = jnp.broadcast_to(~jnp.isneginf(log_z), replay.log_score.shape)
    return jnp.where(known, replay.log_score - jnp.where(known, log_z, 0.0), -jnp.inf), known


def _batch_ids(replay: Replay, num_batches: int) -> Int[Array, "R"]:
    """The batch of each row; for rows that are not there a number that no batch has."""
    return _in_range(replay.batches, num_batches, "batches", "num_batches")


def _context_ids(replay: Replay, num_contexts: int) -> Int[Array, "R"]:
    if replay.contexts is None:
        raise ValueError(
            f"Rows without contexts have one Z, but {num_contexts} were asked for: add rollouts "
            f"that have contexts, or ask for one."
        )
    return _in_range(replay.contexts, num_contexts, "contexts", "num_contexts")


def _in_range(ids: Int[Array, "R"], number: int, name: str, option: str) -> Int[Array, "R"]:
    """With ``number`` in place of what is none of them, which sums leave out."""
    if is_concrete(ids) and (largest := int(np.asarray(ids).max())) >= number:
        raise ValueError(
            f"The replay has {name} up to number {largest}, so {option} must be at least "
            f"{largest + 1}; got {number}."
        )
    return jnp.where((ids >= 0) & (ids < number), ids, number)


def _sums(values: Float[Array, "R"], ids: Int[Array, "R"], number: int) -> Float[Array, "K"]:
    return jax.ops.segment_sum(values, ids, num_segments=number)


@partial(jax.jit, static_argnums=2)
def _log_sums(log_weights, ids, number: int):
    """Log Σw of each of some groups; then Σw and Σw² in units of the largest weight."""
    top = jax.ops.segment_max(log_weights, ids, num_segments=number)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(log_weights - top.at[ids].get(mode="clip"))
    sums, squares = _sums(weights, ids, number), _sums(weights**2, ids, number)
    some = sums != 0  # NaN is for the caller to see
    return jnp.where(some, top + jnp.log(jnp.where(some, sums, 1.0)), -jnp.inf), sums, squares


def _checked_weights(replay: Replay, batch_weights: BatchWeights) -> Float[Array, "B"]:
    weights = jnp.asarray(batch_weights, replay.log_q.dtype)
    if weights.ndim != 1 or not weights.size:
        raise ValueError(
            f"batch_weights must be one number a batch, [B]; got shape {list(weights.shape)}."
        )
    if is_concrete(batch_weights):
        # In NumPy: while a program is traced, JAX would trace the comparison of constants, too.
        given = np.asarray(batch_weights)
        if not (np.isfinite(given) & (given >= 0)).all() or not given.any():
            raise ValueError(
                f"batch_weights must be at least 0, finite and not all 0; got {given.tolist()}."
            )
    return weights
