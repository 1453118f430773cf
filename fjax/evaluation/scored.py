"""Targets over texts, and samples with what such a target says of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax.estimators import Estimate, estimate_log_z
from fjax.hosts import fetch, join_rows, share_of_rows
from fjax.rollouts import Batch, Collector, Prompts
from fjax.types import Params, PRNGKeyArray

Features = Mapping[str, np.ndarray]
"""Name -> one number a text."""


class TextTarget(NamedTuple):
    """What is wanted, over decoded texts: P(x) = exp(log_score(log a(x), φ(x))).

    Attributes:
        features: (prompts, texts) -> numbers a text, whose means are reported. Of a prompt they are
            given what `Prompts.given` has, or else its text; "" where there is none.
        log_score: (log_a, features) -> log P of each text, unnormalised; -inf where ruled out.
        headline: the feature that bars and plots show first; "" shows none.
        ratios: name -> (feature, feature), whose means' ratio is reported as well.
        bound: feature for which the target is its indicator times the base; then
            KL(p‖π) ≥ -log E_π[feature].
        stop_if_absent: whether to give up when it holds for no sample of the base model.
        wins: feature by which a sample of the policy is compared with the base model's; reported
            as the win rate.
        description: p in words, for whoever reads what a run was after.
        highlight: a regular expression of what to highlight in samples; "" highlights nothing. It
            is for the eye alone: no figure depends on it.
        log_bound: the largest log P/a that any text can have, 0 for a constraint P = a·b; from it
            follow samples of p itself (`draw_exact`). None: not known.

    >>> def features(prompts, texts):
    ...     return {"satisfaction": np.array(["great" in text for text in texts], np.float32)}
    >>> def log_score(log_a, features):
    ...     return np.where(features["satisfaction"] > 0, log_a, -np.inf)
    >>> target = TextTarget(features, log_score, headline="satisfaction", bound="satisfaction")
    >>> target.log_score(np.array([-3.0, -2.0]), target.features(["", ""], ["great", "good"]))
    array([ -3., -inf])
    """

    features: Callable[[Sequence[Any], Sequence[str]], Features]
    log_score: Callable[[np.ndarray, Features], np.ndarray]
    headline: str = ""
    ratios: Mapping[str, tuple[str, str]] = {}
    bound: str | None = None
    stop_if_absent: bool = False
    wins: str | None = None
    description: str = ""
    highlight: str = ""
    log_bound: float | None = None


class Scored(NamedTuple):
    """N samples on the host, and what policy, base model and target say of them.

    The rows of a context are together, contexts in order.

    Attributes:
        tokens, where, finished: as in `fjax.rollouts.Batch`.
        log_pi: under the policy that is evaluated.
        log_a: under the base model.
        log_score: log P.
        contexts: which prompt each row continues; None if there are none.
        prompts, texts, references: of each row; "" where there is none.
        features: of each row, by name.
    """

    tokens: np.ndarray
    where: np.ndarray
    finished: np.ndarray
    log_pi: np.ndarray
    log_a: np.ndarray
    log_score: np.ndarray
    contexts: np.ndarray | None
    prompts: list[str]
    texts: list[str]
    references: list[str]
    features: dict[str, np.ndarray]

    @property
    def num_contexts(self) -> int:
        """How many prompts they continue; 1 without any."""
        return 1 if self.contexts is None else len(np.unique(self.contexts))

    def table(self, values: Any) -> np.ndarray:
        """``[N]`` as ``[C, n]``, a row a context."""
        return np.reshape(values, (self.num_contexts, -1))


class Base(NamedTuple):
    """Samples of the base model, scored once and kept for all evaluations of a run.

    Attributes:
        scored: the samples.
        log_z: of each context, from these samples alone, so that p stays the same whatever is
            compared with it; None without contexts, where every evaluation estimates the one Z
            from all its samples.
    """

    scored: Scored
    log_z: Estimate | None


def draw_batches(
    collector: Collector,
    params: Params,
    rng_key: PRNGKeyArray,
    batches: int,
    *,
    turn: int = 1,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Batch]:
    """Fresh batches on the host, every ``turn``-th of them continuing the same prompts.

    ``advance`` is told how many are done after each.
    """
    drawn = []
    for i in range(batches):
        batch = collector.draw_unseen(i % turn, params, jax.random.fold_in(rng_key, i))
        drawn.append(fetch(batch))
        advance(i + 1)
    return drawn


def draw_scored(
    collector: Collector,
    params: Params,
    target: TextTarget,
    rng_key: PRNGKeyArray,
    samples: int,
    *,
    progress: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> tuple[Scored, Scored]:
    """Fresh samples of the policy, as many as are asked for.

    And those of the base model that come with them.

    Args:
        collector: how to draw.
        params: of the policy.
        target: what to score by.
        rng_key: of these samples.
        samples: of the policy; with contexts rounded up to the same number of each.
        progress: (total) -> what is told how many batches are done.
    """
    turn = _turn(collector, samples)
    batches = -(-samples // (turn * collector.policy_samples)) * turn
    advance = progress(batches)
    drawn = draw_batches(collector, params, rng_key, batches, turn=turn, advance=advance)
    return score(collector, target, drawn, samples)


def draw_base(
    collector: Collector,
    params: Params,
    target: TextTarget,
    rng_key: PRNGKeyArray,
    samples: int,
    *,
    progress: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> Base:
    """Samples of the base model that evaluations of ``samples`` samples each share.

    With contexts, those that the Z of each is estimated from. ``params`` are the base model's as a
    policy's.
    """
    if not collector.z_rounds:
        drawn = draw_scored(collector, params, target, rng_key, samples, progress=progress)
        return make_base(*drawn)
    turn = _turn(collector, samples)
    batches = collector.z_rounds * turn
    advance = progress(batches)
    drawn = draw_batches(collector, params, rng_key, batches, turn=turn, advance=advance)
    return make_base(*score(collector, target, drawn, batches * collector.samples))


def contexts_used(collector: Collector, samples: int) -> int:
    """How many contexts, from the first, an evaluation of so many samples continues; or 1."""
    contexts = collector.contexts
    return 1 if contexts is None else _turn(collector, samples) * contexts.per_step


def _turn(collector: Collector, samples: int) -> int:
    """How many batches continue all the prompts of an evaluation.

    With few samples, the first of them alone.
    """
    return min(collector.unseen_batches, -(-samples // collector.policy_samples))


def score(
    collector: Collector, target: TextTarget, drawn: Sequence[Batch], samples: int
) -> tuple[Scored, Scored]:
    """Exactly ``samples`` samples of the policy, and all those of the base model.

    With contexts, the same number of each, rounded up. Python is asked about all at once.

    What share of a batch is of the base model differs between objectives. What is said of the
    policy must not differ with it: distinct-n and self-BLEU depend on how many samples they are of.
    """
    of_policy = _by_context(_join([_rows(batch, slice(0, batch.from_policy)) for batch in drawn]))
    of_base = _by_context(_join([_rows(batch, slice(batch.from_policy, None)) for batch in drawn]))
    count = 1 if of_policy.contexts is None else len(np.unique(of_policy.contexts))
    rows = np.arange(len(of_policy.log_a)).reshape(count, -1)[:, : -(-samples // count)]
    of_policy = _rows(of_policy, rows.ravel())
    n = len(of_policy.log_a)
    scored = _ask(collector, target, _join([of_policy, of_base]))
    return take(scored, slice(0, n)), take(scored, slice(n, None))


def _ask(collector: Collector, target: TextTarget, batch: Batch) -> Scored:
    unseen = None if collector.contexts is None else collector.contexts.unseen
    count = len(batch.log_a)
    prompts = prompts_of(unseen, batch.contexts, count)
    texts = collector.decode(batch.tokens, batch.where)
    references = references_of(unseen, batch.contexts, count)
    given = given_of(unseen, batch.contexts, count)
    features = ask(target, given, texts, share_of_rows(count), count)
    log_score = target.log_score(np.asarray(batch.log_a), features)
    rows = batch.tokens, batch.where, batch.finished, batch.log_proposal, batch.log_a
    return Scored(*rows, log_score, batch.contexts, prompts, texts, references, features)


def ask(
    target: TextTarget,
    prompts: Sequence[Any],
    texts: list[str],
    rows: np.ndarray,
    count: int,
) -> dict[str, np.ndarray]:
    """Features of all texts; each process looks at some rows, and they tell one another."""
    own_prompts, own_texts = [prompts[i] for i in rows], [texts[i] for i in rows]
    found = target.features(own_prompts, own_texts)
    return {name: join_rows(values, rows, count) for name, values in found.items()}


def prompts_of(prompts: Prompts | None, contexts: Any, rows: int) -> list[str]:
    """The prompt of each row; empty where there are none."""
    return (
        [""] * rows if prompts is None or contexts is None else [prompts.texts[i] for i in contexts]
    )


def given_of(prompts: Prompts | None, contexts: Any, rows: int) -> list[Any]:
    """What a target's features are given of each row's prompt."""
    if prompts is None or contexts is None or prompts.given is None:
        return prompts_of(prompts, contexts, rows)
    return [prompts.given[i] for i in contexts]


def references_of(prompts: Prompts | None, contexts: Any, rows: int) -> list[str]:
    """How the source went on after each row's prompt; "" where unknown."""
    if prompts is None or contexts is None:
        return [""] * rows
    return [prompts.references[i] for i in contexts]


