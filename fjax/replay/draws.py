"""Rows of a replay as rollouts: a minibatch of those that are trained on, or a whole part."""

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import is_concrete, one_number
from fjax.replay.rows import Replay
from fjax.replay.weights import BatchWeights, LogZ, normalised, row_weights
from fjax.training import Rollout
from fjax.training._doors import check_counts
from fjax.types import Array, Float, PRNGKeyArray


def draw_probabilities(
    replay: Replay,
    *,
    batch_weights: BatchWeights,
    log_z: LogZ,
    cap: float = float("inf"),
    share_of_p: float = 0.5,
) -> Float[Array, "R"]:
    """How likely `minibatch` is to draw each row: s_i ∝ (c_b/n_b)(1 - h + h·min(p/q, cap)).

    A share 1 - h of the draws goes to rows as they were drawn and a share h to those that p would
    have drawn. Half and half, neither the weights π/q nor p/q are multiplied by more than 2:
    u·p/q ≤ 2, but for the error of log Z and for rows beyond the cap.

    Args:
        replay: what there is.
        batch_weights: c_b, see `minibatch`.
        log_z: log Z, or that of each context.
        cap: of p/q, as far as it makes a row more likely.
        share_of_p: h, from 0 to 1. With 1 rows where p = 0 are never drawn.

    Returns:
        Numbers that sum to 1; 0 for rows that are held out or not there, and for those of contexts
        whose Z is unknown. All 0 if there are no others.

    Raises:
        ValueError: for a share that is none, or as `minibatch` does.

    >>> from fjax.replay import add_to_replay, init_replay
    >>> tokens = jnp.ones((2, 3), int)
    >>> rollout = Rollout(tokens, tokens > 0, jnp.zeros(2), jnp.zeros(2))
    >>> replay = add_to_replay(init_replay(rollout, 3), rollout, batch=0, held_out=0)
    >>> draw_probabilities(replay, batch_weights=jnp.ones(1), log_z=0.0).tolist()
    [0.5, 0.5, 0.0]

    Source: defensive mixtures, Hesterberg 1995; Owen and Zhou 2000.
    """
    one_number(share_of_p=share_of_p)
    if is_concrete(share_of_p) and not 0 <= share_of_p <= 1:
        raise ValueError(f"share_of_p is a share of the draws, from 0 to 1; got {share_of_p}.")
    log_p, known = normalised(replay, log_z)
    share = row_weights(replay, batch_weights, known & ~replay.held_out)
    weights = jnp.exp(jnp.where(share > 0, log_p - replay.log_q, -jnp.inf))
    likely = share * (1 - share_of_p + share_of_p * jnp.minimum(weights, cap))
    total = likely.sum()
    return likely / jnp.where(total == 0, 1.0, total)


