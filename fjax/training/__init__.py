"""Where mathematics and language models meet: one optimiser step on a rollout, its state, and what
is kept of it.
"""

from fjax.training._update import StepInfo, Tuner
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
from fjax.training.policy_gradient import ppo, rloo
from fjax.training.preference import PairBatch, PairInfo, PairTuner, preference_tuner
from fjax.training.rollout import Rollout
from fjax.training.state import TrainState

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
    "ppo",
    "preference_tuner",
    "read_jsonl",
    "rloo",
]
