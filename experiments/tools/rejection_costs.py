"""What quasi-rejection costs and is worth against β: predicted from one half of the proposals, and
found in the other."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from fjax.estimators import Estimate, estimate_log_z
from fjax.evaluation.figures import figure
from fjax.runs.plots import STYLE
from fjax.sampling import accept, estimate_rejection

matplotlib.use("Agg")

import matplotlib.pyplot as plt

FACTORS = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0)
"""Of the β that was chosen."""


class Half(NamedTuple):
    """log P and log q of proposals; and log P/q of these and some of the base model's, for Z."""

    log_score: np.ndarray
    log_q: np.ndarray
    log_weights: np.ndarray


class Cost(NamedTuple):
    """At one β: acceptance rate and TV bound as the first half predicts them, and as the second
    half has them."""

    log_beta: float
    predicted_rate: Estimate
    found_rate: Estimate
    predicted_bound: Estimate
    found_bound: Estimate


def costs(first: Half, second: Half, *, log_beta: float, rng_key: jax.Array) -> list[Cost]:
    """Against multiples of β. The rate found is of coins that are really flipped."""
    found = []
    for i, factor in enumerate(FACTORS):
        at = log_beta + float(np.log(factor))
        predicted, later = (_estimate(half, at) for half in (first, second))
        coins = accept(
            jax.random.fold_in(rng_key, i),
            jnp.asarray(second.log_score),
            jnp.asarray(second.log_q),
            log_beta=at,
        )
        rate = float(coins.mean())
        error = float(np.sqrt(rate * (1 - rate) / len(second.log_q)))
        found.append(Cost(at, predicted[0], figure(rate, error), predicted[1], later[1]))
    return found


def _estimate(half: Half, log_beta: float) -> tuple[Estimate, Estimate]:
    log_weights = jnp.asarray(half.log_weights)
    log_z = estimate_log_z(log_weights, jnp.zeros_like(log_weights))
    estimates = estimate_rejection(
        jnp.asarray(half.log_score), jnp.asarray(half.log_q), log_beta=log_beta, log_z=log_z
    )
    rate, bound = (figure(*map(float, estimate)) for estimate in estimates)
    return rate, bound


def plot(path: Path, found: list[Cost]) -> None:
    """Rate and bound against β, with bars of two standard errors."""
    x = [cost.log_beta for cost in found]
    with plt.style.context(STYLE):
        picture, axes = plt.subplots(1, 2, figsize=(8, 3.6))
        panels = (
            ("acceptance rate", "rate", "upper right"),
            ("bound on TV from the target", "bound", "lower left"),
        )
        for ax, (title, name, corner) in zip(axes, panels, strict=True):
            for kind, marker, shift in (("predicted", "o", -0.08), ("found", "x", 0.08)):
                figures = [getattr(cost, f"{kind}_{name}") for cost in found]
                y, error = ([getattr(f, part) for f in figures] for part in ("value", "std_error"))
                label = (
                    "predicted by the first half" if kind == "predicted" else "found in the second"
                )
                ax.errorbar(
                    [v + shift for v in x],
                    y,
                    2 * np.array(error),
                    marker=marker,
                    ms=5,
                    lw=0.8,
                    label=label,
                )
            ax.set(title=title, xlabel="log β")
            ax.legend(frameon=False, loc=corner)
        axes[0].set_yscale("log")
        axes[1].set_ylim(0, 1.02)
        picture.savefig(path)
        plt.close(picture)
