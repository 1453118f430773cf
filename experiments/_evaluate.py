"""How far the policy has come, from fresh samples of it: each figure with its standard error."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

import fjax
from fjax import estimators
from fjax._typing import Params
from fjax.metrics import bleu, distinct_n, rouge, self_bleu

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
"""What tables and plots call the figures; what is not here is a feature of the task and keeps its name."""

SELF_BLEU_SAMPLES = 512
"""Of which self-BLEU is, at most. Like distinct-n it depends on their number: compare evaluations of one size."""


class Target(NamedTuple):
    """What is wanted, over decoded texts.

    features: (prompts, texts) -> numbers a text, whose means are reported; the prompts are empty where there are none.
    log_score: (log_a, features) -> log P of each text, unnormalised.
    headline: the feature that bars and plots show first.
    ratios: name -> (feature, feature), whose means' ratio is reported as well.
    bound: feature for which the target is its indicator times the base; then KL(p‖π) ≥ -log E_π[feature].
    stop_if_absent: whether to give up when it holds for no sample of the base model.
    wins: feature by which a sample of the policy is compared with the base model's; reported as the win rate.
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


class Evaluation(NamedTuple):
    """``figures`` by name; texts of the policy with their prompts, the features of them all, and of how many contexts."""

    figures: dict[str, Figure]
    prompts: list[str]
    texts: list[str]
    features: dict[str, np.ndarray]
    contexts: int = 1

    @property
    def samples(self) -> int:
        """How many texts there are."""
        return len(self.texts)


def draw_batches(
    programs: Programs, params: Params, rng_key: jax.Array, batches: int, advance: Callable[[], None]
) -> list[Batch]:
    """Fresh batches for an evaluation, on the host; ``advance`` is called after each."""
    drawn = []
    for i in range(batches):
        drawn.append(jax.device_get(programs.draw_unseen(i, params, jax.random.fold_in(rng_key, i))))
        advance()
    return drawn


