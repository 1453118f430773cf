"""Estimates from samples, each with a standard error and an effective sample size beside the value.

Samples come from q (``log_q``), or from the policy itself where ``log_q`` is None. Everything is
formed in log space; nothing here is meant to be differentiated (see `fjax.surrogates` for
gradients), so all inputs are stopped.

Satisfaction, moments and rewards are means over samples: `estimate_mean`. Entropy and KL(π‖a) have
their own names. All divergences between policy and target are one function, `estimate_divergence`,
whatever f and wherever the samples are from; `estimate_divergence_from_score` is the same for a
target known up to Z, and `estimate_divergence_from_halves` for one of which there are samples. What
is reported of an evaluation as a whole, over one context or several, is computed on the host in
float64: `estimate_ratio`, `estimate_win_rate`, `over_contexts`. Whether weights can be relied on at
all says `pareto_k`.

Source: Owen 2013, Monte Carlo theory, methods and examples, chapter 9; Go et al. 2023 (f-DPG),
appendix on metrics.
"""

from .contexts import (
    estimate_mean_over_contexts,
    estimate_ratio,
    estimate_win_rate,
    over_contexts,
)
from .divergence import (
    estimate_divergence,
    estimate_divergence_from_score,
    estimate_proposal_gain,
)
from .halves import (
    estimate_divergence_from_halves,
    estimate_forward_kl_from_target,
    estimate_target_entropy,
)
from .log_z import (
    LogMean,
    RunningLogMean,
    estimate_log_z,
    init_log_mean,
    known_log_z,
    log_mean_estimate,
    running_log_mean,
    update_log_mean,
)
from .means import (
    Estimate,
    effective_sample_size,
    estimate_entropy,
    estimate_kl_to_base,
    estimate_mean,
    log_mixture,
)
from .tail import pareto_k

__all__ = [
    "Estimate",
    "LogMean",
    "RunningLogMean",
    "effective_sample_size",
    "estimate_divergence",
    "estimate_divergence_from_halves",
    "estimate_divergence_from_score",
    "estimate_entropy",
    "estimate_forward_kl_from_target",
    "estimate_kl_to_base",
    "estimate_log_z",
    "estimate_mean",
    "estimate_mean_over_contexts",
    "estimate_proposal_gain",
    "estimate_ratio",
    "estimate_target_entropy",
    "estimate_win_rate",
    "init_log_mean",
    "known_log_z",
    "log_mean_estimate",
    "log_mixture",
    "over_contexts",
    "pareto_k",
    "running_log_mean",
    "update_log_mean",
]
