"""The figures of an evaluation, by name."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax import estimators
from fjax._numerics import map_contexts
from fjax.divergences import FDivergence
from fjax.estimators import (
    Estimate,
    estimate_log_z,
    estimate_mean_over_contexts,
    estimate_ratio,
    estimate_win_rate,
    over_contexts,
)
from fjax.evaluation.exact import Exact
from fjax.evaluation.scored import Base, Scored, TextTarget, seen_by, take, together
from fjax.metrics import bleu, distinct_n, rouge, self_bleu
from fjax.rollouts import Collector
from fjax.types import Params

Metric = Callable[[Scored], Estimate | None]
"""A figure of the policy's samples; None where it does not apply."""

SELF_BLEU_SAMPLES = 512
"""Samples that self-BLEU is computed from, at most. Like distinct-n it depends on their number:
compare evaluations of equal size."""


class Evaluation(NamedTuple):
    """The figures of an evaluation, and the samples of the policy that they are from.

    Attributes:
        figures: by name; with contexts, of those whose Z is known.
        samples: all those of the policy.
        log_z: of each context, -inf where it is unknown; None without contexts.
        by_context: estimates of each of the figures' contexts, one row each.
    """

    figures: dict[str, Estimate]
    samples: Scored
    log_z: np.ndarray | None
    by_context: dict[str, Estimate]


def evaluate(
    collector: Collector,
    params: Params,
    target: TextTarget,
    drawn: tuple[Scored, Scored],
    base: Base | None = None,
    *,
    exact: Exact | None = None,
    divergences: Mapping[str, FDivergence],
    metrics: Mapping[str, Metric] | None = None,
) -> dict[str, Estimate]:
    """Estimates everything from fresh samples of the policy, and all samples of the base model.

    Features, entropy, KL(π‖a) and the metrics are of samples of the policy. log Z and the
    divergences need samples wherever π *or* p has mass. Given samples of p, KL(p‖π) is a mean over
    them, any other D_f is from half p, half π, and log Z is theirs. Without, those of the base
    model join in, as the policy sees them now, and ``pareto_k`` says whether their weights can be
    relied on. With contexts all figures are means over those whose Z is known, and standard errors
    those of such means, from the spread between contexts: each Z_c is from samples of its own, so
    that its error is part of that spread.

    Args:
        collector: how to score.
        params: of the policy.
        target: what is wanted.
        drawn: fresh samples, as `draw_scored` gives them.
        base: more samples of the base model, with contexts also the Z of each; None if there are no
            more, which only evaluations without contexts allow.
        exact: samples of p, as `draw_exact` gives them, which no training has seen; None weighs
            samples of the policy and the base model instead.
        divergences: D_f(π‖p) to report, by name.
        metrics: more figures of the policy's samples by name, after those of `METRICS`; one of the
            same name takes its place.

    Returns:
        name -> `Estimate`, of Python's floats.

    Raises:
        ValueError: for samples of p with contexts and others without, or none of them.
    """
    options = {"exact": exact, "divergences": divergences, "metrics": metrics}
    return measure(collector, params, target, drawn, base, **options).figures


def measure(
    collector: Collector,
    params: Params,
    target: TextTarget,
    drawn: tuple[Scored, Scored],
    base: Base | None = None,
    *,
    exact: Exact | None = None,
    divergences: Mapping[str, FDivergence],
    metrics: Mapping[str, Metric] | None = None,
) -> Evaluation:
    """`evaluate`, with the samples that the figures are from."""
    mine, other = drawn
    if base is not None:
        # Weighed they are only where there are no samples of p.
        seen = base.scored if exact is not None else seen_by(collector, params, base.scored)
        other = together(other, seen)
    log_z = None if base is None else base.log_z
    if exact is not None:
        _check_exact(exact, mine)
        log_z = _z_of(exact, mine)
    known_mine, known_other, known_z = _counted(mine, other, log_z)
    named, figures = tuple(divergences.items()), {}
    if exact is None:
        by_context = _weighed(known_mine, known_other, known_z, named)
    else:
        of_p = seen_by(collector, params, _of_contexts(exact.scored, known_mine))
        by_context = _from_halves(known_mine, of_p, exact, known_z, named)
        figures["exact_samples"] = figure(float(len(of_p.texts)))
    if log_z is not None:
        figures["known"] = estimate_mean_over_contexts(
            np.isfinite(log_z.value).astype(float)[:, None]
        )
    figures |= _of_task(target, known_mine, known_other)
    trust = ("pareto_k",) if "pareto_k" in by_context else ()
    names = ("log_z", *divergences, *trust, "kl_to_base", "entropy")
    figures |= {name: over_contexts(by_context[name]) for name in names}
    found = {name: metric(known_mine) for name, metric in (METRICS | dict(metrics or {})).items()}
    figures |= {name: figure for name, figure in found.items() if figure is not None}
    return Evaluation(figures, mine, None if log_z is None else np.asarray(log_z.value), by_context)


