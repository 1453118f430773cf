"""How far the policy has come, from fresh samples of it: each figure with its standard error."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fjax
from fjax import estimators
from fjax.metrics import bleu, distinct_n, rouge, self_bleu
from fjax.types import Params

from ._programs import AnyArray, Batch, Programs
from ._prompts import Prompts

Features = Mapping[str, np.ndarray]
"""Name -> one number a text."""

NAMES = {
    "win_rate": "win rate over the base",
    "known": "contexts with a known Z",
    "log_z": "log Z",
    "forward_kl": "KL(p‖π)",
    "reverse_kl": "KL(π‖p)",
    "total_variation": "TV(π, p)",
    "jensen_shannon": "JS(π, p)",
    "alpha": "α-divergence",
    "kl_to_base": "KL(π‖a)",
    "entropy": "entropy of π",
    "perplexity": "perplexity under a",
    "length": "tokens a sample",
    "ended": "samples that end",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "self_bleu": "self-BLEU-4",
    "bleu": "BLEU of references",
    "rouge_l": "ROUGE-L of references",
}
"""What tables and plots call the figures; what is not here is a feature of the task and keeps its
name."""

SELF_BLEU_SAMPLES = 512
"""Of which self-BLEU is, at most. Like distinct-n it depends on their number: compare evaluations
of one size."""


class Target(NamedTuple):
    """What is wanted, over decoded texts.

    features: (prompts, texts) -> numbers a text, whose means are reported; the prompts are empty
    where there are none. log_score: (log_a, features) -> log P of each text, unnormalised.
    headline: the feature that bars and plots show first.
    ratios: name -> (feature, feature), whose means' ratio is reported as well.
    bound: feature for which the target is its indicator times the base; then KL(p‖π) ≥ -log
    E_π[feature]. stop_if_absent: whether to give up when it holds for no sample of the base model.
    wins: feature by which a sample of the policy is compared with the base model's; reported as the
    win rate.
    """

    features: Callable[[Sequence[str], Sequence[str]], Features]
    log_score: Callable[[np.ndarray, Features], np.ndarray]
    headline: str
    ratios: Mapping[str, tuple[str, str]] = {}
    bound: str | None = None
    stop_if_absent: bool = False
    wins: str | None = None


class Figure(NamedTuple):
    """A value with its standard error (NaN where there is none) and effective sample size."""

    value: float
    std_error: float = math.nan
    ess: float = math.nan


class Check(NamedTuple):
    """KL(p‖π) and its lower bound -log E_π[b], with the standard error of their difference."""

    forward_kl: float
    least: float
    std_error: float


class Evaluation(NamedTuple):
    """What was found, and the samples of the policy that it was found on.

    figures: by name; with contexts, of those that `common` names.
    prompts, texts, features: of all samples of the policy, those of a context together.
    log_z: of each context, -inf where it is unknown; None without contexts.
    check: of the figures; None where the target has no such bound.
    """

    figures: dict[str, Figure]
    prompts: list[str]
    texts: list[str]
    features: dict[str, np.ndarray]
    log_z: AnyArray | None = None
    check: Check | None = None

    @property
    def samples(self) -> int:
        """How many texts there are."""
        return len(self.texts)

    @property
    def contexts(self) -> int:
        """How many prompts they continue; 1 without any."""
        return 1 if self.log_z is None else len(self.log_z)


class Scored(NamedTuple):
    """Samples and what Python says of them; the rows of a context are together, contexts in
    order."""

    batch: Batch
    features: dict[str, np.ndarray]
    log_score: np.ndarray


class Base(NamedTuple):
    """Samples of the base model, scored once and kept for all evaluations of a run.

    log_z: of each context, from these samples alone, so that p stays the same whatever is compared
    with it; None without
        contexts, where every evaluation estimates the one Z from all its samples.
    """

    scored: Scored
    log_z: fjax.Estimate | None


def draw_batches(
    programs: Programs,
    params: Params,
    rng_key: jax.Array,
    batches: int,
    turn: int,
    advance: Callable[[], None],
) -> list[Batch]:
    """Fresh batches on the host, every ``turn``-th of them continuing the same prompts; ``advance``
    is called after each."""
    drawn = []
    for i in range(batches):
        drawn.append(
            jax.device_get(programs.draw_unseen(i % turn, params, jax.random.fold_in(rng_key, i)))
        )
        advance()
    return drawn


def split(drawn: Sequence[Batch], samples: int) -> tuple[Batch, Batch]:
    """Exactly so many samples of the policy, or with contexts as many of each, rounded up; and all
    those of the base model.

    What share of a batch is of the base model differs between objectives. What is said of the
    policy must not differ with it: distinct-n and self-BLEU depend on how many samples they are of.
    """
    of_policy = _by_context(_join([_rows(batch, slice(0, batch.from_policy)) for batch in drawn]))
    of_base = _by_context(_join([_rows(batch, slice(batch.from_policy, None)) for batch in drawn]))
    count = _count(of_policy)
    rows = np.arange(len(of_policy.log_pi)).reshape(count, -1)[:, : -(-samples // count)]
    return _rows(of_policy, rows.ravel()), of_base


def score(
    programs: Programs, target: Target, drawn: Sequence[Batch], samples: int
) -> tuple[Scored, Scored]:
    """Of `split`: the samples of the policy, and of the base model; Python is asked about all of
    them at once."""
    of_policy, of_base = split(drawn, samples)
    both, n = _join([of_policy, of_base]), len(of_policy.log_pi)
    features = dict(
        target.features(
            prompts_of(programs.unseen, both.contexts, len(both.log_pi)), programs.decode(both)
        )
    )
    scored = Scored(both, features, target.log_score(np.asarray(both.log_a), features))
    return _take(scored, slice(0, n)), _take(scored, slice(n, None))


def make_base(of_policy: Scored, of_base: Scored) -> Base:
    """Of samples that were drawn with the base model as the policy."""
    scored = _together(of_policy, of_base)
    if scored.batch.contexts is None:
        return Base(scored, None)
    log_weights = (scored.log_score - scored.batch.log_a).reshape(_count(scored.batch), -1)
    return Base(scored, jax.device_get(_log_means(jnp.asarray(log_weights))))


@jax.jit
@jax.vmap
def _log_means(log_weights):
    return fjax.estimate_log_z(log_weights, jnp.zeros_like(log_weights))


def common(log_z: AnyArray) -> np.ndarray:
    """Which contexts the figures are of: those whose Z is known, or all if it is of none."""
    known = np.isfinite(log_z)
    return known if known.any() else np.ones_like(known)


def evaluate(
    programs: Programs,
    params: Params,
    target: Target,
    drawn: tuple[Scored, Scored],
    base: Base | None,
    divergences: tuple[tuple[str, fjax.FDivergence], ...],
) -> Evaluation:
    """Estimates everything from fresh samples of the policy, and all samples of the base model that
    there are.

    Satisfaction, entropy, KL(π‖a) and distinct-n are of samples of the policy. log Z and the
    divergences need samples wherever π *or* p has mass, so those of the base model join in, as the
    policy sees them now. With contexts all figures are means over those whose Z is known, and
    standard errors those of such means, from the spread between contexts: each Z_c is from samples
    of its own, so that its error is part of that spread.

    Args:
        programs: of the run.
        params: of the policy.
        target: of the run.
        drawn: fresh samples, as `score` gives them.
        base: more of the base model, with contexts and the Z of each; without contexts None says
            that there are no more.
        divergences: (name, f) of those to report.
    """
    mine, other = drawn
    if base is not None:
        other = _together(other, _seen_by(programs, params, base.scored))
    log_z = None if base is None else base.log_z
    figures, check = _figures(programs, target, *_counted(mine, other, log_z), divergences)
    if log_z is not None:
        figures = {"known": _mean(np.isfinite(log_z.value).astype(float)[:, None])} | figures
    prompts = prompts_of(programs.unseen, mine.batch.contexts, len(mine.log_score))
    values = None if log_z is None else log_z.value
    return Evaluation(figures, prompts, programs.decode(mine.batch), mine.features, values, check)


def _counted(
    mine: Scored, other: Scored, log_z: fjax.Estimate | None
) -> tuple[Scored, Scored, fjax.Estimate | None]:
    """What figures are of: with contexts, the samples and Z of the common ones."""
    if log_z is None:
        return mine, other, None
    chosen = common(log_z.value)
    mine, other = (
        _take(part, np.repeat(chosen, len(part.log_score) // len(chosen))) for part in (mine, other)
    )
    return mine, other, fjax.Estimate(*(x[chosen] for x in log_z))


def _figures(
    programs, target, mine, other, log_z, divergences
) -> tuple[dict[str, Figure], Check | None]:
    estimates = _estimates(*_tables(mine, other), log_z, divergences=divergences)
    figures = _of_task(target, mine, other)
    figures |= {name: _over_contexts(estimates[name]) for name in NAMES if name in estimates}
    figures |= _describe(mine.batch) | _against_references(programs, mine.batch)
    return figures, None if target.bound is None else _check(figures, target.bound, estimates)


def prompts_of(prompts: Prompts | None, contexts: AnyArray | None, rows: int) -> list[str]:
    """The prompt of each row; empty where there are none."""
    return (
        [""] * rows if prompts is None or contexts is None else [prompts.texts[i] for i in contexts]
    )


def _count(batch: Batch) -> int:
    return 1 if batch.contexts is None else len(np.unique(batch.contexts))


def _by_context(batch: Batch) -> Batch:
    """Rows of a context together, contexts in order."""
    return (
        batch if batch.contexts is None else _rows(batch, np.argsort(batch.contexts, kind="stable"))
    )


def _join(batches: Sequence[Batch]) -> Batch:
    rows = (
        None if arrays[0] is None else np.concatenate(arrays)
        for arrays in zip(*(b[:-1] for b in batches), strict=True)
    )
    return Batch(*rows, from_policy=0)


def _rows(batch: Batch, rows: slice | np.ndarray) -> Batch:
    return Batch(
        *(None if x is None else x[rows] for x in batch[:-1]), from_policy=batch.from_policy
    )


def _take(scored: Scored, rows: slice | np.ndarray) -> Scored:
    features = {name: values[rows] for name, values in scored.features.items()}
    return Scored(_rows(scored.batch, rows), features, scored.log_score[rows])


def _together(a: Scored, b: Scored) -> Scored:
    features = {
        name: np.concatenate([values, b.features[name]]) for name, values in a.features.items()
    }
    joined = Scored(_join([a.batch, b.batch]), features, np.concatenate([a.log_score, b.log_score]))
    ids = joined.batch.contexts
    return joined if ids is None else _take(joined, np.argsort(ids, kind="stable"))


def _seen_by(programs: Programs, params: Params, scored: Scored) -> Scored:
    """The same with log π of the policy; -inf where P = 0, for those rows are not used (see
    `_estimates`)."""
    batch, size = scored.batch, programs.policy_samples  # a size for which scoring is compiled
    log_pi = np.full(len(batch.log_pi), -np.inf, np.float32)
    allowed = np.flatnonzero(scored.log_score > -np.inf)
    for i in range(0, len(allowed), size):
        rows = allowed[i : i + size]
        padded = np.resize(rows, size)
        log_pi[rows] = jax.device_get(
            programs.score(params, batch.tokens[padded], batch.where[padded])
        )[: len(rows)]
    return scored._replace(batch=batch._replace(log_pi=log_pi))


def _tables(mine: Scored, other: Scored) -> list[np.ndarray]:
    """log π, log a, log P of the policy's samples, then of the base model's: ``[C, n]`` and ``[C,
    m]`` each."""
    count = _count(mine.batch)
    columns = [(part.batch.log_pi, part.batch.log_a, part.log_score) for part in (mine, other)]
    return [np.reshape(x, (count, -1)) for part in columns for x in part]


@partial(jax.jit, static_argnames="divergences")
def _estimates(
    log_pi, log_a, log_score, base_log_pi, base_log_a, base_log_score, log_z, divergences
):
    """Of each context: name -> Estimate. log_z is its own, or None to estimate it from these
    samples."""

    def of_one(mine, other, log_z):
        log_pi, log_score, log_q = _mixture(mine, other)
        if log_z is None:
            of_divergence = partial(
                estimators.estimate_divergence_from_score, log_pi, log_score, log_q
            )
            log_z = fjax.estimate_log_z(log_score, log_q)
        else:
            log_p = log_score - jnp.where(jnp.isneginf(log_z.value), jnp.nan, log_z.value)
            of_divergence = partial(estimators.estimate_divergence, log_pi, log_p, log_q)
        return {
            "log_z": log_z,
            "log_rate": fjax.estimate_log_z(
                jnp.where(log_score > -jnp.inf, log_pi, -jnp.inf), log_q
            ),
            **{name: of_divergence(divergence=divergence) for name, divergence in divergences},
            "kl_to_base": estimators.estimate_kl_to_base(*mine[:2]),
            "entropy": estimators.estimate_entropy(mine[0]),
        }

    return jax.vmap(of_one)(
        (log_pi, log_a, log_score), (base_log_pi, base_log_a, base_log_score), log_z
    )


def _mixture(mine, other):
    """log π, log P and log q of all samples, q being what they are of together.

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


