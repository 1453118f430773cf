"""The task: prompts, rewards of (prompt, answer), and the target of each prompt that RL with a KL
penalty has."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fjax.evaluation import Features, TextTarget
from fjax.models import LanguageModel
from fjax.rollouts import Contexts
from fjax.targets import reward_tilted

from ..common import contexts
from ..common.prompt_files import Prompt
from ..common.rewards import PromptedRewards, make_prompted_reward
from ..common.task import Task
from .config import Config


def make_contexts(config: Config, model: LanguageModel) -> Contexts:
    """The prompts to align on and to evaluate on; what was left out of a file is said."""
    return contexts.make_contexts(config, config.settings, model)


def make_rewards(config: Config) -> dict[str, PromptedRewards]:
    """The rewards by their names, each tried on the first prompts.

    Raises:
        RunError: if one cannot be loaded, or does not answer.
    """
    prompts = contexts.read_all(config)
    given = config.reward_folder, config.corpora, prompts
    made = [make_prompted_reward(reward, *given) for reward in config.reward]
    return dict(zip(reward_names(config.reward), made, strict=True))


def reward_names(rewards: Sequence[str]) -> list[str]:
    """What figures call each: its function or folder, and its number where two are called the same.

    >>> reward_names(["mine:short", "models/polite", "other:short"])
    ['reward_short', 'reward_polite', 'reward_short_3']
    """
    short = [word.split(":")[-1] if ":" in word else Path(word).name for word in rewards]
    numbers = [f"_{i + 1}" if name in short[:i] else "" for i, name in enumerate(short)]
    return [f"reward_{name}{number}" for name, number in zip(short, numbers, strict=True)]


def make_target(config: Config) -> TextTarget:
    """P(y|x) = a(y|x)·exp(r(x, y)/β)."""
    rewards = make_rewards(config)
    weights = config.reward_weights or (1.0,) * len(rewards)
    most = math.inf if config.reward_max is None else config.reward_max

    def features(prompts: Sequence[Prompt], completions: Sequence[str]) -> Features:
        each = {name: reward(prompts, completions) for name, reward in rewards.items()}
        values = sum(w * r for w, r in zip(weights, each.values(), strict=True))
        whole = {"reward": np.minimum(values, most).astype(np.float32)}
        return whole | (each if len(each) > 1 else {})

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        values = jnp.asarray(features["reward"])
        return np.asarray(reward_tilted(jnp.asarray(log_a), values, beta=config.beta))

    bound = None if config.reward_max is None else config.reward_max / config.beta
    description = f"p(y|x) ∝ a(y|x)·exp(r(x, y)/{config.beta:g}), r = {_sum(config)}"
    return TextTarget(
        features, log_score, headline="reward", description=description, log_bound=bound
    )


def _sum(config: Config) -> str:
    """The reward in words."""
    if not config.reward_weights:
        return " + ".join(config.reward)
    pairs = zip(config.reward_weights, config.reward, strict=True)
    return " + ".join(f"{weight:g} {reward}" for weight, reward in pairs)


def prepare(config: Config):
    """The target, which needs nothing of the run."""
    target = make_target(config)
    return lambda built: target


def title(config: Config) -> str:
    """The price and the objective."""
    global_z = ["global-z"] if config.normalizer == "global" else []
    return "-".join([f"beta-{config.beta:g}", config.settings.title, *global_z])


TASK = Task("rlhf", Config, title, prepare, ("reward",), make_contexts)
