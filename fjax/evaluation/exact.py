"""Samples of the target itself: what a policy is measured against where they can be drawn.

A sample of the base model is accepted with probability (P/a)/max P/a. What is accepted is of p
exactly, whatever the policy has become; and all that were drawn say what Z is. For a constraint
they are the base model's own texts that satisfy it.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax.estimators import (
    Estimate,
    estimate_forward_kl_from_target,
    estimate_log_z,
    estimate_mean_over_contexts,
    estimate_target_entropy,
    over_contexts,
)
from fjax.evaluation.scored import Scored, TextTarget, log_means, score, take, together
from fjax.hosts import fetch
from fjax.rejection import accept
from fjax.rollouts import Collector
from fjax.types import Params, PRNGKeyArray

COIN_KEY = 2**31 - 2
"""Folded into a batch's key for the coins that accept; its rows fold their numbers in, and choose
prompts by the next number."""

ROUNDING = 1e-3
"""Nats by which log P/a may exceed its bound: the difference of two float32 log-probabilities does,
where the bound is reached."""


EACH = 2
"""Samples of a context's p, at least: of fewer there is no spread."""


class Exact(NamedTuple):
    """Samples of p, or of the p of each context.

    Attributes:
        scored: the samples; their log π is log a. Of contexts those that have enough, the same
            number of each.
        log_z: from all that were drawn, accepted or not; with contexts arrays, -inf of those that
            had too few samples of their p.
        drawn: samples of the base model that it took.
    """

    scored: Scored
    log_z: Estimate
    drawn: int

    @property
    def log_z_shares(self) -> np.ndarray:
        """P/(m a Z) of each sample, of the m drawn: see `estimate_divergence_from_halves`.

        Of contexts they are not needed: errors are from the spread between them.
        """
        log_weights = np.asarray(self.scored.log_score - self.scored.log_a, float)
        return np.exp(log_weights - float(self.log_z.value)) / self.drawn


