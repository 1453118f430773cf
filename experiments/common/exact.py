"""Exact samples of the target for the evaluations of a command: drawn once, and kept for all runs
of the same target."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fjax.evaluation import Exact, TextTarget, contexts_used, draw_exact, figures_of_target
from fjax.hosts import any_of, write_for_all
from fjax.runs.exact import read_exact, write_exact
from fjax.training._digests import digest_text

from .settings import Settings
from .task import Built

EXACT_KEY = 2**31 - 9
"""Folded into the key of seed 0, whatever the seed of the run: no step of any run has this key, so
that no policy is trained on what it is measured by."""

FEWEST = 30
"""Samples with which they are better than none."""

MOST_UNKNOWN = 0.5
"""Share of the prompts that figures may leave out, for want of exact samples of them."""


def exact_of(
    config: Any, built: Built, target: TextTarget, digests: Mapping[str, str]
) -> Exact | None:
    """Samples of p, from the file of this target or fresh; None where there can be none.

    That is where log P/a has no known bound, where they are not asked for, and where the draws
    brought too few, which is said: with prompts, of more than half of those that are evaluated on.

    Raises:
        RunError: for a file that is damaged, or cannot be written.
    """
    settings: Settings = config.settings
    if settings.exact_samples is None or target.log_bound is None:
        return None
    name = _target_digest(config, target, digests)
    path = settings.exact_folder / f"{name[:16]}.npz"
    if any_of(not path.is_file()):
        exact = _draw(built, target, settings.exact_samples)
        write_for_all(partial(write_exact, path, exact, target=name), path.is_file)
    else:
        exact = read_exact(path, built.collector, target, target=name)
    lack = _lack(settings, built, exact)
    if lack:
        built.display.warn(
            f"{exact.drawn:,} samples of the base model brought {lack}: divergences are estimated "
            f"by weights instead. More draws (--exact-draws) bring more."
        )
        return None
    _say(built, exact, path)
    return exact


def _lack(settings: Settings, built: Built, exact: Exact) -> str | None:
    """Why they are no better than none, in words; None where they are."""
    count = len(exact.scored.texts)
    if count < FEWEST:
        return f"{count} exact samples of p, fewer than {FEWEST}"
    if exact.scored.contexts is not None:
        used = np.asarray(exact.log_z.value)[
            : contexts_used(built.collector, settings.eval_samples)
        ]
        unknown = np.mean(~np.isfinite(used))
        if unknown > MOST_UNKNOWN:
            return f"too few exact samples of p for {unknown:.0%} of the prompts"
    return None


def _say(built: Built, exact: Exact, path: Path) -> None:
    count, log_z = len(exact.scored.texts), figures_of_target(exact)["log_z"]
    of_each = ""
    if exact.scored.contexts is not None:
        known = np.isfinite(exact.log_z.value)
        of_each = f" of {known.sum()} prompts"
        if not known.all():
            of_each += f" (of {(~known).sum()} there were too few; figures leave them out)"
    built.display.say(
        f"Measured by {count} exact samples of p{of_each}, drawn once from {exact.drawn:,} of the "
        f"base model and kept in {path}: log Z = {log_z.value:.3f} ± {log_z.std_error:.3f}."
    )


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
