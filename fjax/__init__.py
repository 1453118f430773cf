"""fjax moves language models to an explicit target, by minimising an f-divergence.

    ∇D_f(π‖p) = E_{x~π}[ f'(π(x)/p(x)) ∇log π(x) ]

One identity covers RLHF with a KL penalty, generation with distributional control, and everything
between. Below are the names people type daily; the rest is reached through its module, as in
``fjax.sampling.top_p``. The mathematics is there at once. What is about language models is loaded
on first use, so that a loss costs neither flax nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import (
    divergences,
    enumeration,
    estimators,
    moments,
    policy_gradients,
    preferences,
    rejection,
    surrogates,
    targets,
)
from .divergences import (
    FDivergence,
    alpha_divergence,
    exact_divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    total_variation,
)
from .estimators import Estimate, effective_sample_size, estimate_divergence, estimate_log_z
from .moments import fit_coefficients
from .surrogates import leave_one_out, score_weights, surrogate_loss
from .targets import exponential_family, pointwise, reward_tilted

# What type checkers and editors read for the names of _LAZY; a test holds the two together.
if TYPE_CHECKING:
    from . import (
        adapters,
        evaluation,
        log_probs,
        metrics,
        models,
        replay,
        rollouts,
        runs,
        sampling,
        sharding,
        training,
    )
    from .log_probs import make_log_prob_fn, sequence_log_probs, token_log_probs
    from .models import from_pretrained, save_pretrained
    from .sampling import Samples, sample
    from .training import Rollout, TrainState, Tuner, fdpg

_LAZY = {
    "adapters": (),
    "evaluation": (),
    "log_probs": ("make_log_prob_fn", "sequence_log_probs", "token_log_probs"),
    "metrics": (),
    "models": ("from_pretrained", "save_pretrained"),
    "replay": (),
    "rollouts": (),
    "runs": (),
    "sampling": ("Samples", "sample"),
    "sharding": (),
    "training": ("Rollout", "TrainState", "Tuner", "fdpg"),
}

__all__ = [
    "Estimate",
    "FDivergence",
    "Rollout",
    "Samples",
    "TrainState",
    "Tuner",
    "adapters",
    "alpha_divergence",
    "divergences",
    "effective_sample_size",
    "enumeration",
    "estimate_divergence",
    "estimate_log_z",
    "estimators",
    "evaluation",
    "exact_divergence",
    "exponential_family",
    "fdpg",
    "fit_coefficients",
    "forward_kl",
    "from_pretrained",
    "jensen_shannon",
    "leave_one_out",
    "log_probs",
    "make_log_prob_fn",
    "metrics",
    "models",
    "moments",
    "pointwise",
    "policy_gradients",
    "preferences",
    "rejection",
    "replay",
    "rollouts",
    "runs",
    "reverse_kl",
    "reward_tilted",
    "sample",
    "sampling",
    "save_pretrained",
    "score_weights",
    "sequence_log_probs",
    "sharding",
    "surrogate_loss",
    "surrogates",
    "targets",
    "token_log_probs",
    "total_variation",
    "training",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    for module, names in _LAZY.items():
        if name == module:
            return import_module(f"{__name__}.{module}")
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
