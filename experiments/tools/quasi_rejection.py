"""Quasi-rejection towards any target: proposals of a model, which of them to keep, and what that
costs. With prompts each has a target, and a β, of its own."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax.estimators import estimate_log_z
from fjax.evaluation import Features, TextTarget, given_of
from fjax.hosts import fetch
from fjax.rejection import RejectionEstimate, accept, choose_log_beta, estimate_rejection
from fjax.rollouts import Collector
from fjax.types import Params


class Proposals(NamedTuple):
    """Texts of the model, with what target and model say of them; and P/q of these and some of the
    base model's, for Z."""

    texts: list[str]
    log_score: np.ndarray
    log_q: np.ndarray
    log_weights: np.ndarray
    features: Features


class Accepted(NamedTuple):
    """What was proposed, batch by batch, and which of it was kept.

    log_beta is NaN where nothing that was proposed first has P > 0: then nothing is kept.
    """

    batches: list[Proposals]
    kept: list[np.ndarray]
    log_beta: float

    @property
    def texts(self) -> list[str]:
        """Those that were kept."""
        pairs = zip(self.batches, self.kept, strict=True)
        return [batch.texts[i] for batch, kept in pairs for i in np.flatnonzero(kept)]

    @property
    def proposals(self) -> int:
        """How many there were."""
        return sum(len(batch.texts) for batch in self.batches)

    def joined(self, name: str) -> np.ndarray:
        """A field of all batches."""
        return np.concatenate([getattr(batch, name) for batch in self.batches])


def propose(
    collector: Collector, target: TextTarget, params: Params, seed: int, context: int | None = None
) -> Iterator[Proposals]:
    """Batches of proposals without end, continuing the unseen prompt of that number if there are
    any."""
    unseen = None if collector.contexts is None else collector.contexts.unseen
    key, draw = jax.random.key(seed), collector.draw
    if context is not None:
        key, draw = jax.random.fold_in(key, context), partial(collector.draw_unseen, context)
    for step in itertools.count():
        batch = fetch(draw(params, jax.random.fold_in(key, step)))
        texts = collector.decode(batch.tokens, batch.where)
        features = target.features(given_of(unseen, batch.contexts, len(texts)), texts)
        log_score = np.asarray(target.log_score(np.asarray(batch.log_a), features))
        n = batch.from_policy
        yield Proposals(
            texts[:n],
            log_score[:n],
            np.asarray(batch.log_proposal)[:n],
            log_score - np.asarray(batch.log_q),
            {name: np.asarray(values)[:n] for name, values in features.items()},
        )


def collect(
    proposals: Iterator[Proposals],
    rng_key: jax.Array,
    *,
    samples: int,
    max_proposals: int,
    choose: Callable[[Proposals], float],
    advance: Callable[[int], None] = lambda done: None,
) -> Accepted:
    """Keeps of the proposals what `fjax.rejection.accept` says, until there are enough.

    Args:
        proposals: see `propose`.
        rng_key: of the coins.
        samples: how many to keep, at least; the last batch may bring more.
        max_proposals: after which it gives up.
        choose: (first batch) -> log β.
        advance: is told how many are kept.
    """
    found = Accepted([], [], np.nan)
    for step, batch in enumerate(proposals):
        if step == 0:
            found = found._replace(log_beta=choose(batch))
        found.batches.append(batch)
        logs = jnp.asarray(batch.log_score), jnp.asarray(batch.log_q)
        coins = accept(jax.random.fold_in(rng_key, step), *logs, log_beta=found.log_beta)
        found.kept.append(np.asarray(coins))
        kept = len(found.texts)
        advance(min(kept, samples))
        hopeless = np.isnan(found.log_beta)
        if kept >= samples or found.proposals >= max_proposals or hopeless:
            break
    return found


def beta_of_rate(batch: Proposals, acceptance_rate: float) -> float:
    """The log β at which this share of the proposals is accepted; NaN if none can be."""
    logs = jnp.asarray(batch.log_score), jnp.asarray(batch.log_q)
    return float(choose_log_beta(*logs, acceptance_rate=acceptance_rate))


def estimate(accepted: Accepted) -> RejectionEstimate:
    """Acceptance rate, and bound on the total variation from the target, of all proposals."""
    log_weights = jnp.asarray(accepted.joined("log_weights"))
    log_z = estimate_log_z(log_weights, jnp.zeros_like(log_weights))
    logs = jnp.asarray(accepted.joined("log_score")), jnp.asarray(accepted.joined("log_q"))
    return estimate_rejection(*logs, log_beta=accepted.log_beta, log_z=log_z)


def feature_means(accepted: Accepted) -> dict[str, tuple[float, float]]:
    """Feature -> its mean over all proposals, and over those that were kept."""
    kept = np.concatenate(accepted.kept)
    found = {}
    for name in accepted.batches[0].features:
        values = np.concatenate([batch.features[name] for batch in accepted.batches])
        found[name] = float(values.mean()), float(values[kept].mean()) if kept.any() else np.nan
    return found
