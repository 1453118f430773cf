"""What a run is after, as plain values: for whoever shows it, and for the report of its folder."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fjax.divergences import FDivergence
from fjax.evaluation import TextTarget


class Aim(NamedTuple):
    """What a run is after; config.json has it, too.

    Attributes:
        target: p in words; "" where nothing is said of it.
        headlines: figures that the run is about, which are shown first.
        bound: the feature that is 1 on every sample of p, of a target that is its indicator times
            the base.
        objective: the divergence that is the distance from the target.
        at_most: divergences that are reported -> the most that each can be; None without limit.
        highlight: a regular expression of what to highlight in samples; "" for nothing.
    """

    target: str = ""
    headlines: Sequence[str] = ()
    bound: str | None = None
    objective: str = ""
    at_most: Mapping[str, float | None] = {}
    highlight: str = ""


def aim_of(target: TextTarget, divergences: Mapping[str, FDivergence], objective: str) -> Aim:
    """What a run towards the target is after.

    Raises:
        ValueError: for an objective that is none of the divergences, or if what to highlight is no
            regular expression.
    """
    if objective not in divergences:
        raise ValueError(f"objective must be one of {list(divergences)}, got {objective!r}.")
    try:
        re.compile(target.highlight)
    except re.error as error:
        raise ValueError(
            f"highlight must be a regular expression, got {target.highlight!r} ({error}). "
            f"re.escape makes one of any text."
        ) from error
    headlines = [*target.ratios, *(["win_rate"] if target.wins else []), target.headline]
    limits = {name: most_of(f) for name, f in divergences.items()}
    named = tuple(filter(None, headlines))
    return Aim(target.description, named, target.bound, objective, limits, target.highlight)


def most_of(divergence: FDivergence) -> float | None:
    """f(0) + f'(∞), the most that D_f(π‖p) can be: π and p have no text in common.

    None where that is infinite.

    >>> from fjax.divergences import jensen_shannon, reverse_kl
    >>> round(most_of(jensen_shannon()), 3), most_of(reverse_kl())
    (0.693, None)
    """
    most = float(divergence.value_at_zero + divergence.slope_at_infinity)
    return most if math.isfinite(most) else None


def read_aim(config: Mapping[str, object]) -> Aim:
    """Of a run's config.json; what older versions of fjax did not write there is unknown."""
    kept = config.get("aim")
    if isinstance(kept, Mapping):
        return Aim(**{name: kept[name] for name in Aim._fields if name in kept})
    return Aim(objective=str(config.get("objective") or config.get("divergence") or ""))