def evaluate(
    programs: Programs,
    params: Params,
    target: Target,
    drawn: list[Batch],
    base_drawn: list[Batch],
    divergences: tuple[tuple[str, fjax.FDivergence], ...],
) -> Evaluation:
    """Estimates everything from fresh batches of the policy, and those of an evaluation of the base model.

    Satisfaction, entropy, KL(π‖a) and distinct-n are of samples of the policy. log Z and the divergences need samples
    wherever π *or* p has mass, so all samples of the base model join in, as the policy sees them now. With contexts all are
    means over contexts, and standard errors those of such means, from the spread between contexts.
    """
    of_policy = by_context(_join([_rows(batch, slice(0, batch.from_policy)) for batch in drawn]))
    of_base = [_rows(batch, slice(batch.from_policy, None)) for batch in drawn]
    of_base = by_context(_join([*of_base, *(_rescored(programs, params, batch) for batch in base_drawn)]))
    both = _join([of_policy, of_base])
    prompts, texts = prompts_of(programs.unseen, both.contexts, len(both.log_pi)), programs.decode(both)
    features = target.features(prompts, texts)
    log_score = target.log_score(np.asarray(both.log_a), features)
    n, count = len(of_policy.log_pi), 1 if both.contexts is None else len(np.unique(both.contexts))
    # [C, samples of the policy and then of the base]: a context's rows are together in either part.
    table = {"log_pi": both.log_pi, "log_a": both.log_a, "log_score": log_score}
    table = {name: _rectangle(np.asarray(x), n, count) for name, x in table.items()}
    estimates = _estimates(**table, of_policy=n // count, divergences=divergences)
    mine = {name: values[:n].reshape(count, -1) for name, values in features.items()}
    figures = {name: _ratio(mine[top], mine[bottom]) for name, (top, bottom) in target.ratios.items()}
    if target.wins and len(of_base.log_pi):
        figures["win_rate"] = _win_rate(mine[target.wins], features[target.wins][n:].reshape(count, -1))
    figures |= {name: _mean(values) for name, values in mine.items()}
    figures |= {name: _over_contexts(estimates[name]) for name in NAMES if name in estimates}
    if count > 1:
        figures["known"] = _mean(np.isfinite(np.asarray(estimates["log_z"].value)).astype(float)[:, None])
    figures |= _describe(of_policy, count)
    if programs.unseen is not None and any(programs.unseen.references):
        figures |= _against_references(texts[:n], [programs.unseen.references[i] for i in of_policy.contexts])
    return Evaluation(figures, prompts[:n], texts[:n], {name: values[:n] for name, values in features.items()}, count)


def prompts_of(prompts: Prompts | None, contexts: AnyArray | None, rows: int) -> list[str]:
    """The prompt of each row; empty where there are none."""
    return [""] * rows if prompts is None or contexts is None else [prompts.texts[i] for i in contexts]


def by_context(batch: Batch) -> Batch:
    """Rows of a context together, contexts in order."""
    return batch if batch.contexts is None else _rows(batch, np.argsort(batch.contexts, kind="stable"))


def _rectangle(values: np.ndarray, n: int, count: int) -> np.ndarray:
    return np.concatenate([values[:n].reshape(count, -1), values[n:].reshape(count, -1)], axis=1)


def _join(batches: list[Batch]) -> Batch:
    rows = (None if arrays[0] is None else np.concatenate(arrays) for arrays in zip(*(b[:-1] for b in batches), strict=True))
    return Batch(*rows, from_policy=0)


def _rows(batch: Batch, rows: slice | np.ndarray) -> Batch:
    return Batch(*(None if x is None else x[rows] for x in batch[:-1]), from_policy=batch.from_policy)


def _rescored(programs: Programs, params: Params, batch: Batch) -> Batch:
    """A batch of the base model as the policy sees it now, scored in the two sizes that scoring is compiled for."""
    parts = [_rows(batch, slice(0, batch.from_policy)), _rows(batch, slice(batch.from_policy, None))]
    log_pi = [programs.score(params, part.tokens, part.where) for part in parts if len(part.tokens)]
    return batch._replace(log_pi=np.concatenate(jax.device_get(log_pi)))


@partial(jax.jit, static_argnames=("of_policy", "divergences"))
def _estimates(log_pi, log_a, log_score, of_policy: int, divergences) -> dict[str, fjax.Estimate]:
    """Of each context."""

    def of_one(log_pi, log_a, log_score):
        log_q = estimators.log_mixture(log_pi, log_a, base_fraction=1 - of_policy / log_pi.shape[0])
        of_divergence = partial(estimators.estimate_divergence_from_score, log_pi, log_score, log_q)
        return {
            "log_z": fjax.estimate_log_z(log_score, log_q),
            **{name: of_divergence(divergence=divergence) for name, divergence in divergences},
            "kl_to_base": estimators.estimate_kl_to_base(log_pi[:of_policy], log_a[:of_policy]),
            "entropy": estimators.estimate_entropy(log_pi[:of_policy]),
        }

    return jax.vmap(of_one)(log_pi, log_a, log_score)


def _over_contexts(estimate: fjax.Estimate) -> Figure:
    """Of one context its estimate; of several the mean of those that are known, and of infinite ones infinity."""
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
    value, scale = float(top.mean(dtype=float) / bottom.mean(dtype=float)), float(bottom.mean(dtype=float))
    return Figure(value, _mean(top - value * bottom).std_error / abs(scale), float(top.size))


def _win_rate(mine: np.ndarray, other: np.ndarray) -> Figure:
    """How often a sample of the policy beats one of the base model for the same context, a tie counting half."""
    wins = (mine[:, :, None] > other[:, None]) + 0.5 * (mine[:, :, None] == other[:, None])
    if len(wins) > 1:
        return _mean(wins.reshape(len(wins), -1))
    error = math.hypot(_error_of_mean(wins[0].mean(axis=1)), _error_of_mean(wins[0].mean(axis=0)))
    return Figure(float(wins.mean()), error, float(mine.size))


def _describe(of_policy: Batch, count: int) -> dict[str, Figure]:
    """What texts are like, whatever the target."""
    length, ended = (np.asarray(x, float).reshape(count, -1) for x in (of_policy.where.sum(-1), of_policy.finished))
    surprise = _ratio(-np.asarray(of_policy.log_a, float).reshape(count, -1), length)
    perplexity = math.exp(surprise.value)
    tokens, where = of_policy.tokens, of_policy.where
    some = np.linspace(0, len(tokens) - 1, min(SELF_BLEU_SAMPLES, len(tokens))).astype(int)  # from all contexts
    figures = {
        "perplexity": Figure(perplexity, perplexity * surprise.std_error),
        "length": _mean(length),
        "ended": _mean(ended),
    }
    figures |= {f"distinct_{k}": Figure(distinct_n(tokens, n=k, where=where)) for k in (1, 2, 3)}
    return figures | {"self_bleu": Figure(self_bleu(tokens[some], where=where[some]))}


def _against_references(texts: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    known = [(text, reference) for text, reference in zip(texts, references, strict=True) if reference]
    texts, references = zip(*known, strict=True)
    rouge_l = rouge(texts, references).rouge_l
    return {
        "bleu": Figure(bleu(texts, references)),
        "rouge_l": Figure(float(rouge_l.value), float(rouge_l.std_error)),
    }


def check_bound(evaluation: Evaluation, bound: str) -> tuple[float, float, bool]:
    """KL(p‖π), its lower bound -log E_π[b], and whether the one is above the other up to 4 standard errors."""
    value, rate = evaluation.figures["forward_kl"], evaluation.figures[bound]
    if rate.value == 0 or math.isnan(value.value):
        return value.value, math.inf, True
    lowest = -math.log(rate.value)
    slack = 4 * math.hypot(value.std_error, rate.std_error / rate.value) + 1e-4
    return value.value, lowest, value.value >= lowest - slack


def distance(record: Mapping, divergence: str) -> float:
    """How far an evaluated policy is from the target: the divergence that was trained on, TV where that is infinite."""
    value = float(record[divergence])
    return float(record["total_variation"]) if math.isinf(value) else value


def as_record(evaluation: Evaluation, step: int, seconds: float, drawn: int) -> dict:
    """A line of metrics.jsonl."""
    record = {"kind": "evaluation", "step": step, "seconds": seconds, "samples": drawn}
    for name, figure in evaluation.figures.items():
        record |= {name: figure.value, f"{name}_std_error": figure.std_error, f"{name}_ess": figure.ess}
    return record
