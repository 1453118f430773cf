"""How far a run is from its target, in one unit; and a bound that its figures must obey."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fjax.estimators import estimate_mean_over_contexts
from fjax.evaluation import Evaluation


class Check(NamedTuple):
    """KL(p‖π) and its lower bound -log E_π[b], with the standard error of their difference."""

    forward_kl: Any
    least: float
    std_error: Any


def distances(records: Mapping[int, Mapping], divergence: str) -> tuple[str, dict[int, float]]:
    """How far the policy was from the target at each evaluated step, and by what.

    By the divergence that is trained on.

    Once that was infinite in one evaluation, total variation stands in for it in all: a sample
    without a violation would otherwise look finite beside others that were as bad, and numbers of
    two units would be compared. Steps at which the distance is unknown, since Z is, are left out.
    """
    infinite = any(math.isinf(float(record[divergence])) for record in records.values())
    unit = "total_variation" if infinite else divergence
    found = {step: float(record.get(unit, math.nan)) for step, record in records.items()}
    return unit, {step: value for step, value in found.items() if math.isfinite(value)}


def check_bound(evaluation: Evaluation, bound: str | None) -> Check | None:
    """Whether KL(p‖π) ≥ -log E_π[b] holds; None where there is no such bound.

    With contexts, the mean over them of -log E_c[b] is below that of KL(p_c‖π), and no other bound
    is as near. None as well where KL(p‖π) was not asked for.
    """
    if bound is None or "forward_kl" not in evaluation.figures:
        return None
    value, rate = evaluation.figures["forward_kl"], evaluation.figures[bound]
    names = ("forward_kl", "log_rate")
    forward_kl, log_rate = (np.asarray(evaluation.by_context[n].value, float) for n in names)
    if len(forward_kl) > 1:
        error = estimate_mean_over_contexts(forward_kl + log_rate).std_error
        return Check(float(forward_kl.mean()), float(-log_rate.mean()), error)
    if rate.value == 0:
        return Check(value.value, math.inf, math.inf)
    error = math.hypot(value.std_error, rate.std_error / rate.value)
    return Check(value.value, -math.log(rate.value), error)
