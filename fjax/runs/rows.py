"""Figures of evaluations as rows of a table: which, in what order, and what is said of each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fjax.runs.aim import Aim
from fjax.runs.names import title_of

Record = Mapping[str, Any]
"""An evaluation, as a line of metrics.jsonl: ``name``, ``name_std_error`` and ``name_ess``."""

AFTER = ("kl_to_base", "entropy", "length", "distinct_1", "distinct_2", "distinct_3", "self_bleu")
"""What comes after the divergences, and before all the rest."""

FEW, HEAVY = 10, 0.7
"""Fewer effective samples, or a Pareto k̂ above this (Vehtari et al. 2024, section 3.2.4), are too
little for a figure: its standard error is itself unknown."""

LITTLE = (
    f"± ? is of a figure that rests on too little: fewer than {FEW} effective samples, or weights "
    f"whose Pareto k̂ is above {HEAVY}."
)


def shown(records: Sequence[Record], aim: Aim) -> list[str]:
    """The rows of a table of records, in order, but for those that are left out.

    What the run is about, the objective, other divergences, the price, the rest. Of a run of before
    its aim was written down: as they were reported.
    """
    there = [name for record in records for name in record if f"{name}_std_error" in record]
    wanted = (*aim.headlines, aim.objective, "forward_kl", *aim.at_most, *AFTER)
    first = [name for name in wanted if name in there] if aim.at_most else []
    ordered = dict.fromkeys(first + there)
    return [name for name in ordered if name not in left_out(records, aim)]


def before_and_after(
    first: Record, last: Record, of_p: Record | None, aim: Aim
) -> tuple[list[str], list[list[str]], str]:
    """A table of two evaluations, and of p itself where it was sampled.

    Returns:
        Headings, rows, and what is to be said below them.
    """
    columns = {f"before (step {first['step']})": first, f"after (step {last['step']})": last}
    columns |= {"p": of_p} if of_p else {}
    records = list(columns.values())
    found = [
        [titled(name, aim), *(cell(record, name, aim) for record in records)]
        for name in shown(records, aim)
    ]
    said = ["On fresh samples of the policy; ± is the standard error.", *notes(records, aim)]
    return ["", *columns], found, " ".join(said)


def left_out(records: Sequence[Record], aim: Aim) -> list[str]:
    """Divergences that are infinite throughout, which as rows would say nothing."""
    found = {name: [value_of(r, name) for r in records if name in r] for name in aim.at_most}
    return [name for name, values in found.items() if values and all(map(math.isinf, values))]


def titled(name: str, aim: Aim) -> str:
    """What a figure is called, with its limit where it has one."""
    most = aim.at_most.get(name)
    return title_of(name) if most is None else f"{title_of(name)}, at most {most:.3g}"


def notes(records: Sequence[Record], aim: Aim) -> list[str]:
    """What is to be said below a table."""
    listed = " and ".join(map(title_of, left_out(records, aim)))
    little = any(rests_on_little(r, name, aim) for r in records for name in shown(records, aim))
    why = f"Left out, for π says what p rules out: {listed}, infinite."
    return [why] * bool(listed) + [LITTLE] * little


def value_of(record: Record, name: str) -> float:
    """NaN where it is unknown."""
    return float(record.get(name, math.nan))


def error_of(record: Record, name: str) -> float:
    """The standard error of a figure; NaN where it is unknown."""
    return float(record.get(f"{name}_std_error", math.nan))


def rests_on_little(record: Record, name: str, aim: Aim) -> bool:
    """Whether too few samples count for the figure, or a few for most of it."""
    weighted = name == "log_z" or name in aim.at_most
    heavy = weighted and value_of(record, "pareto_k") > HEAVY
    return heavy or float(record.get(f"{name}_ess", math.nan)) < FEW


def collapse(record: Record) -> str | None:
    """What to say of weights p/q of a replay of which a few count for most; None of others."""
    k = float(record.get("pareto_k", -math.inf))
    if not k > HEAVY:
        return None
    found = "too few of them are above 0" if math.isinf(k) else f"Pareto k̂ {k:.2f}, above {HEAVY}"
    return (
        f"The weights p/q of what was drawn so far rest on too little ({found}): gradients and log "
        f"Z are those of a few samples, which the policy will learn by heart. Draw more in this "
        f"stage, go to the target in more stages, or make the target easier (a larger β)."
    )


def cell(record: Record, name: str, aim: Aim) -> str:
    """The value to two digits of its standard error; to three digits where it has none."""
    if name not in record:
        return "–"
    value, error = value_of(record, name), error_of(record, name)
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if rests_on_little(record, name, aim):
        return f"{value:z.{_decimals(value, 2)}f} ± ?"
    if not math.isfinite(error) or error == 0:
        return f"{value:z.{_decimals(value, 3)}f}"
    decimals = _decimals(error, 2)
    if max(abs(value), error) < 0.5 * 10**-decimals:
        return "0"  # but for rounding, as KL(π‖a) of the base model itself
    return f"{value:z.{decimals}f} ± {error:.{decimals}f}"


def short(value: float) -> str:
    """A number within a sentence: two digits, or those before the point and one behind it."""
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:z.{_decimals(value, 2) if abs(value) < 1 else 1 if abs(value) < 20 else 0}f}"


def _decimals(value: float, digits: int) -> int:
    """How many to write for so many digits of a number, up to 4."""
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 4) if value else 0
