"""One sentence on what a run has reached, success and failure alike.

A change counts once it is more than two standard errors; before that nothing is said of it but
that it is within error.
"""

import math

from fjax.runs.aim import Aim
from fjax.runs.names import title_of
from fjax.runs.rows import Record, error_of, rests_on_little, short, value_of

ALIKE, FAR = 0.15, 0.5
"""Lengths and entropies that differ by less than the one share are alike; by more than the other,
much different."""

WORDS = {
    "length": ("long", "longer", "shorter", "tokens"),
    "entropy": ("varied", "more varied", "less varied", "nats of entropy"),
}
"""Figure -> the same, more and less of it, and its unit."""


def verdict(first: Record, last: Record, aim: Aim, of_p: Record | None = None) -> str:
    """What the run is about, how far from the target it is, and what the samples are like.

    Args:
        first: figures of the evaluation before training.
        last: of the one after it.
        aim: of the run.
        of_p: figures of samples of p itself, with which length and entropy are then compared; None
            compares with those before.

    Returns:
        The sentence; "" where there is nothing to say.

    >>> aim = Aim(headlines=("satisfaction",), at_most={"forward_kl": None})
    >>> first = {"satisfaction": 0.01, "satisfaction_std_error": 0.004, "satisfaction_ess": 900.0}
    >>> last = {"satisfaction": 0.85, "satisfaction_std_error": 0.01, "satisfaction_ess": 900.0}
    >>> verdict(first, last, aim)
    'satisfaction 0.010 → 0.85.'
    """
    parts = (_headline(first, last, aim), _distance(first, last, aim), _samples(first, last, of_p))
    said = "; ".join(filter(None, parts))
    return f"{said}." if said else ""


def _headline(first: Record, last: Record, aim: Aim) -> str:
    name = next((name for name in aim.headlines if name in first and name in last), None)
    if name is None:
        return ""
    change = f"{title_of(name)} {short(value_of(first, name))} → {short(value_of(last, name))}"
    return change if _sign(first, last, name) else f"{change}, the same within error"


def _distance(first: Record, last: Record, aim: Aim) -> str:
    known = (
        name
        for name in ("forward_kl", aim.objective)
        if all(math.isfinite(value_of(record, name)) for record in (first, last))
    )
    name = next(known, None)
    if name is None:
        there = any(name in last for name in ("forward_kl", aim.objective))
        return "how far from the target is unknown" if there else ""
    unit = "nats" if name == "forward_kl" else f"in {title_of(name)}"
    before, after = (short(value_of(record, name)) for record in (first, last))
    if any(rests_on_little(record, name, aim) for record in (first, last)):
        return f"how far from the target rests on too few samples ({before} → {after} {unit})"
    sign = _sign(first, last, name)
    if sign < 0:
        return f"{after} of {before} {unit} from the target left"
    comparison = (
        "further from the target than before" if sign else "no nearer to the target within error"
    )
    return f"{comparison}: {after} after {before} {unit}"


def _samples(first: Record, last: Record, of_p: Record | None) -> str:
    """Whether they are as long and as varied as those of p, or as those before."""
    to, whose = (first, "before") if of_p is None else (of_p, "p's")
    known = [name for name in WORDS if value_of(to, name) > 0 and value_of(last, name) > 0]
    changed = [name for name in known if not _is_alike(to, last, name)]
    if not changed:
        same = " and ".join(f"as {WORDS[name][0]}" for name in known)
        return f"samples {same} as {whose}" if same else ""
    how = " and ".join(_comparative(to, last, name) for name in changed)
    figures = ", ".join(
        f"{short(value_of(last, name))} of {short(value_of(to, name))} {WORDS[name][3]}"
        for name in changed
    )
    return f"samples {how} than {whose} ({figures})"


def _is_alike(to: Record, last: Record, name: str) -> bool:
    near = abs(_change(to, last, name)) <= ALIKE
    return near or not _sign(to, last, name)


def _comparative(to: Record, last: Record, name: str) -> str:
    _, more, less, _ = WORDS[name]
    change = _change(to, last, name)
    return f"{'much ' if abs(change) > FAR else ''}{more if change > 0 else less}"


def _change(to: Record, last: Record, name: str) -> float:
    """As a share of the figure that it is compared with."""
    return value_of(last, name) / value_of(to, name) - 1


def _sign(first: Record, last: Record, name: str) -> int:
    """Of the change of a figure; 0 within two standard errors, and where these are unknown."""
    error = math.hypot(*(error_of(record, name) for record in (first, last)))
    change = value_of(last, name) - value_of(first, name)
    return (change > 2 * error) - (change < -2 * error) if math.isfinite(error) else 0
