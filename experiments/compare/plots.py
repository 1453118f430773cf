"""The pictures of this literature: curves against samples, alignment against diversity, what it
costs in samples and in seconds, spread of the pseudo-reward."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from fjax.runs.names import title_of
from fjax.runs.plots import STYLE, counted, label_counts, over_lines

from .results import (
    Curve,
    Result,
    by_label,
    by_samples,
    curve,
    curve_of_time,
    figures_of_p,
    spread,
)

PANELS = (
    "forward_kl",
    "reverse_kl",
    "total_variation",
    "jensen_shannon",
    "kl_to_base",
    "entropy",
    "distinct_2",
)
"""Curves after the task's headline."""

NATS = {"forward_kl", "reverse_kl", "jensen_shannon", "kl_to_base", "entropy"}

MARKERS = "osD^vPX<>ph"


def write(folder: Path, results: Sequence[Result], headlines: Sequence[str]) -> list[str]:
    """frontier.png, curves.png, cost.png and, where runs have a pseudo-reward, spread.png; returns
    their names."""
    groups, names = by_label(results), ["frontier.png", "curves.png", "cost.png"]
    of_p = figures_of_p(results) or {}
    xlabel = counted([record for result in results for record in result.steps])
    looks = {label: look(i, len(groups)) for i, label in enumerate(groups)}
    with plt.style.context(STYLE):
        _frontier(folder / names[0], groups, looks, headlines)
        _curves(folder / names[1], groups, looks, headlines, xlabel, of_p)
        _cost(folder / names[2], groups, looks, headlines, xlabel, of_p)
        if any("reward_std" in record for result in results for record in result.steps):
            names.append("spread.png")
            _spread(folder / names[3], groups, looks)
    return names


def look(i: int, count: int) -> dict:
    """Colour and marker of the i-th objective of so many, the same in every picture."""
    colour = f"C{i}" if count <= 10 else plt.get_cmap("turbo")(0.05 + 0.9 * i / (count - 1))
    return {"color": colour, "marker": MARKERS[i % len(MARKERS)]}


def _curves(path: Path, groups, looks, headlines: Sequence[str], xlabel: str, of_p: dict) -> None:
    last = [result.last for group in groups.values() for result in group]
    names = [name for name in (*headlines, *PANELS) if any(name in record for record in last)]
    columns = 3 if len(names) % 3 == 0 else 4
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.3 * columns, 2.5 * rows + 0.5), squeeze=False, sharex=True
    )
    for ax, name in zip(axes.flat, names, strict=False):
        for label, group in groups.items():
            _band(
                ax,
                curve([result.evaluations for result in group], name),
                label=label,
                ms=4,
                **looks[label],
            )
        ax.set_title(over_lines(titled(name)))
        _level(ax, of_p.get(name))
        label_counts(ax)
        ax.tick_params(labelbottom=True)  # a shared axis has them on its lowest panel alone
        if not ax.has_data():
            ax.set_yticks([])
            ax.text(
                0.5,
                0.5,
                "infinite or unknown throughout",
                ha="center",
                transform=ax.transAxes,
                color="grey",
            )
    for i, ax in enumerate(axes.flat):
        if i >= len(names):
            ax.set_axis_off()
        elif i + columns >= len(names):  # nothing below it
            ax.set_xlabel(xlabel)
    finish(figure, path)


def _cost(path: Path, groups, looks, headlines: Sequence[str], xlabel: str, of_p: dict) -> None:
    """What is wanted, and KL(p‖π), at equal samples on the left and at equal seconds on the right;
    p itself is where the lines should end."""
    names = (*headlines, "forward_kl")
    figure, axes = plt.subplots(
        len(names), 2, figsize=(9, 3 * len(names) + 0.5), squeeze=False, sharex="col", sharey="row"
    )
    for row, name in zip(axes, names, strict=True):
        for ax, along in zip(row, (curve, curve_of_time), strict=True):
            for label, group in groups.items():
                values = along([result.evaluations for result in group], name)
                _band(ax, values, label=label, ms=4, **looks[label])
            _level(ax, 0.0 if name == "forward_kl" and of_p else of_p.get(name))
            label_counts(ax)
        row[0].set_ylabel(over_lines(titled(name)))
    for ax, label in zip(axes[-1], (xlabel, "seconds"), strict=True):
        ax.set_xlabel(label)
    finish(figure, path)


