"""The task: its constraint on texts, its target, and nothing else."""

import re
from collections.abc import Sequence

import numpy as np

from experiments._evaluate import Features, Target
from experiments._loop import align
from experiments._words import contains_any

from .config import Config


def make_target(config: Config) -> Target:
    """P(x) = a(x)·([word in x] + ε)."""

    def features(_: Sequence[str], texts: Sequence[str]) -> Features:
        return {"satisfaction": contains_any([config.word], texts).astype(np.float32)}

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return log_a + np.log(features["satisfaction"] + np.float32(config.smoothing))

    return Target(
        features,
        log_score,
        headline="satisfaction",
        bound=None if config.smoothing else "satisfaction",
        stop_if_absent=config.when_absent == "stop",
    )


def main(config: Config) -> int:
    """Runs it; the exit status is 0 for a whole run, 128 + signal for one that was stopped."""
    title = (
        f"{re.sub(r'[^a-z0-9]+', '-', config.word.lower()).strip('-')}-{config.settings.objective}"
    )
    return align(
        config.settings,
        lambda _: make_target(config),
        config=config,
        experiment="lexical_constraint",
        title=title,
    )
