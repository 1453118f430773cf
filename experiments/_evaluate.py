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
from fjax._typing import Params
from fjax.metrics import distinct_n

from ._programs import AnyArray, Batch, Programs
from ._settings import DIVERGENCES

Features = Mapping[str, np.ndarray]
"""Name -> one number a text."""

NAMES = {
    "log_z": "log Z",
    "forward_kl": "KL(p‖π)",
    "reverse_kl": "KL(π‖p)",
    "total_variation": "TV(π, p)",
    "jensen_shannon": "JS(π, p)",
    "kl_to_base": "KL(π‖a)",
    "entropy": "entropy of π",
    "length": "tokens a sample",
    "ended": "samples that end",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
}
"""What tables and plots call the figures; what is not here is a feature of the task and keeps its name."""


class Target(NamedTuple):
    """What is wanted, over decoded texts.

    features: texts -> numbers a text, whose means are reported.
    log_score: (log_a, features) -> log P of each text, unnormalised.
    headline: the feature that bars and plots show first.
    ratios: name -> (feature, feature), whose means' ratio is reported as well.
    bound: feature for which the target is its indicator times the base; then KL(p‖π) ≥ -log E_π[feature].
    stop_if_absent: whether to give up when it holds for no sample of the base model.
    """

    features: Callable[[Sequence[str]], Features]
    log_score: Callable[[np.ndarray, Features], np.ndarray]
    headline: str
    ratios: Mapping[str, tuple[str, str]] = {}
    bound: str | None = None
    stop_if_absent: bool = False


class Figure(NamedTuple):
    """A value with its standard error (NaN where there is none) and effective sample size."""

    value: float
    std_error: float = math.nan
    ess: float = math.nan


class Evaluation(NamedTuple):
    """``figures`` by name; texts of the policy, and the features of them all."""

    figures: dict[str, Figure]
    texts: list[str]
    features: dict[str, np.ndarray]

    @property
    def samples(self) -> int:
        """How many texts there are."""
        return len(self.texts)


def draw_batches(
    programs: Programs, params: Params, rng_key: jax.Array, batches: int, advance: Callable[[], None]
) -> list[Batch]:
    """Fresh batches, on the host; ``advance`` is called after each."""
    drawn = []
    for i in range(batches):
        drawn.append(jax.device_get(programs.draw(params, jax.random.fold_in(rng_key, i))))
        advance()
    return drawn


def evaluate(programs: Programs, params: Params, target: Target, drawn: list[Batch], base_drawn: list[Batch]) -> Evaluation:
    """Estimates everything from fresh batches of the policy, and those of an evaluation of the base model.

    Satisfaction, entropy, KL(π‖a) and distinct-n are of samples of the policy. log Z and the divergences need samples
    wherever π *or* p has mass, so all samples of the base model join in, as the policy sees them now.
    """
    of_policy = _join([_rows(batch, slice(0, batch.from_policy)) for batch in drawn])
    of_base = [_rows(batch, slice(batch.from_policy, None)) for batch in drawn]
    everything = _join([of_policy, *of_base, *(_rescored(programs, params, batch) for batch in base_drawn)])
    n, texts = len(of_policy.log_pi), programs.decode(everything)
    features = target.features(texts)
    log_score = target.log_score(np.asarray(everything.log_a), features)
    estimates = _estimates(everything.log_pi, everything.log_a, log_score, n)
    features = {name: values[:n] for name, values in features.items()}
    figures = {name: _ratio(features[top], features[bottom]) for name, (top, bottom) in target.ratios.items()}
    figures |= {name: _mean(values) for name, values in features.items()}
    figures |= {name: Figure(*map(float, estimates[name])) for name in NAMES if name in estimates}
    figures |= {"length": _mean(of_policy.where.sum(-1)), "ended": _mean(of_policy.finished)}
    varied = {f"distinct_{k}": distinct_n(of_policy.tokens, n=k, where=of_policy.where) for k in (1, 2, 3)}
    figures |= {name: Figure(value) for name, value in varied.items()}
    return Evaluation(figures, texts[:n], features)


def _join(batches: list[Batch]) -> Batch:
    rows = [np.concatenate(arrays) for arrays in zip(*(batch[:-1] for batch in batches), strict=True)]
    return Batch._make([*rows, 0])


def _rows(batch: Batch, rows: slice) -> Batch:
    return Batch._make([*(x[rows] for x in batch[:-1]), batch.from_policy])


def _rescored(programs: Programs, params: Params, batch: Batch) -> Batch:
    """A batch of the base model as the policy sees it now, scored in the two sizes that scoring is compiled for."""
    parts = [_rows(batch, slice(0, batch.from_policy)), _rows(batch, slice(batch.from_policy, None))]
    log_pi = [programs.score(params, part.tokens, part.where) for part in parts if len(part.tokens)]
    return batch._replace(log_pi=np.concatenate(jax.device_get(log_pi)))


@partial(jax.jit, static_argnames="of_policy")
def _estimates(log_pi, log_a, log_score, of_policy: int) -> dict[str, fjax.Estimate]:
    log_q = estimators.log_mixture(log_pi, log_a, base_fraction=1 - of_policy / log_pi.shape[0])
    of_divergence = partial(estimators.estimate_divergence_from_score, log_pi, log_score, log_q)
    return {
        "log_z": fjax.estimate_log_z(log_score, log_q),
        **{name: of_divergence(divergence=make()) for name, make in DIVERGENCES.items()},
        "kl_to_base": estimators.estimate_kl_to_base(log_pi[:of_policy], log_a[:of_policy]),
        "entropy": estimators.estimate_entropy(log_pi[:of_policy]),
    }


def _mean(values: AnyArray) -> Figure:
    return Figure(*map(float, estimators.estimate_mean(jnp.asarray(values, jnp.float32))))


def _ratio(top: np.ndarray, bottom: np.ndarray) -> Figure:
    """A ratio of means, with the standard error of the delta method."""
    if not bottom.any():
        return Figure(math.nan)
    value = top.mean() / bottom.mean()
    return Figure(float(value), float(np.std(top - value * bottom, ddof=1) / math.sqrt(len(top)) / abs(bottom.mean())))


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
