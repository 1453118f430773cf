"""The task: features of texts, moments of them, and the target that has those moments."""

import re
from collections.abc import Sequence

import numpy as np

from fjax.evaluation import Features, TextTarget

from ..common import moments
from ..common.moments import fit, make_log_score
from ..common.task import Built, Task
from ..common.words import contains_any, highlight
from .config import Config, parse_moments

ADVICE = "Use words that the model writes, another rate, or more --fit-samples."
"""About a moment that is out of reach."""


def make_features(config: Config, texts: Sequence[str]) -> Features:
    """Woman, gendered, their balance, and one more a moment: [word], lest a user's words take the
    name of a figure."""
    woman, man = (
        contains_any(words.split(), texts).astype(np.float32)
        for words in (config.woman, config.man)
    )
    gendered = np.maximum(woman, man)
    features = {
        "woman": woman,
        "gendered": gendered,
        "balance": woman - np.float32(config.share) * gendered,
    }
    words = [words for words, _ in parse_moments(config.moments)]
    return features | {
        f"[{some}]": contains_any(some.split("|"), texts).astype(np.float32) for some in words
    }


def constrained(config: Config) -> dict[str, float]:
    """Feature -> moment. E[woman] = share·E[gendered] is a moment of 0 of their balance: how many
    are gendered stays free."""
    return {"balance": 0.0} | {f"[{words}]": rate for words, rate in parse_moments(config.moments)}


def make_target(config: Config, built: Built) -> TextTarget:
    """P(x) = a(x)·exp(λ·φ(x)), infinite λ standing for a hard constraint."""
    wanted = constrained(config)

    def features_of(_: Sequence[str], texts: Sequence[str]) -> Features:
        return make_features(config, texts)

    result = fit(built, features_of, wanted, samples=config.fit_samples, advice=ADVICE)
    return TextTarget(
        features_of,
        make_log_score(list(wanted), result.coefficients),
        headline="balance",
        ratios={"share of women": ("woman", "gendered")},
        description=describe(config),
        highlight=highlight(looked_for(config)),
        log_bound=highest(config, np.asarray(result.coefficients, float)),
    )


def highest(config: Config, coefficients: np.ndarray) -> float:
    """An upper bound of λ·φ. Balance is between -share and 1 - share, a word's rate between 0 and
    1."""
    low = np.array([-config.share] + [0.0] * (len(coefficients) - 1))
    return moments.highest(coefficients, low, low + 1)


def describe(config: Config) -> str:
    """The target in words."""
    rates = [
        f"{rate:g} of the samples with {words}" for words, rate in parse_moments(config.moments)
    ]
    shares = ", ".join([f"women in {config.share:g} of the gendered samples", *rates])
    return f"p(x) ∝ a(x)·exp(λ·φ(x)), with {shares}"


def looked_for(config: Config) -> list[str]:
    """The words of all moments."""
    some = [word for words, _ in parse_moments(config.moments) for word in words.split("|")]
    return [*config.woman.split(), *config.man.split(), *some]


def title(config: Config) -> str:
    """Share, moments and objective."""
    more = "-".join(re.sub(r"\W+", "-", words) for words, _ in parse_moments(config.moments))
    return "-".join(filter(None, [f"women-{config.share:g}", more, config.settings.title]))


TASK = Task(
    "gender_balance",
    Config,
    title,
    lambda config: lambda built: make_target(config, built),
    ("share of women",),
)