def draw_exact(
    collector: Collector,
    params: Params,
    target: TextTarget,
    rng_key: PRNGKeyArray,
    samples: int,
    *,
    max_draws: int,
    progress: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> Exact:
    """Samples of p by rejection from the base model, and log Z = log mean P/a of all draws.

    Each is of p exactly, and independent of the others. Draws go on, a batch at a time, until there
    are enough; log Z has a bias of order 1/samples by that, far below its standard error.

    Args:
        collector: how to draw.
        params: of the base model, as a policy's.
        target: what to score by; its ``log_bound`` must be known.
        rng_key: of these samples. Those of a run's steps must have other keys: what a policy is
            measured by it must not be trained on.
        samples: at least so many, if ``max_draws`` allow. With contexts they are shared out among
            the unseen ones, at least two of each; one that has fewer is left out.
        max_draws: of the base model, rounded down to whole batches, but one at least.
        progress: (total) -> what is told how many samples there are.

    Returns:
        An `Exact`; of fewer samples, perhaps none, where the draws did not bring more.

    Raises:
        ValueError: for a target without ``log_bound``, or one that some text exceeds; for counts
            below 1.

    Source: von Neumann 1951; Eikema et al. 2022 (arXiv 2112.05702), where β = max P/a.
    """
    _check(target, samples, max_draws)
    if collector.contexts is not None:
        return _draw_contexts(collector, params, target, rng_key, samples, max_draws, progress)
    advance, parts, log_weights = progress(samples), [], []
    accepted = 0
    for i in range(max(1, max_draws // collector.samples)):
        key = jax.random.fold_in(rng_key, i)
        drawn = _draw(collector, params, target, key)
        log_weights.append(drawn.log_score - drawn.log_a)
        parts.append(take(drawn, _accepted(target, key, drawn)))
        accepted += len(parts[-1].texts)
        advance(min(accepted, samples))
        if accepted >= samples:
            break
    weights = jnp.concatenate(log_weights)
    log_z = _plain(estimate_log_z(weights, jnp.zeros_like(weights)))
    return Exact(_all(parts), log_z, len(weights))


def _draw_contexts(
    collector: Collector,
    params: Params,
    target: TextTarget,
    rng_key: PRNGKeyArray,
    samples: int,
    max_draws: int,
    progress: Callable[[int], Callable[[int], None]],
) -> Exact:
    """The same with contexts: each round continues all of them, until each has enough."""
    contexts: Any = collector.contexts
    turn, count = collector.unseen_batches, collector.unseen_batches * contexts.per_step
    each = max(EACH, -(-samples // count))
    found, accepted = [], np.zeros(count, int)
    advance, parts = progress(each * count), []
    for i in range(turn * max(1, max_draws // (turn * collector.samples))):
        key = jax.random.fold_in(rng_key, i)
        drawn = _draw(collector, params, target, key, index=i % turn)
        found.append(drawn.table(drawn.log_score - drawn.log_a))
        parts.append(take(drawn, _accepted(target, key, drawn)))
        accepted += np.bincount(parts[-1].contexts, minlength=count)
        advance(int(np.minimum(accepted, each).sum()))
        if i % turn == turn - 1 and (accepted >= each).all():
            break
    scored = _first_of_each(_all(parts), np.flatnonzero(accepted >= each), each)
    rounds = [np.concatenate(found[i : i + turn]) for i in range(0, len(found), turn)]
    log_z = log_means(jnp.asarray(np.concatenate(rounds, axis=1)))
    enough = np.where(accepted >= each, log_z.value, -np.inf)
    return Exact(scored, log_z._replace(value=enough), len(found) * collector.samples)


def _first_of_each(scored: Scored, ids: np.ndarray, each: int) -> Scored:
    """The first rows of these contexts, whose rows are together."""
    contexts: Any = scored.contexts
    firsts = [np.flatnonzero(contexts == i)[:each] for i in ids]
    return take(scored, np.concatenate([*firsts, np.zeros(0, int)]))


def figures_of_target(exact: Exact) -> dict[str, Estimate]:
    """What p itself is like, to see a policy beside: features, length, entropy, KL(p‖a), log Z.

    All NaN but log Z where there is no sample. Of contexts they are means over those that have
    enough.
    """
    scored = exact.scored
    if scored.contexts is not None:
        return _means_over_contexts(exact)
    if not scored.texts:
        return {"log_z": exact.log_z}
    log_score, log_a = (jnp.asarray(x) for x in (scored.log_score, scored.log_a))
    with_z = {"log_z": exact.log_z, "log_z_shares": jnp.asarray(exact.log_z_shares)}
    of_p = {
        "entropy": estimate_target_entropy(log_score, **with_z),
        "kl_to_base": estimate_forward_kl_from_target(log_a, log_score, **with_z),
    }
    return _features(scored) | {k: _plain(v) for k, v in of_p.items()} | {"log_z": exact.log_z}


def _features(scored: Scored) -> dict[str, Estimate]:
    of_rows = {**scored.features, "length": scored.where.sum(-1), "ended": scored.finished}
    tables = {k: scored.table(np.asarray(v, float)) for k, v in of_rows.items()}
    return {k: estimate_mean_over_contexts(v) for k, v in tables.items()}


def _means_over_contexts(exact: Exact) -> dict[str, Estimate]:
    """Of the contexts that have samples; {} of none."""
    scored, known = exact.scored, np.isfinite(exact.log_z.value)
    if not scored.texts:
        return {}
    log_z = jax.tree.map(lambda x: jnp.asarray(x)[known], exact.log_z)
    log_score, log_a = (jnp.asarray(scored.table(x)) for x in (scored.log_score, scored.log_a))
    of_p = {
        "entropy": jax.vmap(estimate_target_entropy)(log_score, log_z),
        "kl_to_base": jax.vmap(estimate_forward_kl_from_target)(log_a, log_score, log_z),
        "log_z": log_z,
    }
    return _features(scored) | {k: over_contexts(v) for k, v in of_p.items()}


def _plain(estimate: Estimate) -> Estimate:
    """Of Python's floats."""
    numbers: list[Any] = [float(x) for x in jax.device_get(estimate)]
    return Estimate(*numbers)


def _check(target: TextTarget, samples: int, max_draws: int) -> None:
    if target.log_bound is None or not math.isfinite(target.log_bound):
        raise ValueError(
            f"Rejection needs the largest log P/a that a text can have, got "
            f"log_bound={target.log_bound}: give it to the TextTarget, 0 for a constraint, or do "
            f"without samples of p."
        )
    if samples < 1 or max_draws < 1:
        raise ValueError(
            f"Counts must be at least 1, got samples={samples}, max_draws={max_draws}."
        )


def _draw(
    collector: Collector, params: Params, target: TextTarget, key: PRNGKeyArray, index: int = 0
) -> Scored:
    """A batch of the base model, whose share as the policy and whose own are all the same here."""
    batch = fetch(collector.draw_unseen(index, params, key))
    drawn = together(*score(collector, target, [batch], batch.from_policy))
    return drawn._replace(log_pi=drawn.log_a)


def _accepted(target: TextTarget, key: PRNGKeyArray, drawn: Scored) -> np.ndarray:
    """Rows that an independent coin of probability (P/a)/max P/a keeps."""
    log_weights, bound = np.asarray(drawn.log_score - drawn.log_a), float(target.log_bound or 0.0)
    highest = int(np.argmax(log_weights))
    if not log_weights[highest] <= bound + ROUNDING:  # NaN is not, either
        raise ValueError(
            f"log P/a is {log_weights[highest]:.4g} for the text {drawn.texts[highest]!r:.200}, "
            f"above the target's log_bound of {bound:.4g}: what is accepted would not be of p. "
            f"Give the largest that any text can have."
        )
    coins = jax.random.fold_in(key, COIN_KEY)
    kept = accept(coins, jnp.asarray(log_weights), jnp.zeros(len(log_weights)), log_beta=bound)
    return np.flatnonzero(kept)


def _all(parts: list[Scored]) -> Scored:
    """Together, but for the empty ones where there are others."""
    some = [part for part in parts if part.texts] or parts[:1]
    return reduce(together, some)
