"""Moved to `fjax.training.rl`, as `rloo_tuner` and `ppo_tuner`; this path stays."""

from fjax.training.rl import ppo_tuner as ppo
from fjax.training.rl import rloo_tuner as rloo
from fjax.types import TokenLogProbFn

__all__ = ["TokenLogProbFn", "ppo", "rloo"]
