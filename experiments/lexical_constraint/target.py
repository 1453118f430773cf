"""The task: its constraint on texts, its target, and nothing else."""

import math
import re
from collections.abc import Sequence

import numpy as np

from fjax.evaluation import Features, TextTarget

from ..common.task import Task
from ..common.words import contains_any, highlight
from .config import Config


def make_target(config: Config) -> TextTarget:
    """P(x) = a(x)·([word in x] + ε)."""

    def features(_: Sequence[str], texts: Sequence[str]) -> Features:
        return {"satisfaction": contains_any([config.word], texts).astype(np.float32)}

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return log_a + np.log(features["satisfaction"] + np.float32(config.smoothing))

    return TextTarget(
        features,
        log_score,
        headline="satisfaction",
        bound=None if config.smoothing else "satisfaction",
        stop_if_absent=config.when_absent == "stop",
        description=describe(config),
        highlight=highlight([config.word]),
        log_bound=math.log1p(config.smoothing),
    )


def describe(config: Config) -> str:
    """The target in words."""
    holds = f"[{config.word.strip()} in x]"
    return f"p(x) ∝ a(x)·{f'({holds} + {config.smoothing:g})' if config.smoothing else holds}"


def title(config: Config) -> str:
    """Word and objective."""
    word = re.sub(r"[^a-z0-9]+", "-", config.word.lower()).strip("-")
    return f"{word}-{config.settings.title}"


TASK = Task(
    "lexical_constraint",
    Config,
    title,
    lambda config: lambda built: make_target(config),
    ("satisfaction",),
)