def known_contexts(log_z: np.ndarray) -> np.ndarray:
    """Which contexts the figures are of: those whose Z is known, or all if it is of none."""
    known = np.isfinite(log_z)
    return known if known.any() else np.ones_like(known)


def _counted(
    mine: Scored, other: Scored, log_z: Estimate | None
) -> tuple[Scored, Scored, Estimate | None]:
    """What figures are of: with contexts, the samples and Z of the known ones."""
    if log_z is None:
        return mine, other, None
    chosen = known_contexts(np.asarray(log_z.value))
    mine, other = (
        take(part, np.repeat(chosen, len(part.texts) // len(chosen))) for part in (mine, other)
    )
    return mine, other, Estimate(*(x[chosen] for x in log_z))


def _check_exact(exact: Exact, mine: Scored) -> None:
    if (mine.contexts is None) != (exact.scored.contexts is None):
        raise ValueError(
            f"Samples of p and of the policy must both be with contexts, or both without: the "
            f"policy's are of {mine.num_contexts} contexts, those of p of "
            f"{exact.scored.num_contexts}. Draw exact with the same collector, or leave it out."
        )
    if not _of_contexts(exact.scored, mine).texts:
        raise ValueError(
            f"There is no sample of p: none of {exact.drawn} draws was accepted. Leave exact out, "
            f"or draw more."
        )


def _z_of(exact: Exact, mine: Scored) -> Estimate | None:
    """Of the policy's contexts, where there are some."""
    if mine.contexts is None:
        return None
    ids = np.unique(mine.contexts)
    numbers: list[Any] = [np.asarray(x)[ids] for x in exact.log_z]
    return Estimate(*numbers)


def _of_contexts(scored: Scored, mine: Scored) -> Scored:
    """Those of the contexts that the policy's samples are of."""
    if mine.contexts is None or scored.contexts is None:
        return scored
    return take(scored, np.flatnonzero(np.isin(scored.contexts, mine.contexts)))


def _from_halves(
    mine: Scored,
    of_p: Scored,
    exact: Exact,
    log_z: Estimate | None,
    divergences: tuple[tuple[str, FDivergence], ...],
) -> dict[str, Estimate]:
    """Name -> Estimate ``[C]``, or ``[1]`` of the one context there is."""
    if log_z is not None:
        mine_too = mine.log_pi, mine.log_a, mine.log_score
        tables = (*map(mine.table, mine_too), *map(of_p.table, (of_p.log_pi, of_p.log_score)))
        of_one = partial(_of_halves, log_z_shares=None, divergences=divergences)
        return map_contexts(of_one)(*map(jnp.asarray, tables), jax.tree.map(jnp.asarray, log_z))
    given = mine.log_pi, mine.log_a, mine.log_score, of_p.log_pi, of_p.log_score
    shares = jnp.asarray(exact.log_z_shares)
    log_z = Estimate(*map(jnp.asarray, exact.log_z))
    found = _of_halves(*map(jnp.asarray, given), log_z, shares, divergences=divergences)
    return jax.tree.map(lambda x: x[None], found)


@partial(jax.jit, static_argnames="divergences")
def _of_halves(
    log_pi, log_a, log_score, target_log_pi, target_log_score, log_z, log_z_shares, divergences
):
    of_p, options = (target_log_pi, target_log_score, log_z), {"log_z_shares": log_z_shares}
    of_divergence = partial(
        estimators.estimate_divergence_from_halves, log_pi, log_score, *of_p, **options
    )
    found = {name: of_divergence(divergence=divergence) for name, divergence in divergences}
    if "forward_kl" in found:  # a mean over p alone, where every sample counts in full
        found["forward_kl"] = estimators.estimate_forward_kl_from_target(*of_p, **options)
    satisfied = jnp.where(log_score > -jnp.inf, log_pi, -jnp.inf)
    return found | {
        "log_z": log_z,
        "log_rate": estimate_log_z(satisfied, log_pi),
        "kl_to_base": estimators.estimate_kl_to_base(log_pi, log_a),
        "entropy": estimators.estimate_entropy(log_pi),
    }


def _weighed(
    mine: Scored, other: Scored, log_z: Estimate | None, divergences: tuple
) -> dict[str, Estimate]:
    """Of each context, from weights P/q: name -> Estimate ``[C]``."""
    tables = [
        part.table(x) for part in (mine, other) for x in (part.log_pi, part.log_a, part.log_score)
    ]
    return _estimates(*tables, log_z, divergences=divergences)


@partial(jax.jit, static_argnames="divergences")
def _estimates(
    log_pi, log_a, log_score, base_log_pi, base_log_a, base_log_score, log_z, divergences
):
    """Of each context: name -> Estimate.

    log_z is its own, or None to estimate it from these samples.
    """

    def of_one(mine, other, log_z):
        log_pi, log_score, log_q = _mixture(mine, other)
        trust = {}
        if log_z is None:
            # Of a prompt there are too few samples for a tail.
            k = estimators.pareto_k(log_score - log_q)
            trust["pareto_k"] = Estimate(k, jnp.full_like(k, jnp.nan), jnp.full_like(k, jnp.nan))
            of_divergence = partial(
                estimators.estimate_divergence_from_score, log_pi, log_score, log_q
            )
            log_z = estimate_log_z(log_score, log_q)
        else:
            unknown = jnp.isneginf(log_z.value)
            log_p = log_score - jnp.where(unknown, jnp.nan, log_z.value)
            of_divergence = partial(estimators.estimate_divergence, log_pi, log_p, log_q)
        satisfied = jnp.where(log_score > -jnp.inf, log_pi, -jnp.inf)
        return {
            "log_z": log_z,
            "log_rate": estimate_log_z(satisfied, log_q),
            **{name: of_divergence(divergence=divergence) for name, divergence in divergences},
            "kl_to_base": estimators.estimate_kl_to_base(*mine[:2]),
            "entropy": estimators.estimate_entropy(mine[0]),
            **trust,
        }

    of_base = base_log_pi, base_log_a, base_log_score
    return map_contexts(of_one)((log_pi, log_a, log_score), of_base, log_z)


def _mixture(mine, other):
    """Log π, log P and log q of all samples, q being what they are of together.

    Where P > 0 that is the mixture of policy and base model. Where P = 0 only the policy's samples
    count, for all that is wanted is how often it goes there; so those of the base model need not be
    scored, and are as if nothing had mass there.
    """
    log_pi, log_a, log_score = (jnp.concatenate(pair) for pair in zip(mine, other, strict=True))
    share = len(mine[0]) / len(log_pi)
    allowed, from_policy = log_score > -jnp.inf, jnp.arange(len(log_pi)) < len(mine[0])
    mixed = estimators.log_mixture(log_pi, log_a, base_fraction=1 - share)
    log_q = jnp.where(allowed, mixed, log_pi + math.log(share))
    used = allowed | from_policy
    return jnp.where(used, log_pi, -jnp.inf), log_score, jnp.where(used, log_q, 0.0)


def _of_task(target: TextTarget, mine: Scored, other: Scored) -> dict[str, Estimate]:
    """Its ratios, its win rate and the means of its features."""
    of_policy = {name: mine.table(values) for name, values in mine.features.items()}
    ratios = target.ratios.items()
    figures = {
        name: estimate_ratio(of_policy[top], of_policy[bottom]) for name, (top, bottom) in ratios
    }
    if target.wins and len(other.log_score):
        of_base = other.table(other.features[target.wins])
        figures["win_rate"] = estimate_win_rate(of_policy[target.wins], of_base)
    return figures | {
        name: estimate_mean_over_contexts(values) for name, values in of_policy.items()
    }


def figure(value: Any, std_error: Any = math.nan, ess: Any = math.nan) -> Estimate:
    """An estimate of Python's floats; NaN is an error that is not known."""
    return Estimate(value, std_error, ess)


def _perplexity(mine: Scored) -> Estimate:
    """Under the base model, a token."""
    lengths = mine.table(np.asarray(mine.where.sum(-1), float))
    surprise = estimate_ratio(-mine.table(np.asarray(mine.log_a, float)), lengths)
    perplexity = math.exp(surprise.value)
    return figure(perplexity, perplexity * surprise.std_error, math.nan)


def _self_bleu(mine: Scored) -> Estimate:
    # Of some from all contexts.
    some = np.linspace(0, len(mine.texts) - 1, min(SELF_BLEU_SAMPLES, len(mine.texts))).astype(int)
    return figure(self_bleu(mine.tokens[some], where=mine.where[some]))


def _with_references(mine: Scored) -> tuple[list[str], list[str]]:
    """Texts of which it is known how they really went on, and how they did."""
    pairs = [pair for pair in zip(mine.texts, mine.references, strict=True) if pair[1]]
    return [text for text, _ in pairs], [reference for _, reference in pairs]


def _bleu(mine: Scored) -> Estimate | None:
    texts, references = _with_references(mine)
    return figure(bleu(texts, references)) if texts else None


def _rouge_l(mine: Scored) -> Estimate | None:
    texts, references = _with_references(mine)
    # An extra of its own, since it brings much along for one figure.
    if not texts or find_spec("rouge_score") is None:
        return None
    found = rouge(texts, references).rouge_l
    return figure(float(found.value), float(found.std_error), math.nan)


METRICS: dict[str, Metric] = {
    "perplexity": _perplexity,
    "length": lambda mine: estimate_mean_over_contexts(
        mine.table(np.asarray(mine.where.sum(-1), float))
    ),
    "ended": lambda mine: estimate_mean_over_contexts(mine.table(np.asarray(mine.finished, float))),
    "distinct_1": lambda mine: figure(distinct_n(mine.tokens, n=1, where=mine.where)),
    "distinct_2": lambda mine: figure(distinct_n(mine.tokens, n=2, where=mine.where)),
    "distinct_3": lambda mine: figure(distinct_n(mine.tokens, n=3, where=mine.where)),
    "self_bleu": _self_bleu,
    "bleu": _bleu,
    "rouge_l": _rouge_l,
}
"""What texts are like, whatever the target: each a function of the policy's samples."""
