"""The task: features of texts, moments of them, and the target that has those moments."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fjax import fit_coefficients
from fjax.evaluation import Features, TextTarget, draw_batches
from fjax.runs import RunError
from fjax.targets import MomentFit, exponential_family

from ..common.task import Built, Task
from ..common.words import contains_any, highlight
from .config import Config, parse_moments


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


def stack(features: Features, names: Sequence[str]) -> jnp.ndarray:
    """``[N, K]``."""
    return jnp.stack([jnp.asarray(features[name]) for name in names], axis=1)


def fit(config: Config, built: Built) -> MomentFit:
    """λ from fresh samples of the base model, shown with its errors.

    Raises:
        RunError: if the moments cannot be reached with those samples, with the reason.
    """
    wanted = constrained(config)
    collector, params = built.collector, built.model.params
    batches = -(-config.fit_samples // collector.samples)
    with built.display.counting("fit") as progress:
        advance = progress(batches)
        drawn = draw_batches(collector, params, built.rng_key, batches, advance=advance)
    texts = [text for batch in drawn for text in collector.decode(batch.tokens, batch.where)]
    features = stack(make_features(config, texts), list(wanted))
    result = fit_coefficients(features, jnp.array(list(wanted.values()), features.dtype))
    _show(built, result, features, wanted)
    _check(result, features, wanted)
    return result


def _show(built: Built, result: MomentFit, features: jnp.ndarray, wanted: dict[str, float]) -> None:
    rows = [
        (
            name,
            f"{float(features[:, i].mean()):.4f}",
            f"{moment:.4f}",
            f"{float(result.coefficients[i]):.3f} ± {float(result.std_error[i]):.3f}",
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


def _check(result: MomentFit, features: jnp.ndarray, wanted: dict[str, float]) -> None:
    """Whether the moments can be reached at all: each alone, and all together."""
    for i, (name, moment) in enumerate(wanted.items()):
        if result.unreachable[i]:
            low, high = float(features[:, i].min()), float(features[:, i].max())
            raise RunError(
                f"No distribution over these samples has a mean of {moment:g} of {name!r}, which "
                f"is between {low:g} and {high:g} in all of them. Use words that the model writes, "
                f"another rate, or more --fit-samples."
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


def make_target(config: Config, built: Built) -> TextTarget:
    """P(x) = a(x)·exp(λ·φ(x)), infinite λ standing for a hard constraint."""
    names, result = list(constrained(config)), fit(config, built)

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        return np.asarray(
            exponential_family(jnp.asarray(log_a), stack(features, names), result.coefficients)
        )

    return TextTarget(
        lambda _, texts: make_features(config, texts),
        log_score,
        headline="balance",
        ratios={"share of women": ("woman", "gendered")},
        description=describe(config),
        highlight=highlight(looked_for(config)),
        log_bound=highest(config, np.asarray(result.coefficients, float)),
    )


def highest(config: Config, coefficients: np.ndarray) -> float:
    """An upper bound of λ·φ: of each feature the end of its range that counts more. Balance is
    between -share and 1 - share, a word's rate between 0 and 1; a hard constraint adds nothing."""
    soft = np.where(np.isfinite(coefficients), coefficients, 0.0)
    low = np.array([-config.share] + [0.0] * (len(soft) - 1))
    return float(np.maximum(soft * low, soft * (low + 1)).sum())


def describe(config: Config) -> str:
    """The target in words."""
    rates = [
        f"{rate:g} of the samples with {words}" for words, rate in parse_moments(config.moments)
    ]
    moments = ", ".join([f"women in {config.share:g} of the gendered samples", *rates])
    return f"p(x) ∝ a(x)·exp(λ·φ(x)), with {moments}"


def looked_for(config: Config) -> list[str]:
    """The words of all moments."""
    some = [word for words, _ in parse_moments(config.moments) for word in words.split("|")]
    return [*config.woman.split(), *config.man.split(), *some]


def title(config: Config) -> str:
    """Share, moments and objective."""
    moments = (re.sub(r"\W+", "-", words) for words, _ in parse_moments(config.moments))
    more = "-".join(moments)
    return "-".join(filter(None, [f"women-{config.share:g}", more, config.settings.title]))


TASK = Task(
    "gender_balance",
    Config,
    title,
    lambda config: lambda built: make_target(config, built),
    ("share of women",),
)
