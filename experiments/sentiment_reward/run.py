"""The task: a reward of texts, and the target that RL with a KL penalty has."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments._evaluate import Features, Target
from experiments._loop import align
from experiments._python import load_function
from experiments._run_folder import RunError
from fjax.targets import reward_tilted

from . import reward_model
from .config import Config

Rewards = Callable[[Sequence[str]], np.ndarray]


def make_reward(config: Config) -> Rewards:
    """Texts -> rewards, checked.

    Raises:
        RunError: if it cannot be loaded.
    """
    if ":" in config.reward:
        users = checked(load_function(config.reward, "--reward"), config.reward)
        users(["a film .", "another film ."])  # whatever is wrong with it is said before minutes are spent
        return users
    folder = config.reward_folder if config.reward == "sentiment" else Path(config.reward)
    if config.reward == "sentiment" and not (folder / "config.json").is_file():
        print(f"There is no reward model in {folder} yet; training it (once).")
        reward_model.train(config.corpora, folder)
    model = reward_model.load(folder)
    end = model.tokenizer.eos_token_id
    limit = model.config.n_positions

    def rewards(texts: Sequence[str]) -> np.ndarray:
        rows = [np.asarray([end, *ids, end], np.int32)[:limit] for ids in model.tokenizer(list(texts)).input_ids]
        return reward_model.score_rows(model, rows)

    return rewards


def checked(function: Callable, title: str) -> Rewards:
    """The user's function, whose answer is one finite number a text, or an error that says what it was instead."""

    def rewards(texts: Sequence[str]) -> np.ndarray:
        try:
            values = np.asarray(function(list(texts)), np.float32)
        except Exception as error:
            raise RunError(f"{title} failed on {len(texts)} texts, {type(error).__name__}: {error}") from error
        if values.shape != (len(texts),):
            raise RunError(f"{title} must return one number a text: got shape {values.shape} for {len(texts)} texts.")
        bad = ~np.isfinite(values)
        if bad.any():
            raise RunError(f"{title} returned {values[bad][0]} for the text {texts[int(bad.argmax())]!r}; rewards are finite.")
        return values

    return rewards


def make_target(config: Config) -> Target:
    """P(x) = a(x)·exp(r(x)/β)."""
    reward = make_reward(config)

    def features(_: Sequence[str], texts: Sequence[str]) -> Features:
        values = reward(texts)
        return {"reward": values, "positive": (values > 0).astype(np.float32)}

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        return np.asarray(reward_tilted(jnp.asarray(log_a), jnp.asarray(features["reward"]), beta=config.beta))

    return Target(features, log_score, headline="reward")


def main(config: Config) -> int:
    """Runs it; the exit status is 0 for a whole run, 128 + signal for one that was stopped."""
    target = make_target(config)
    title = f"beta-{config.beta:g}-{config.settings.objective}"
    return align(config.settings, lambda _: target, config=config, experiment="sentiment_reward", title=title)