def _of_task(target: Target, mine: Scored, other: Scored) -> dict[str, Figure]:
    """Its ratios, its win rate and the means of its features."""
    count = _count(mine.batch)
    of_policy, of_base = (
        {name: values.reshape(count, -1) for name, values in part.features.items()}
        for part in (mine, other)
    )
    figures = {
        name: _ratio(of_policy[top], of_policy[bottom])
        for name, (top, bottom) in target.ratios.items()
    }
    if target.wins and len(other.log_score):
        figures["win_rate"] = _win_rate(of_policy[target.wins], of_base[target.wins])
    return figures | {name: _mean(values) for name, values in of_policy.items()}


def _over_contexts(estimate: fjax.Estimate) -> Figure:
    """Of one context its estimate; of several the mean of those that are known, and of infinite
    ones infinity."""
    value, std_error, ess = (np.asarray(x, float) for x in estimate)
    if len(value) == 1:
        return Figure(float(value[0]), float(std_error[0]), float(ess[0]))
    known = value[~np.isnan(value) & ~np.isneginf(value)]
    if len(known) == 0:
        return Figure(math.nan, math.inf, 0.0)
    if np.isinf(known).any():
        return Figure(math.inf, math.inf, float(ess.sum()))
    return Figure(float(known.mean()), _error_of_mean(known), float(ess.sum()))