def minibatch(
    replay: Replay,
    rng_key: PRNGKeyArray,
    n: int,
    *,
    batch_weights: BatchWeights,
    log_z: LogZ,
    cap: float = float("inf"),
    share_of_p: float = 0.5,
) -> Rollout:
    """Rows of the training part, drawn with replacement, as a rollout for `fjax.fdpg`.

    Its log q is log q - log u with u = (c_b/n_b)/s_i, and its scores are log P - log Z. So a tuner
    with ``log_z=fjax.estimators.known_log_z()`` estimates, over the draws and for any f,

        Σ_b c_b · mean over the rows of b of (π/q)(f'(π/p) - B) ∇log π

    without bias for B fixed beforehand; with leave-one-out for B the mean of (π/q) f' over all of
    the rows, which knows them and so is off by order 1/n_b. Over what the batches could have been
    the sum is ∇D_f(π‖p), of a π that was not trained on them.

    Args:
        replay: what there is.
        rng_key: key of this minibatch.
        n: how many rows to draw.
        batch_weights: c_b ≥ 0, one for each batch number, such as `weights_by_ess`. Those of
            batches that have rows to train on are divided by their sum.
        log_z: log Z, or that of each context ``[K]``, such as of `replay_log_z`. Rows of contexts
            whose Z is unknown, -inf, are left out.
        cap: of p/q, as far as it makes a row more likely, see `draw_probabilities`.
        share_of_p: share of the draws that go to rows as p would have drawn them. With 1 the sum
            above is over rows with p > 0 alone, all that counts if B = 0 and f'(∞) = 0: for forward
            KL the gradient is then that of maximum likelihood, -mean of ∇log π, on what was drawn.

    Returns:
        n rows, without contexts. If there is none to draw, or no Z is known, log q is inf, and the
        gradient 0.

    Raises:
        ValueError: for n below 1, weights that are none, a share not from 0 to 1, or a log Z of
            contexts for rows without.

    >>> from fjax.replay import add_to_replay, init_replay
    >>> tokens = jnp.ones((4, 3), int)
    >>> rollout = Rollout(tokens, tokens > 0, jnp.zeros(4), jnp.ones(4))
    >>> replay = add_to_replay(init_replay(rollout, 6), rollout, batch=0, held_out=0)
    >>> drawn = minibatch(replay, jax.random.key(0), 2, batch_weights=jnp.ones(1), log_z=1.0)
    >>> drawn.tokens.shape, drawn.log_q.tolist(), drawn.log_score.tolist()
    ((2, 3), [0.0, 0.0], [0.0, 0.0])

    Source: Owen 2013, section 9.1, applied twice: p/q, then (c_b/n_b)/s.
    """
    check_counts(n=n)
    options = {"batch_weights": batch_weights, "log_z": log_z}
    likely = draw_probabilities(replay, **options, cap=cap, share_of_p=share_of_p)
    rows = jax.random.choice(rng_key, likely.shape[0], (n,), p=likely)
    log_p, known = normalised(replay, log_z)
    share = row_weights(replay, batch_weights, known & ~replay.held_out)
    # A row that is never drawn is there only if no other can be, and must not count.
    log_u = jnp.where(likely == 0, -jnp.inf, jnp.log(share) - jnp.log(likely))
    return _rows(replay, rows, log_p, log_u)


def replay_part(
    replay: Replay,
    *,
    held_out: bool,
    batch_weights: BatchWeights,
    log_z: LogZ,
) -> Rollout:
    """All rows of one part as a rollout: a plain mean over them is Σ_b c_b · mean over b.

    So every estimator of fjax works on the held-out part, given log π of its rows:
    `fjax.estimate_divergence` for D_f(π‖p), `fjax.estimators.estimate_divergence_from_score` where
    Z is better estimated from the same rows, and `fjax.estimators.estimate_kl_to_base` for
    KL(π_new‖π_old), given log π of both. Their standard errors take the batches for one sample, and
    are a little too large where batches do not count by their numbers of rows.

    Args:
        replay: what there is. On the host: how many rows there are depends on it.
        held_out: whether the held-out part; else the one that is trained on.
        batch_weights: c_b, see `minibatch`; for the held-out part they must not depend on it.
        log_z: log Z, or that of each context ``[K]``. Rows of contexts whose Z is unknown, -inf,
            are left out.

    Raises:
        ValueError: within `jax.jit`, without a row that counts, or as `minibatch` does.

    >>> from fjax.replay import add_to_replay, init_replay
    >>> tokens = jnp.ones((4, 3), int)
    >>> rollout = Rollout(tokens, tokens > 0, jnp.zeros(4), jnp.ones(4))
    >>> replay = add_to_replay(init_replay(rollout, 6), rollout, batch=0, held_out=0.25)
    >>> part = replay_part(replay, held_out=True, batch_weights=jnp.ones(1), log_z=1.0)
    >>> part.tokens.shape, part.log_score.tolist()
    ((1, 3), [0.0])

    Source: Owen 2013, section 9.1.
    """
    log_p, known = normalised(replay, log_z)
    share = row_weights(replay, batch_weights, known & (replay.held_out == held_out))
    if not is_concrete(share):
        raise ValueError("replay_part has as many rows as there are: call it outside jit.")
    rows = np.flatnonzero(np.asarray(share))
    if not len(rows):
        raise ValueError(
            f"No row of the {'held-out' if held_out else 'training'} part counts: the replay has "
            f"{int(replay.size)} rows, {int(jnp.sum(replay.held_out))} of them held out. Add more, "
            f"hold out a share of them, or give their batches weights above 0 and a log Z."
        )
    return _rows(replay, rows, log_p, jnp.log(len(rows) * share))


def _rows(replay: Replay, rows, log_p: Float[Array, "R"], log_u: Float[Array, "R"]) -> Rollout:
    """Some rows, with the weights u folded into log q."""
    columns = (replay.tokens, replay.where, replay.log_q - log_u, log_p)
    return Rollout(*(x[rows] for x in columns))
