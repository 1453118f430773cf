"""Rewards of texts: of a model, or of any function of Python's."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fjax.hosts import any_of, say
from fjax.models import RewardModel
from fjax.runs import RunError

from . import reward_model
from .functions import call, load_function, taken_by
from .prompt_files import Prompt, choose_columns

Rewards = Callable[[Sequence[str]], np.ndarray]

PromptedRewards = Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]

BY_NAME = ("prompts", "completions")
"""What a reward is given by these names, if it has them: so are those that were written for TRL."""


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
    return partial(reward_model.score_texts, load_model(reward, reward_folder, corpora))


def make_prompted_reward(
    reward: str, reward_folder: Path, corpora: Path, prompts: Sequence[Prompt]
) -> PromptedRewards:
    """(prompts, completions) -> rewards, checked on the first two prompts.

    A function is given the completions, where it takes one thing; or prompts, completions and those
    columns that it names. A reward model scores both together.

    Args:
        reward, reward_folder, corpora: as for `make_reward`.
        prompts: of the run.

    Raises:
        RunError: if it cannot be loaded, asks for a column that is not there, or does not answer.
    """
    if ":" not in reward:
        return partial(reward_model.score_answers, load_model(reward, reward_folder, corpora))
    return load_prompted_scorer(reward, "--reward", prompts)


def make_answer_reward(
    reward: str, reward_folder: Path, corpora: Path, prompts: Sequence[Prompt]
) -> Callable[[Sequence[Any], Sequence[str]], np.ndarray]:
    """(prompts, completions) -> rewards: of texts of both together, as `make_reward` has it, where
    all prompts are texts; as `make_prompted_reward` where there are conversations."""
    if any(prompt.messages for prompt in prompts):
        return make_prompted_reward(reward, reward_folder, corpora, prompts)
    of_texts = make_reward(reward, reward_folder, corpora)

    def rewards(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        return of_texts([c + x for c, x in zip(prompts, completions, strict=True)])

    return rewards


def of_prompts(function: Callable, title: str, prompts: Sequence[Prompt]) -> PromptedRewards:
    """The user's function of what it takes: completions alone; prompts, completions and columns;
    or, where one of its parameters is called completions, whatever it names."""
    taken = taken_by(function)
    by_name = "completions" in taken.names
    lead = 0 if by_name else min(max(len(taken.leading), 1), 2)
    given = BY_NAME if by_name else taken.leading[:2]
    names = choose_columns(taken, prompts, title, but=given)

    def rewards(prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        both = [prompt.given for prompt in prompts], list(completions)
        named = {name: [p.columns.get(name) for p in prompts] for name in names}
        if by_name:
            both_named = dict(zip(BY_NAME, both, strict=True))
            named |= {k: v for k, v in both_named.items() if taken.anything or k in taken.names}
        answer = call(function, title, f"{len(completions)} texts", *both[2 - lead :], **named)
        return _values(answer, title, completions)

    return rewards


def load_model(reward: str, reward_folder: Path, corpora: Path) -> RewardModel:
    """The built-in reward model, trained if need be, or that of a folder.

    Raises:
        RunError: if it is none.
    """
    folder = reward_folder if reward == "sentiment" else Path(reward)
    if reward == "sentiment" and any_of(not (folder / "config.json").is_file()):
        say(f"There is no reward model in {folder} yet; training it (once).")
        reward_model.train(corpora, folder)
    model = reward_model.load(folder)
    # of a version that did not write it down
    if model.text_format is None and reward == "sentiment":
        model = model._replace(text_format=reward_model.TEXT_FORMAT)
    if model.text_format is None:
        say(
            f"{folder} says no text_format in its config.json, so that texts are scored as they "
            f"are, without end tokens."
        )
    return model


def load_scorer(name: str, flag: str) -> Rewards:
    """The function of ``module:function``, checked, and called once: whatever is wrong with it is
    said before minutes are spent.

    Raises:
        RunError: if it cannot be imported, or its answer is not one number a text.
    """
    users = checked(load_function(name, flag), name)
    users(["a film .", "another film ."])
    return users


def load_prompted_scorer(name: str, flag: str, prompts: Sequence[Prompt]) -> PromptedRewards:
    """The function of ``module:function`` as `of_prompts` takes it, called once on the first two
    prompts.

    Raises:
        RunError: if it cannot be imported, asks for a column that is not there, or does not answer.
    """
    users = of_prompts(load_function(name, flag), name, prompts)
    first = prompts[:2]
    users(first, [" and a continuation"] * len(first))
    return users


def checked(function: Callable, title: str) -> Rewards:
    """The user's function, whose answer is one finite number a text, or an error that says what it
    was instead."""

    def rewards(texts: Sequence[str]) -> np.ndarray:
        answer = call(function, title, f"{len(texts)} texts", list(texts))
        return _values(answer, title, texts)

    return rewards


def _values(answer: object, title: str, texts: Sequence[str]) -> np.ndarray:
    """One finite number a text, or an error."""
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
            f"{title} returned {given[first]} for the text {texts[first]!r:.200}; its numbers "
            f"must be finite float32."
        )
    return values


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
