"""The last evaluation of every objective beside one another, as Markdown."""

import math
from collections.abc import Sequence

from fjax.runs.names import title_of
from fjax.runs.plots import counted

from .plan import Place
from .results import Result, Spread, by_label, differing_settings, figures_of_p, spread

REPORTED = (
    "kl_to_base",
    "entropy",
    "distinct_1",
    "distinct_2",
    "self_bleu",
    "perplexity",
    "forward_kl",
    "reverse_kl",
    "total_variation",
    "jensen_shannon",
)
"""Columns after the task's headline."""

DISTANCES = REPORTED[-4:]
"""Those that are 0 between p and itself."""


def page(
    title: str,
    command: str,
    results: Sequence[Result],
    missing: Sequence[Place],
    figures: Sequence[str],
    pictures: Sequence[str],
) -> str:
    """The whole table.md: command, table, what its numbers are, what is missing, and the
    pictures."""
    lines = [f"# {title}", "", f"    {command}", "", *rows(results, missing, figures), ""]
    lines += [*notes(results, missing), ""]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n".join(lines) + "\n"


def rows(results: Sequence[Result], missing: Sequence[Place], figures: Sequence[str]) -> list[str]:
    """Header, base model, and a row an objective; columns that no run has are left out."""
    known = [name for name in figures if any(name in result.last for result in results)]
    samples = counted([record for result in results for record in result.steps])
    header = ["", *(title_of(name) for name in known), samples, "seconds"]
    groups = by_label(results)
    wanted = {label: len(group) for label, group in groups.items()}
    for place in missing:
        wanted[place.label] = wanted.get(place.label, 0) + 1
    first = {
        result.place.seed: result
        for result in reversed(results)
        if result.evaluations[0]["step"] == 0
    }
    base = [*_figures([result.evaluations[0] for result in first.values()], known), "0", "–"]
    table = [header, ["---"] * len(header), ["base model", *base]]
    of_p = figures_of_p(results)
    if of_p is not None:
        table.append(["base + rejection: p itself", *_exact(of_p, known)])
    for label, count in wanted.items():
        group = groups.get(label, [])
        title = label if len(group) == count else f"{label} ({len(group)} of {count} seeds)"
        table.append([title.replace("|", "\\|"), *_row([result.last for result in group], known)])
    return [f"| {' | '.join(cells)} |" for cells in table]


def _exact(of_p: dict, names: Sequence[str]) -> list[str]:
    """Of samples that the base model drew and the target accepted, and what one of them costs."""
    cells = zip(names, _figures([of_p], names), strict=True)
    cost = of_p["drawn"] / of_p["exact_samples"]
    own = ["0" if name in DISTANCES else figure for name, figure in cells]
    return [*own, f"{cost:,.0f} a sample", "–"]


def notes(results: Sequence[Result], missing: Sequence[Place]) -> list[str]:
    """What the numbers are, what the runs do not share, and which are missing."""
    seeds = sorted({result.place.seed for result in results})
    if len(seeds) > 1:
        listed = ", ".join(map(str, seeds))
        lines = [
            f"Mean ± standard deviation over {len(seeds)} seeds ({listed}) of the last evaluation "
            f"of each run."
        ]
        alone = [label for label, runs in by_label(results).items() if len(runs) == 1]
        if alone:
            lines[0] += f" Of {', '.join(alone)} there is one run: ± is its standard error."
    else:
        lines = [
            f"Last evaluation of each run, of seed {seeds[0]} alone; ± is the standard error of "
            f"the evaluation."
        ]
    differing = differing_settings(results)
    if differing:
        parts = [f"{name} {_values(values)}" for name, values in differing.items()]
        lines.append(f"Settings that the runs do not share: {'; '.join(parts)}.")
    if missing:
        listed = "; ".join(
            f"{place.title} ({place.log if place.log.is_file() else 'not begun'})"
            for place in missing
        )
        lines.append(f"**Missing**, since they are not finished: {listed}.")
    return "\n\n".join(lines).split("\n")


def _values(values: dict[str, list[str]]) -> str:
    most = max(values, key=lambda value: len(values[value]))
    parts = [f"{value} ({', '.join(labels)})" for value, labels in values.items() if value != most]
    return ", ".join([*parts, f"{most} (the others)"])


def _row(records: list[dict], names: list[str]) -> list[str]:
    if not records:
        return ["–"] * (len(names) + 2)
    samples = spread([record["samples"] for record in records])
    seconds = spread([record["seconds"] for record in records])
    drawn = f"{samples.mean:,.0f}" + (
        f" ± {samples.deviation:,.0f}" if samples.deviation > 0 else ""
    )
    took = f"{seconds.mean:.0f}" + (f" ± {seconds.deviation:.0f}" if seconds.deviation >= 0 else "")
    return [*_figures(records, names), drawn, took]


def _figures(records: list[dict], names: Sequence[str]) -> list[str]:
    """Over seeds, or of a single one with the standard error of its evaluation."""
    spreads = [spread([record.get(name, math.nan) for record in records]) for name in names]
    if len(records) == 1:
        errors = [float(records[0].get(f"{name}_std_error", math.nan)) for name in names]
        spreads = [Spread(s.mean, error) for s, error in zip(spreads, errors, strict=True)]
    return [cell(s) for s in spreads]


def cell(figure: Spread) -> str:
    """As many digits as a value of its size needs."""
    value, deviation = figure
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    digits = next(
        (digits for limit, digits in ((0.1, 4), (1, 3), (10, 2)) if abs(value) < limit), 1
    )
    return f"{value:z.{digits}f}" + (
        f" ± {deviation:.{digits}f}" if math.isfinite(deviation) else ""
    )
