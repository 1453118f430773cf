"""Exact samples of the target for the evaluations of a command: drawn once, and kept for all runs
of the same target."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax

from fjax.evaluation import Exact, TextTarget, draw_exact
from fjax.hosts import agree, is_first
from fjax.runs.exact import read_exact, write_exact
from fjax.training._digests import digest_text

from .settings import Settings
from .task import Built

EXACT_KEY = 2**31 - 9
"""Folded into the key of seed 0, whatever the seed of the run: no step of any run has this key, so
that no policy is trained on what it is measured by."""

FEWEST = 30
"""Samples with which they are better than none."""


def exact_of(
    config: Any, built: Built, target: TextTarget, digests: Mapping[str, str]
) -> Exact | None:
    """Samples of p, from the file of this target or fresh; None where there can be none.

    That is with prompts, each of which has a p of its own, where log P/a has no known bound, where
    they are not asked for, and where the draws brought too few, which is said.

    Raises:
        RunError: for a file that is damaged, or cannot be written.
    """
    settings: Settings = config.settings
    if (
        settings.exact_samples is None
        or target.log_bound is None
        or built.collector.contexts is not None
    ):
        return None
    name = _target_digest(config, target, digests)
    path = settings.exact_folder / f"{name[:16]}.npz"
    if agree(path.is_file()):
        exact = read_exact(path, built.collector, target, target=name)
    else:
        exact = _draw(built, target, settings.exact_samples)
        if is_first():
            write_exact(path, exact, target=name)
    count = len(exact.scored.texts)
    if count < FEWEST:
        built.display.warn(
            f"{exact.drawn:,} samples of the base model brought {count} exact samples of p, fewer "
            f"than {FEWEST}: divergences are estimated by weights instead. More draws "
            f"(--exact-draws) bring more."
        )
        return None
    built.display.say(
        f"Measured by {count} exact samples of p, drawn once from {exact.drawn:,} of the base "
        f"model and kept in {path}: log Z = {exact.log_z.value:.3f} ± {exact.log_z.std_error:.3f}."
    )
    return exact


def _draw(built: Built, target: TextTarget, samples: int) -> Exact:
    rng_key = jax.random.fold_in(jax.random.key(0), EXACT_KEY)
    given = built.collector, built.model.params, target, rng_key, samples
    with built.display.counting("exact") as progress:
        return draw_exact(*given, max_draws=built.settings.exact_draws, progress=progress)


def _target_digest(config: Any, target: TextTarget, digests: Mapping[str, str]) -> str:
    """Of all that p depends on, and how many samples were asked for: so two runs with equal
    settings are measured by equal samples. A target that was fitted is known by its bound."""
    own = {k: v for k, v in dataclasses.asdict(config).items() if k != "settings"}
    settings: Settings = config.settings
    names = ("dtype", "max_new_tokens", "exact_samples", "exact_draws")
    parts = {
        "config": type(config).__module__,
        "own": own,
        "log_bound": target.log_bound,
        "inputs": {flag: digest for flag, digest in digests.items() if flag != "--start"},
        "settings": {name: getattr(settings, name) for name in names},
    }
    return digest_text(json.dumps(parts, sort_keys=True, default=str))
