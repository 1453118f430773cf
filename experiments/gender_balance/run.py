"""The task: features of texts, moments of them, and the target that has those moments."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from experiments._evaluate import Features, Target
from experiments._loop import Prepared, align, draw_fresh
from experiments._run_folder import RunError
from experiments._words import contains_any
from fjax import fit_coefficients
from fjax.targets import MomentFit, exponential_family

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


def fit(config: Config, prepared: Prepared) -> MomentFit:
    """λ from fresh samples of the base model, shown with its errors.

    Raises:
        RunError: if the moments cannot be had from those samples, with the reason.
    """
    wanted = constrained(config)
    batches = -(-config.fit_samples // prepared.settings.samples)
    drawn = draw_fresh(prepared, prepared.model.params, prepared.rng_key, batches, what="fit")
    texts = [text for batch in drawn for text in prepared.programs.decode(batch)]
    features = stack(make_features(config, texts), list(wanted))
    result = fit_coefficients(features, jnp.array(list(wanted.values()), features.dtype))
    _show(prepared, result, features, wanted)
    _check(result, features, wanted)
    return result


def _show(
    prepared: Prepared, result: MomentFit, features: jnp.ndarray, wanted: dict[str, float]
) -> None:
    rows = [
        (name, f"{float(features[:, i].mean()):.4f}", f"{moment:.4f}", f"{float(result.coefficients[i]):.3f} ± "
         f"{float(result.std_error[i]):.3f}", f"{float(result.residual[i]):.1e}")
        for i, (name, moment) in enumerate(wanted.items())
    ]  # fmt: skip
    headings = ("feature", "base", "wanted", "coefficient λ", "residual")
    title = f"moments, fitted to {len(features)} samples of the base model; {float(result.ess):.0f} of them effective"
    prepared.display.table(title, headings, rows)
    soft = jnp.isfinite(result.coefficients)
    moments = jnp.array(list(wanted.values()))
    kl = jnp.where(soft, result.coefficients * moments, 0.0).sum() - result.log_z
    prepared.display.say(f"The target is KL(p‖a) = {float(kl):.3f} nats away from the base model.")


def _check(result: MomentFit, features: jnp.ndarray, wanted: dict[str, float]) -> None:
    """Whether the moments can be had at all: each alone, and all together."""
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


def make_target(config: Config, prepared: Prepared) -> Target:
    """P(x) = a(x)·exp(λ·φ(x)), infinite λ standing for a hard constraint."""
    names, result = list(constrained(config)), fit(config, prepared)

    def log_score(log_a: np.ndarray, features: Features) -> np.ndarray:
        return np.asarray(
            exponential_family(jnp.asarray(log_a), stack(features, names), result.coefficients)
        )

    return Target(
        lambda _, texts: make_features(config, texts),
        log_score,
        headline="balance",
        ratios={"share of women": ("woman", "gendered")},
    )


def main(config: Config) -> int:
    """Runs it; the exit status is 0 for a whole run, 128 + signal for one that was stopped."""
    more = "-".join(re.sub(r"\W+", "-", words) for words, _ in parse_moments(config.moments))
    title = "-".join(filter(None, [f"women-{config.share:g}", more, config.settings.objective]))
    return align(
        config.settings,
        lambda prepared: make_target(config, prepared),
        config=config,
        experiment="gender_balance",
        title=title,
    )