def _level(ax, value: float | None) -> None:
    """What p itself has, as a dashed line; nothing where it is unknown."""
    if value is not None and math.isfinite(value):
        ax.axhline(value, color="grey", ls="--", lw=0.8, label="p itself")


def _band(ax, values: Curve, **options) -> None:
    """A line, and around it the standard deviation between seeds; nothing where it is unknown
    throughout."""
    if np.isnan(values.mean).all():
        return
    ax.plot(values.at, values.mean, lw=1.3, **options)
    low, high = values.mean - values.deviation, values.mean + values.deviation
    ax.fill_between(values.at, low, high, color=options["color"], alpha=0.2, lw=0)


def _frontier(path: Path, groups, looks, headlines: Sequence[str]) -> None:
    """How much of what is wanted, against what it costs: diversity on the left, distance from the
    base on the right."""
    rows = len(headlines)
    figure, axes = plt.subplots(
        rows, 2, figsize=(9, 3.8 * rows + 0.5), squeeze=False, sharex="col", sharey="row"
    )
    for row, headline in zip(axes, headlines, strict=True):
        for ax, cost in zip(row, ("entropy", "kl_to_base"), strict=True):
            for label, group in groups.items():
                _paths(ax, group, cost, headline, label, looks[label])
            first = [result.evaluations[0] for group in groups.values() for result in group]
            base = [
                spread([record.get(name, math.nan) for record in first]).mean
                for name in (cost, headline)
            ]
            ax.plot(*base, marker="*", ms=13, ls="", color="black", label="base model", zorder=3)
            ax.set_xlabel(titled(cost))
        row[0].set_ylabel(over_lines(titled(headline)))
    finish(figure, path)


def _paths(ax, group: Sequence[Result], x: str, y: str, label: str, style: dict) -> None:
    """A line along each run's training, and its end as a point."""
    for i, result in enumerate(group):
        points = np.array(
            [
                [float(record.get(name, math.nan)) for record in result.evaluations]
                for name in (x, y)
            ]
        )
        ax.plot(*points, color=style["color"], lw=0.9, alpha=0.4)
        ax.plot(
            *points[:, -1],
            ls="",
            ms=7,
            mec="white",
            mew=0.6,
            label=label if i == 0 else None,
            zorder=4,
            **style,
        )


def _spread(path: Path, groups, looks) -> None:
    """Spikes are what there is to see, so the band is from the lowest seed to the highest, which a
    log axis can show."""
    figure, ax = plt.subplots(figsize=(7, 4.4))
    seen = []
    for label, group in groups.items():
        at = by_samples([_smooth(result.steps, "reward_std") for result in group], "reward_std")
        samples, values = list(at), [np.array(of_seeds) for of_seeds in at.values()]
        mean = np.array([of_seeds.mean() for of_seeds in values])
        ax.plot(samples, mean, lw=1.3, color=looks[label]["color"], label=label)
        low, high = [of_seeds.min() for of_seeds in values], [of_seeds.max() for of_seeds in values]
        ax.fill_between(samples, low, high, color=looks[label]["color"], alpha=0.2, lw=0)
        seen += [value for value in mean if value > 1e-4]  # below it is rounding
    if seen and max(seen) > 10 * min(seen):
        ax.set_yscale("log")
        ax.set_ylim(bottom=min(seen) / 2)
    label_counts(ax)
    ax.set(
        title="spread of the pseudo-reward -f'(π/p)",
        xlabel="samples drawn",
        ylabel="standard deviation over a batch",
    )
    finish(figure, path)


def _smooth(records: Sequence[dict], name: str) -> list[dict]:
    """Running means over a twentieth of the run, since one batch says little about the next."""
    records = [record for record in records if name in record]  # steps that draw have none
    width = max(1, len(records) // 20)
    values = np.array([float(record.get(name, math.nan)) for record in records])
    means = [float(values[max(0, i + 1 - width) : i + 1].mean()) for i in range(len(values))]
    return [
        {"samples": record["samples"], name: mean}
        for record, mean in zip(records, means, strict=True)
    ]


def titled(name: str) -> str:
    """What a figure is called, with its unit."""
    return title_of(name) + (", nats" if name in NATS else "")


def finish(figure, path: Path) -> None:
    """One legend for all panels, below them, where it hides nothing."""
    handles = {}
    for ax in figure.axes:
        handles |= {
            label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
    for columns in range(min(len(handles), 5), 0, -1):
        options = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        legend = figure.legend(handles.values(), handles.keys(), **options)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()  # as wide as the figure: long names take fewer columns
    figure.savefig(path)
    plt.close(figure)