def _error_of_mean(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _mean(values: np.ndarray) -> Figure:
    """Of ``[C, n]``; with several contexts, of their means."""
    units = np.asarray(values, float)
    units = units[0] if len(units) == 1 else units.mean(axis=1)
    return Figure(float(units.mean()), _error_of_mean(units), float(values.size))


def _ratio(top: np.ndarray, bottom: np.ndarray) -> Figure:
    """A ratio of means, with the standard error of the delta method."""
    if not bottom.any():
        return Figure(math.nan)
    value, scale = (
        float(top.mean(dtype=float) / bottom.mean(dtype=float)),
        float(bottom.mean(dtype=float)),
    )
    return Figure(value, _mean(top - value * bottom).std_error / abs(scale), float(top.size))


def _win_rate(mine: np.ndarray, other: np.ndarray) -> Figure:
    """How often a sample of the policy beats one of the base model for the same context, a tie
    counting half."""
    wins = (mine[:, :, None] > other[:, None]) + 0.5 * (mine[:, :, None] == other[:, None])
    if len(wins) > 1:
        return _mean(wins.reshape(len(wins), -1))
    error = math.hypot(_error_of_mean(wins[0].mean(axis=1)), _error_of_mean(wins[0].mean(axis=0)))
    return Figure(float(wins.mean()), error, float(mine.size))


def _describe(of_policy: Batch) -> dict[str, Figure]:
    """What texts are like, whatever the target."""
    count = _count(of_policy)
    length, ended = (
        np.asarray(x, float).reshape(count, -1)
        for x in (of_policy.where.sum(-1), of_policy.finished)
    )
    surprise = _ratio(-np.asarray(of_policy.log_a, float).reshape(count, -1), length)
    perplexity = math.exp(surprise.value)
    tokens, where = of_policy.tokens, of_policy.where
    # from all contexts
    some = np.linspace(0, len(tokens) - 1, min(SELF_BLEU_SAMPLES, len(tokens))).astype(int)
    figures = {
        "perplexity": Figure(perplexity, perplexity * surprise.std_error),
        "length": _mean(length),
        "ended": _mean(ended),
    }
    figures |= {f"distinct_{k}": Figure(distinct_n(tokens, n=k, where=where)) for k in (1, 2, 3)}
    return figures | {"self_bleu": Figure(self_bleu(tokens[some], where=where[some]))}


def _against_references(programs: Programs, of_policy: Batch) -> dict[str, Figure]:
    """BLEU and ROUGE-L, where it is known how texts really went on."""
    if programs.unseen is None or not any(programs.unseen.references):
        return {}
    pairs = zip(
        programs.decode(of_policy),
        (programs.unseen.references[i] for i in of_policy.contexts),
        strict=True,
    )
    texts, references = zip(
        *((text, reference) for text, reference in pairs if reference), strict=True
    )
    rouge_l = rouge(texts, references).rouge_l
    return {
        "bleu": Figure(bleu(texts, references)),
        "rouge_l": Figure(float(rouge_l.value), float(rouge_l.std_error)),
    }


def _check(
    figures: Mapping[str, Figure], bound: str, estimates: Mapping[str, fjax.Estimate]
) -> Check:
    """With contexts, the mean over them of -log E_c[b] is below that of KL(p_c‖π), and no other
    bound is as near."""
    value, rate = figures["forward_kl"], figures[bound]
    forward_kl, log_rate = (
        np.asarray(estimates[name].value, float) for name in ("forward_kl", "log_rate")
    )
    if len(forward_kl) > 1:
        return Check(
            float(forward_kl.mean()), float(-log_rate.mean()), _error_of_mean(forward_kl + log_rate)
        )
    if rate.value == 0:
        return Check(value.value, math.inf, math.inf)
    return Check(
        value.value, -math.log(rate.value), math.hypot(value.std_error, rate.std_error / rate.value)
    )


def distances(records: Mapping[int, Mapping], divergence: str) -> tuple[str, dict[int, float]]:
    """How far the policy was from the target at each evaluated step, and by what: the divergence
    that is trained on.

    Once that was infinite in one evaluation, total variation stands in for it in all: a sample
    without a violation would otherwise look finite beside others that were as bad, and numbers of
    two units would be compared. Steps at which the distance is unknown, since Z is, are left out.
    """
    infinite = any(math.isinf(float(record[divergence])) for record in records.values())
    unit = "total_variation" if infinite else divergence
    found = {step: float(record[unit]) for step, record in records.items()}
    return unit, {step: value for step, value in found.items() if math.isfinite(value)}


def as_record(evaluation: Evaluation, step: int, seconds: float, drawn: int) -> dict:
    """A line of metrics.jsonl."""
    record = {"kind": "evaluation", "step": step, "seconds": seconds, "samples": drawn}
    for name, figure in evaluation.figures.items():
        record |= {
            name: figure.value,
            f"{name}_std_error": figure.std_error,
            f"{name}_ess": figure.ess,
        }
    return record