def make_base(of_policy: Scored, of_base: Scored) -> Base:
    """From samples that were drawn with the base model as the policy."""
    scored = together(of_policy, of_base)
    if scored.contexts is None:
        return Base(scored, None)
    log_weights = scored.table(scored.log_score - scored.log_a)
    return Base(scored, log_means(jnp.asarray(log_weights)))


def log_means(log_weights: jax.Array) -> Estimate:
    """Log Z of each context, on the host, from log P/a of its samples of the base model."""
    return jax.device_get(_log_means(log_weights))


@jax.jit
@jax.vmap
def _log_means(log_weights):
    return estimate_log_z(log_weights, jnp.zeros_like(log_weights))


def seen_by(collector: Collector, params: Params, scored: Scored) -> Scored:
    """The same samples with log π of the policy; -inf where P = 0: those rows are not used."""
    size = collector.policy_samples  # a size for which scoring is compiled
    log_pi = np.full(len(scored.log_pi), -np.inf, np.float32)
    allowed = np.flatnonzero(scored.log_score > -np.inf)
    for i in range(0, len(allowed), size):
        rows = allowed[i : i + size]
        padded = np.resize(rows, size)
        columns = (jnp.asarray(x[padded]) for x in (scored.tokens, scored.where))
        log_pi[rows] = fetch(collector.score(params, *columns))[: len(rows)]
    return scored._replace(log_pi=log_pi)


