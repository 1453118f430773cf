"""Where mathematics and language models meet: one optimiser step on a rollout.

Its state, and what is kept of it.
"""

from typing import TYPE_CHECKING

from fjax._optional import import_optional
from fjax.training.base import Rollout, StepInfo, TrainState, Tuner
from fjax.training.f_dpg import fdpg
from fjax.training.logging import (
    FanOut,
    JsonlLogger,
    Logger,
    SampleLogger,
    TensorBoardLogger,
    WandbLogger,
    read_jsonl,
)
from fjax.training.pairs import PairBatch, PairInfo, PairTuner, preference_tuner
from fjax.training.rl import ppo_tuner, rloo_tuner

if TYPE_CHECKING:
    from fjax.training.checkpoint import Checkpoints

__all__ = [
    "Checkpoints",
    "FanOut",
    "JsonlLogger",
    "Logger",
    "PairBatch",
    "PairInfo",
    "PairTuner",
    "Rollout",
    "SampleLogger",
    "StepInfo",
    "TensorBoardLogger",
    "TrainState",
    "Tuner",
    "WandbLogger",
    "fdpg",
    "ppo_tuner",
    "preference_tuner",
    "read_jsonl",
    "rloo_tuner",
]

# The names that they had, when `rloo` was a loss (`fjax.policy_gradients.rloo`) and a tuner.
ppo, rloo = ppo_tuner, rloo_tuner


def __getattr__(name: str) -> object:
    """Checkpoints alone need orbax, which comes with ``fjax[lm]``."""
    if name == "Checkpoints":
        import_optional("orbax.checkpoint", extra="lm")
        from fjax.training.checkpoint import Checkpoints

        return Checkpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
