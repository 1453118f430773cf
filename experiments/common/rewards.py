"""Rewards of texts: of a model, or of any function of Python's."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fjax.runs import RunError

from . import reward_model
from .functions import call, load_function

Rewards = Callable[[Sequence[str]], np.ndarray]


def make_reward(reward: str, reward_folder: Path, corpora: Path) -> Rewards:
    """Texts -> rewards, checked.

    Args:
        reward: sentiment, module:function, or the folder of a reward model.
        reward_folder: where that of sentiment is kept.
        corpora: what it is trained on, if it is not there.

    Raises:
        RunError: if it cannot be loaded.
    """
    if ":" in reward:
        return load_scorer(reward, "--reward")
    folder = reward_folder if reward == "sentiment" else Path(reward)
    if reward == "sentiment" and not (folder / "config.json").is_file():
        print(f"There is no reward model in {folder} yet; training it (once).")
        reward_model.train(corpora, folder)
    model = reward_model.load(folder)
    # of a version that did not write it down
    if model.text_format is None and reward == "sentiment":
        model = model._replace(text_format=reward_model.TEXT_FORMAT)
    if model.text_format is None:
        print(
            f"{folder} says no text_format in its config.json, so that texts are scored as they "
            f"are, without end tokens."
        )
    return partial(reward_model.score_texts, model)


def load_scorer(name: str, flag: str) -> Rewards:
    """The function of ``module:function``, checked, and called once: whatever is wrong with it is
    said before minutes are spent.

    Raises:
        RunError: if it cannot be imported, or its answer is not one number a text.
    """
    users = checked(load_function(name, flag), name)
    users(["a film .", "another film ."])
    return users


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
                f"{title} returned {given[first]} for the text {texts[first]!r:.200}; its "
                f"numbers must be finite float32."
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
