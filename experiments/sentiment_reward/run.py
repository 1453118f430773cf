"""The task: a reward of texts, and the target that RL with a KL penalty has."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments._evaluate import Features, Target
from experiments._loop import align
from experiments._python import call, load_function
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
        # whatever is wrong with it is said before minutes are spent
        users(["a film .", "another film ."])
        return users
    folder = config.reward_folder if config.reward == "sentiment" else Path(config.reward)
    if config.reward == "sentiment" and not (folder / "config.json").is_file():
        print(f"There is no reward model in {folder} yet; training it (once).")
        reward_model.train(config.corpora, folder)
    model = reward_model.load(folder)
    # of a version that did not write it down
    if model.text_format is None and config.reward == "sentiment":
        model = model._replace(text_format=reward_model.TEXT_FORMAT)
    if model.text_format is None:
        print(
            f"{folder} says no text_format in its config.json, so that texts are scored as they "
            f"are, without end tokens."
        )
    return partial(reward_model.score_texts, model)


def checked(function: Callable, title: str) -> Rewards:
    """The user's function, whose answer is one finite number a text, or an error that says what it
    was instead."""

    def rewards(texts: Sequence[str]) -> np.ndarray:
        answer = call(function, title, f"{len(texts)} texts", list(texts))
        given = _as_array(answer)
        # V: bfloat16 and its like
        if given is None or given.shape != (len(texts),) or given.dtype.kind not in "biufV":
            raise RunError(
                f"{title} must return one number a text, got {_kind(answer, given)} for "
                f"{len(texts)} texts."
            )
        with np.errstate(over="ignore"):
            values = given.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            first = int(bad[0])
            raise RunError(
                f"{title} returned {given[first]} for the text {texts[first]!r:.200}; rewards are "
                f"finite float32."
            )
        return values

    return rewards


def _as_array(answer: object) -> np.ndarray | None:
    """A copy, for the function may use its array again; None for what is no array."""
    try:
        return np.array(answer)
    except Exception:  # of the user's type, which may fail in any way
        return None


def _kind(answer: object, given: np.ndarray | None) -> str:
    name = type(answer).__name__
    if given is None or (given.dtype == object and not given.shape):
        return name
    if given.dtype.kind in "biufV":
        return f"{name} of shape {given.shape}"
    of = {"U": "str", "S": "bytes"}.get(given.dtype.kind, given.dtype)
    return f"{name} of {of}"


def make_target(config: Config) -> Target:
    """P(x) = a(x)·exp(r(x)/β)."""
    reward = make_reward(config)

    def features(_: Sequence[str], texts: Sequence[str]) -> Features:
        values = reward(texts)
        return {"reward": values, "positive": (values > 0).astype(np.float32)}

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        return np.asarray(
            reward_tilted(jnp.asarray(log_a), jnp.asarray(features["reward"]), beta=config.beta)
        )

    return Target(features, log_score, headline="reward")


def main(config: Config) -> int:
    """Runs it; the exit status is 0 for a whole run, 128 + signal for one that was stopped."""
    target = make_target(config)
    title = f"beta-{config.beta:g}-{config.settings.objective}"
    return align(
        config.settings, lambda _: target, config=config, experiment="sentiment_reward", title=title
    )
