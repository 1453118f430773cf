"""The task: a reward of texts, and the target that RL with a KL penalty has."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fjax.evaluation import Features, TextTarget
from fjax.targets import reward_tilted

from ..common.rewards import make_reward
from ..common.task import Task
from .config import Config


def make_target(config: Config) -> TextTarget:
    """P(x) = a(x)·exp(r(x)/β)."""
    reward = make_reward(config.reward, config.reward_folder, config.corpora)
    most = math.inf if config.reward_max is None else config.reward_max

    def features(_: Sequence[str], texts: Sequence[str]) -> Features:
        values = np.minimum(reward(texts), np.float32(most))
        return {"reward": values, "positive": (values > 0).astype(np.float32)}

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        rewards = jnp.asarray(features["reward"])
        return np.asarray(reward_tilted(jnp.asarray(log_a), rewards, beta=config.beta))

    description = f"p(x) ∝ a(x)·exp(r(x)/{config.beta:g}), r = {config.reward}"
    return TextTarget(
        features,
        log_score,
        headline="reward",
        description=description,
        log_bound=None if config.reward_max is None else config.reward_max / config.beta,
    )


def prepare(config: Config):
    """The target, which needs nothing of the run."""
    target = make_target(config)
    return lambda built: target


TASK = Task(
    "sentiment_reward",
    Config,
    lambda config: f"beta-{config.beta:g}-{config.settings.title}",
    prepare,
    ("reward", "positive"),
)
