"""How far the policy has come, from fresh samples of it: each figure with its standard error."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fjax
from fjax import estimators
from fjax.metrics import distinct_n

from ._programs import Programs
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
    bound: feature for which the target is its indicator times the base; then KL(p‖π) ≥ -log E_π[feature].
    """

    features: Callable[[Sequence[str]], Features]
    log_score: Callable[[np.ndarray, Features], np.ndarray]
    bound: str | None = None


class Figure(NamedTuple):
    """A value with its standard error (NaN where there is none) and effective sample size."""

    value: float
    std_error: float = math.nan
    ess: float = math.nan


class Evaluation(NamedTuple):
    """``figures`` by name; some texts, and the features of them all."""

    figures: dict[str, Figure]
    texts: list[str]
    features: dict[str, np.ndarray]
    samples: int


def evaluate(
    programs: Programs, params, rng_key: jax.Array, target: Target, *, batches: int, advance: Callable[[], None]
) -> Evaluation:
    """Draws ``batches`` fresh batches from the policy and estimates everything from them; calls ``advance`` after each."""
    drawn, texts = [], []
    for i in range(batches):
        batch = programs.draw(params, jax.random.fold_in(rng_key, i))
        texts += programs.decode(batch)
        drawn.append(jax.device_get(batch))
        advance()
    tokens, where = (np.concatenate([getattr(b.samples, name) for b in drawn]) for name in ("tokens", "where"))
    finished = np.concatenate([b.samples.finished for b in drawn])
    log_pi = np.concatenate([b.samples.log_probs.sum(-1) for b in drawn])
    log_a = np.concatenate([b.log_a for b in drawn])
    features = dict(target.features(texts))
    log_score = target.log_score(log_a, features)
    figures = {name: _mean(values) for name, values in features.items()}
    estimates = _estimates(log_pi, log_a, log_score)
    figures |= {name: Figure(*map(float, estimates[name])) for name in NAMES if name in estimates}
    figures |= {"length": _mean(where.sum(-1)), "ended": _mean(finished)}
    figures |= {f"distinct_{n}": Figure(distinct_n(tokens, n=n, where=where)) for n in (1, 2, 3)}
    return Evaluation(figures, texts, features, len(texts))


@jax.jit
def _estimates(log_pi, log_a, log_score) -> dict[str, fjax.Estimate]:
    of_divergence = estimators.estimate_divergence_from_score
    divergences = {name: of_divergence(log_pi, log_score, divergence=make()) for name, make in DIVERGENCES.items()}
    return {
        "log_z": fjax.estimate_log_z(log_score, log_pi),
        **divergences,
        "kl_to_base": estimators.estimate_kl_to_base(log_pi, log_a),
        "entropy": estimators.estimate_entropy(log_pi),
    }


def _mean(values: np.ndarray) -> Figure:
    return Figure(*map(float, estimators.estimate_mean(jnp.asarray(values, jnp.float32))))


def check_bound(evaluation: Evaluation, bound: str) -> tuple[float, float, bool]:
    """KL(p‖π), its lower bound -log E_π[b], and whether it is one; an estimate below it means an error in the code."""
    value, rate = evaluation.figures["forward_kl"].value, evaluation.figures[bound].value
    if rate == 0:
        return value, math.inf, True
    return value, -math.log(rate), value >= -math.log(rate) - 1e-4


def as_record(evaluation: Evaluation, step: int, seconds: float, drawn: int) -> dict:
    """A line of metrics.jsonl."""
    record = {"kind": "evaluation", "step": step, "seconds": seconds, "samples": drawn}
    for name, figure in evaluation.figures.items():
        record |= {name: figure.value, f"{name}_std_error": figure.std_error, f"{name}_ess": figure.ess}
    return record