def take(scored: Scored, rows: slice | np.ndarray) -> Scored:
    """Some rows, in that order."""
    numbers = np.arange(len(scored.texts))[rows]

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: of(values) for name, values in value.items()}
        if isinstance(value, list):
            return [value[i] for i in numbers]
        return None if value is None else value[rows]

    return Scored(*map(of, scored))


def together(a: Scored, b: Scored) -> Scored:
    """Those of both, the rows of a context together."""

    def join(x: Any, y: Any) -> Any:
        if isinstance(x, dict):
            return {name: join(values, y[name]) for name, values in x.items()}
        if isinstance(x, list):
            return x + y
        return None if x is None else np.concatenate([x, y])

    joined = Scored(*map(join, a, b))
    ids = joined.contexts
    return joined if ids is None else take(joined, np.argsort(ids, kind="stable"))


def _by_context(batch: Batch) -> Batch:
    """Rows of a context together, contexts in order."""
    if batch.contexts is None:
        return batch
    return _rows(batch, np.argsort(batch.contexts, kind="stable"))


def _join(batches: Sequence[Batch]) -> Batch:
    columns = zip(*(b[:-1] for b in batches), strict=True)
    rows = (None if arrays[0] is None else np.concatenate(arrays) for arrays in columns)
    return Batch(*rows, from_policy=0)


def _rows(batch: Batch, rows: slice | np.ndarray) -> Batch:
    return Batch(
        *(None if x is None else x[rows] for x in batch[:-1]), from_policy=batch.from_policy
    )
