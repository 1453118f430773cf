"""The task: functions of the user's, and the target under which they have the wanted means."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from fjax.evaluation import Features, TextTarget
from fjax.models import LanguageModel
from fjax.rollouts import Contexts
from fjax.runs import RunError

from ..common import contexts
from ..common.moments import fit, highest, make_log_score
from ..common.prompt_files import Prompt
from ..common.rewards import PromptedRewards, load_prompted_scorer, load_scorer
from ..common.task import Built, Task
from .config import Config

ADVICE = (
    "Ask for a mean that is strictly between them (1 or 0 only of a function that says yes or no), "
    "change the function, or draw more --fit-samples."
)
"""About a moment that is out of reach."""

Scorers = Mapping[str, PromptedRewards]
"""module:function -> (prompts, texts) to numbers."""


def make_contexts(config: Config, model: LanguageModel) -> Contexts | None:
    """The prompts to align on and to evaluate on, if there are any."""
    if not config.has_prompts:
        return None
    return contexts.make_contexts(config, config.settings, model)


def load_scorers(config: Config) -> Scorers:
    """The functions of ``--target``, each called once.

    Raises:
        RunError: if there is none, or one cannot be used.
    """
    if not config.target:
        raise RunError(
            "Give a function of texts and its mean, such as --target mine:about_food --moment 0.5."
        )
    if not config.has_prompts:
        of_texts = {name: load_scorer(name, "--target") for name in config.target}
        return {name: lambda _, texts, of=of: of(texts) for name, of in of_texts.items()}
    prompts = contexts.read_all(config)
    return {name: load_prompted_scorer(name, "--target", prompts) for name in config.target}


def make_features(scorers: Scorers, prompts: Sequence[Prompt], texts: Sequence[str]) -> Features:
    """One number a text of each function, under its whole name, which no figure has."""
    return {name: scorer(prompts, texts) for name, scorer in scorers.items()}


def prepare(config: Config) -> Callable[[Built], TextTarget]:
    """How to make the target; the functions are loaded and tried at once."""
    return partial(make_target, config, load_scorers(config))


def make_target(config: Config, scorers: Scorers, built: Built) -> TextTarget:
    """P(x) = a(x)·exp(λ·φ(x)), infinite λ standing for a hard constraint."""
    wanted, seen = config.wanted, {}

    def features_of(prompts: Sequence[Prompt], texts: Sequence[str]) -> Features:
        seen.update(make_features(scorers, prompts, texts))
        return seen

    result = fit(built, features_of, wanted, samples=config.fit_samples, advice=ADVICE)
    _check_varies(seen)
    yes_or_no = {name for name, values in seen.items() if np.isin(values, (0, 1)).all()}
    coefficients = np.asarray(result.coefficients, float)
    return TextTarget(
        lambda prompts, texts: _checked(yes_or_no, make_features(scorers, prompts, texts), texts),
        make_log_score(config.target, result.coefficients),
        headline=config.target[0],
        bound=config.target[0] if coefficients.tolist() == [np.inf] else None,
        description=describe(config),
        log_bound=_log_bound(coefficients) if len(yes_or_no) == len(wanted) else None,
    )


def _check_varies(seen: Features) -> None:
    """A function that answers every text alike has nothing to be moved by.

    Raises:
        RunError: if one does.
    """
    for name, values in seen.items():
        if values.min() == values.max():
            raise RunError(
                f"{name} is {values[0]:g} for all {len(values)} samples of the base model, which "
                f"has that mean already: there is nothing to align. Change the function, or draw "
                f"more --fit-samples."
            )


def _checked(yes_or_no: set[str], features: Features, texts: Sequence[str]) -> Features:
    """That what said yes or no to all that λ was fitted to still does: constraints and bounds rest
    on it.

    Raises:
        RunError: if one does not.
    """
    for name in yes_or_no:
        other = np.flatnonzero(~np.isin(features[name], (0, 1)))
        if len(other):
            raise RunError(
                f"{name} was 0 or 1 for all samples that λ was fitted to, and is "
                f"{features[name][other[0]]:g} for the text {texts[other[0]]!r:.200}. Let it say "
                f"yes or no, or draw more --fit-samples, that they show what it can say."
            )
    return features


def _log_bound(coefficients: np.ndarray) -> float:
    """Of λ·φ, of functions between 0 and 1."""
    return highest(coefficients, np.zeros_like(coefficients), np.ones_like(coefficients))


def describe(config: Config) -> str:
    """The target in words."""
    means = (f"{moment:g} of {name}" for name, moment in config.wanted.items())
    p, a, score = (
        ("p(x|c)", "a(x|c)", "φ(c, x)") if config.has_prompts else ("p(x)", "a(x)", "φ(x)")
    )
    return f"{p} ∝ {a}·exp(λ·{score}), with a mean of {', '.join(means)}"


def title(config: Config) -> str:
    """Functions, moments and objective."""
    names = (
        f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{moment:g}"
        for name, moment in config.wanted.items()
    )
    global_z = ["global-z"] if config.normalizer == "global" else []
    return "-".join([*names, config.settings.title, *global_z])


TASK = Task("moments", Config, title, prepare, (), make_contexts)
