"""Where mathematics and language models meet: one optimiser step on a rollout, its state, and what
is kept of it.
"""

from fjax.training.base import Rollout, StepInfo, TrainState, Tuner
from fjax.training.checkpoint import Checkpoints
from fjax.training.f_dpg import fdpg
from fjax.training.logging import (
    FanOut,
    JsonlLogger,
    Logger,
    TensorBoardLogger,
    WandbLogger,
    read_jsonl,
)
from fjax.training.pairs import PairBatch, PairInfo, PairTuner, preference_tuner
from fjax.training.rl import ppo_tuner, rloo_tuner

__all__ = [
    "Checkpoints",
    "FanOut",
    "JsonlLogger",
    "Logger",
    "PairBatch",
    "PairInfo",
    "PairTuner",
    "Rollout",
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
