"""Targets with given moments, p(x) ∝ a(x)·exp(λ·φ(x)): λ fitted to samples of the base model, shown
with its errors, and refused where the samples have no such distribution.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax import fit_coefficients
from fjax.evaluation import Features, draw_batches, given_of
from fjax.hosts import fetch
from fjax.moments import fit_coefficients_over_contexts
from fjax.rollouts import Contexts
from fjax.runs import RunError
from fjax.targets import MomentFit, exponential_family

from .task import Built

FEWEST = 100
"""Effective samples below which a fit is said to rest on few."""


def fit(
    built: Built,
    features_of: Callable[[Sequence[Any], Sequence[str]], Features],
    wanted: Mapping[str, float],
    *,
    samples: int,
    advice: str,
) -> MomentFit:
    """λ from fresh samples of the base model, shown with its errors.

    Args:
        built: what draws them.
        features_of: (prompts, texts) -> numbers a text, the wanted ones among them.
        wanted: feature -> moment. Exactly 1 or 0 of a feature that is always 0 or 1 is a hard
            constraint.
        samples: how many, rounded up to whole batches.
        advice: what to do about a moment that is out of reach.

    Raises:
        RunError: if the moments cannot be reached with those samples, with the reason.
    """
    contexts = built.collector.contexts
    drawn = _draw(built, samples) if contexts is None else _draw_prompted(built, contexts, samples)
    features = stack(features_of(drawn.prompts, drawn.texts), list(wanted))
    moments = jnp.array(list(wanted.values()), features.dtype)
    result, reach = _fit(features, moments, drawn.contexts)
    _show(built, result, features, wanted)
    _check(result, features, wanted, reach, advice)
    if result.ess < FEWEST:
        built.display.warn(
            f"λ rests on {float(result.ess):.0f} effective samples of {len(features)}, as its "
            f"errors show. More of them (--fit-samples) make it surer."
        )
    return result


def _fit(
    features: jax.Array, moments: jax.Array, contexts: np.ndarray | None
) -> tuple[MomentFit, tuple[jax.Array, jax.Array]]:
    """λ; and the lowest and highest of each feature, of prompts on average over them."""
    if contexts is None:
        return fit_coefficients(features, moments), (features.min(axis=0), features.max(axis=0))
    table, log_weights = _by_context(features, contexts)
    result = fit_coefficients_over_contexts(table, moments, log_weights=log_weights)
    return result, (table.min(axis=1).mean(axis=0), table.max(axis=1).mean(axis=0))


def make_log_score(
    names: Sequence[str], coefficients: jax.Array
) -> Callable[[np.ndarray, Features], np.ndarray]:
    """(log a, features) -> log a(x) + λ·φ(x), infinite λ standing for a hard constraint."""

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        given = jnp.asarray(log_a), stack(features, names), coefficients
        return np.asarray(exponential_family(*given))

    return log_score


def highest(coefficients: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """An upper bound of λ·φ for φ between ``low`` and ``high``: of each feature the end that counts
    more. A hard constraint adds nothing."""
    soft = np.where(np.isfinite(coefficients), coefficients, 0.0)
    return float(np.maximum(soft * low, soft * high).sum())


def stack(features: Features, names: Sequence[str]) -> jnp.ndarray:
    """``[N, K]``."""
    return jnp.stack([jnp.asarray(features[name]) for name in names], axis=1)


class _Drawn(NamedTuple):
    """What λ is fitted to; contexts only where each has a Z of its own."""

    prompts: list[Any]
    texts: list[str]
    contexts: np.ndarray | None


def _draw(built: Built, samples: int) -> _Drawn:
    collector, params = built.collector, built.model.params
    batches = -(-samples // collector.samples)
    with built.display.counting("fit") as progress:
        advance = progress(batches)
        drawn = draw_batches(collector, params, built.rng_key, batches, advance=advance)
    texts = [text for batch in drawn for text in collector.decode(batch.tokens, batch.where)]
    return _Drawn([""] * len(texts), texts, None)


def _draw_prompted(built: Built, contexts: Contexts, samples: int) -> _Drawn:
    """Continuations of the prompts to align on."""
    collector, drawn = built.collector, []
    batches = -(-samples // collector.samples)
    with built.display.counting("fit") as progress:
        advance = progress(batches)
        for i in range(batches):
            key = jax.random.fold_in(built.rng_key, i)
            drawn.append(fetch(collector.draw(built.model.params, key)))
            advance(i + 1)
    texts = [text for batch in drawn for text in collector.decode(batch.tokens, batch.where)]
    ids = np.concatenate([batch.contexts for batch in drawn])
    prompts = given_of(contexts.training, ids, len(ids))
    return _Drawn(prompts, texts, None if contexts.global_z else ids)


def _by_context(features: jnp.ndarray, ids: np.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Features ``[C, N, K]`` and log-weights ``[C, N]``, -inf where a prompt was drawn less often
    than others."""
    rows = [np.flatnonzero(ids == i) for i in np.unique(ids)]
    most = max(map(len, rows))
    chosen = np.stack([np.resize(some, most) for some in rows])
    there = np.arange(most) < np.array([[len(some)] for some in rows])
    return features[chosen], jnp.where(there, 0.0, -jnp.inf)


def _show(
    built: Built, result: MomentFit, features: jnp.ndarray, wanted: Mapping[str, float]
) -> None:
    rows = [
        (
            name,
            f"{float(features[:, i].mean()):.4f}",
            f"{moment:.4f}",
            _coefficient(float(result.coefficients[i]), float(result.std_error[i])),
            f"{float(result.residual[i]):.1e}",
        )
        for i, (name, moment) in enumerate(wanted.items())
    ]
    headings = ("feature", "base", "wanted", "coefficient λ", "residual")
    title = (
        f"moments, fitted to {len(features)} samples of the base model; "
        f"{float(result.ess):.0f} of them effective"
    )
    built.display.table(title, headings, rows)
    soft = jnp.isfinite(result.coefficients)
    moments = jnp.array(list(wanted.values()))
    kl = jnp.where(soft, result.coefficients * moments, 0.0).sum() - result.log_z
    built.display.say(f"The target is KL(p‖a) = {float(kl):.3f} nats away from the base model.")


def _coefficient(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}" if np.isfinite(value) else "constraint"


def _check(
    result: MomentFit,
    features: jnp.ndarray,
    wanted: Mapping[str, float],
    reach: tuple[jnp.ndarray, jnp.ndarray],
    advice: str,
) -> None:
    """Whether the moments can be reached at all: each alone, and all together."""
    for i, (name, moment) in enumerate(wanted.items()):
        if result.unreachable[i]:
            low, high = (float(end[i]) for end in reach)
            raise RunError(
                f"No distribution over these samples has a mean of {moment:g} of {name!r}, which "
                f"is between {low:g} and {high:g} in all {len(features)} of them, and "
                f"{float(features[:, i].mean()):g} on average. {advice}"
            )
    if not result.converged:
        left = ", ".join(
            f"{name} by {float(r):+.3g}" for name, r in zip(wanted, result.residual, strict=True)
        )
        raise RunError(
            f"The moments contradict each other in the samples of the base model: the closest fit "
            f"misses {left}. "
            "Leave one out, change the rates, or raise --fit-samples."
        )
