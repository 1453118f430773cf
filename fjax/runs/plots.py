"""A run at a glance, as pictures drawn from metrics.jsonl."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from fjax.runs.aim import Aim
from fjax.runs.names import title_of
from fjax.runs.reading import by_step, of_target, read_contexts, read_metrics
from fjax.runs.rows import FEW

DRAWN = "samples drawn"
STYLE = {
    "figure.figsize": (10, 6),
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "font.size": 9,
    "savefig.dpi": 130,
}


def counted(steps: Sequence[dict]) -> str:
    """What `samples` in the records of a run are; only steps on preference pairs have a margin."""
    return "pairs seen" if any("margin" in record for record in steps) else DRAWN


def write(folder: Path, aim: Aim) -> None:
    """evaluation.png (what was reached), training.png (how it went), and with prompts contexts.png.

    Args:
        folder: of the run, which is read.
        aim: what it is after.
    """
    records, of_contexts = read_metrics(folder), read_contexts(folder)
    evaluations = list(by_step(records, "evaluation").values())
    steps = [record for record in records if record["kind"] == "step"]
    of_p = (of_target(records) or {}) | ({aim.bound: 1.0} if aim.bound else {})
    with plt.style.context(STYLE):
        _evaluation(folder / "evaluation.png", evaluations, steps, aim, of_p)
        if steps:
            _draw_of(steps)(folder / "training.png", steps)
        headline = next((name for name in aim.headlines if name in (of_contexts or [{}])[0]), "")
        if headline:
            _contexts(folder / "contexts.png", of_contexts, headline)


def _draw_of(steps: list[dict]) -> Callable[[Path, list[dict]], None]:
    """How steps of their kind are drawn."""
    if counted(steps) != DRAWN:
        return _offline_training
    return _staged_training if "stage" in steps[0] else _training


def _evaluation(
    path: Path, evaluations: list[dict], steps: list[dict], aim: Aim, of_p: dict
) -> None:
    figure, axes = plt.subplots(2, 4, figsize=(13, 6))
    _headline(axes[0, 0], evaluations, steps, aim, of_p)
    _divergences(axes[0, 1:3], evaluations, aim)
    _with_error(axes[0, 3], evaluations, "kl_to_base")
    axes[0, 3].set_title("KL from the base model, nats")
    for ax, name, title in (
        (axes[1, 0], "entropy", "entropy of a sample, nats"),
        (axes[1, 1], "length", "tokens a sample"),
    ):
        _with_error(ax, evaluations, name)
        _level(ax, of_p.get(name), "p")
        ax.set_title(title)
    for n in (1, 2, 3):
        axes[1, 2].plot(*_xy(evaluations, f"distinct_{n}"), marker=".", label=f"distinct-{n}")
    axes[1, 2].set(title="distinct n-grams / all", ylim=(0, None))
    axes[1, 3].plot(
        *_xy(evaluations, f"{aim.objective}_ess"), marker=".", label="effective samples"
    )
    _level(axes[1, 3], FEW, "too few to rely on")
    axes[1, 3].set(title="what the divergences rest on", ylim=(0, None))
    _finish(figure, axes, path, xlabel=counted(steps))


def _divergences(axes, evaluations: list[dict], aim: Aim) -> None:
    """Those without a limit, and those with one, which is drawn."""
    unbounded, bounded = axes
    for name, most in aim.at_most.items():
        line = _with_error(unbounded if most is None else bounded, evaluations, name)
        if line is not None:
            _level(bounded, most, f"the most of {title_of(name)}", color=line.get_color())
    _level(unbounded, evaluations[0].get("forward_kl"), "KL(p‖π) before")
    unbounded.set_title("unbounded divergences from the target")
    bounded.set_title("bounded divergences from the target")


def _headline(ax, evaluations: list[dict], steps: list[dict], aim: Aim, of_p: dict) -> None:
    name = next((name for name in aim.headlines if name in evaluations[-1]), None)
    if name is None:
        return
    if any(name in record for record in steps):
        label = "each step's own samples"
        ax.plot(*_xy(steps, name), lw=0.6, alpha=0.4, color="C0", label=label)
    _with_error(ax, evaluations, name, label="fresh samples")
    _level(ax, of_p.get(name), "p")
    ax.set_title(over_lines(f"{title_of(name)}, mean under π"))
    if name == aim.bound:
        ax.set_ylim(0, 1.02)


def _level(ax, value: float | None, label: str, color="grey") -> None:
    """A dashed line; nothing where it is unknown."""
    if value is not None and np.isfinite(value):
        ax.axhline(value, color=color, ls="--", lw=0.8, label=label)


def _training(path: Path, steps: list[dict]) -> None:
    figure, axes = plt.subplots(2, 3)
    _with_error(axes[0, 0], steps, "log_z", marker="")
    axes[0, 0].set_title("running estimate of log Z")
    _with_error(axes[0, 1], steps, "divergence", marker="")
    _with_error(axes[0, 1], steps, "held_out", label="on held-out samples")
    axes[0, 1].set_title("the objective, on each step's samples")
    axes[0, 2].plot(*_xy(steps, "reward_std"), lw=0.8, label="standard deviation")
    axes[0, 2].set_title("spread of the pseudo-reward -f'(π/p)")
    axes[1, 0].plot(*_xy(steps, "grad_norm"), lw=0.8, label="norm")
    if any(record.get("grad_norm", 0) > 0 for record in steps):
        axes[1, 0].set_yscale("log")
    axes[1, 0].set_title("norm of the gradient")
    axes[1, 1].plot(*_xy(steps, "divergence_ess"), lw=0.8, label="effective samples")
    axes[1, 1].set_title("effective samples of the divergence")
    axes[1, 2].plot(*_xy(steps, "importance_ess"), lw=0.8, label="effective samples")
    if any(record.get("clipped_fraction") for record in steps):
        samples = steps[-1]["samples"] / steps[-1]["step"]
        x, y = _xy(steps, "clipped_fraction")
        axes[1, 2].plot(x, y * samples, lw=0.8, label="samples with clipped f'")
    axes[1, 2].set(title="effective samples of π/q", ylim=(0, None))
    _finish(figure, axes, path)


def _staged_training(path: Path, steps: list[dict]) -> None:
    """Of steps that draw or learn; each stage begins at a dashed line."""
    panels = {
        "log_z": ("estimate of log Z, of all samples so far", "log Z"),
        "log_z_ess": ("what is known of p", "effective samples so far"),
        "reward_std": ("spread of the pseudo-reward -f'(π/p)", "standard deviation"),
        "grad_norm": ("norm of the gradient", "norm"),
        "importance_ess": ("effective samples of π/q", "of a minibatch"),
        "held_out": ("the objective, on held-out samples", "held-out samples"),
    }
    by_steps = [record | {"samples": record["step"]} for record in steps]
    begun = [b["step"] for a, b in pairwise(steps) if a["stage"] != b["stage"]]
    figure, axes = plt.subplots(2, 3)
    for ax, (name, (title, label)) in zip(axes.flat, panels.items(), strict=True):
        if not any(name in record for record in steps):
            ax.set_axis_off()  # nothing was held out, or there is a Z for each prompt
            continue
        looks = name == "held_out"
        found = [record for record in by_steps if name in record] if looks else by_steps
        _with_error(ax, found, name, label=label, marker="." if looks else "")
        ax.set_title(title)
        for step in begun:
            ax.axvline(step, color="grey", ls="--", lw=0.8)
        if name == "grad_norm" and any(record.get(name, 0) > 0 for record in steps):
            ax.set_yscale("log")
    _finish(figure, axes, path, xlabel="step")


def _offline_training(path: Path, steps: list[dict]) -> None:
    """Of steps on preference pairs."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 6))
    panels = {
        "loss": "loss",
        "accuracy": "pairs in the right order",
        "grad_norm": "norm of the gradient",
    }
    for ax, (name, title) in zip((axes[0, 0], axes[0, 1], axes[1, 0]), panels.items(), strict=True):
        ax.plot(*_xy(steps, name), lw=0.8, label=title)
        ax.set_title(title)
    for name, label in (
        ("chosen_log_ratio", "of the chosen"),
        ("rejected_log_ratio", "of the rejected"),
    ):
        axes[1, 1].plot(*_xy(steps, name), lw=0.8, label=label)
    axes[1, 1].set_title("mean log π/a")
    _finish(figure, axes, path, xlabel=counted(steps))


def _contexts(path: Path, records: list[dict], headline: str) -> None:
    figure, ax = plt.subplots(figsize=(5, 5))
    per_context(ax, records, headline, label="a prompt")
    ax.set(
        title=over_lines(f"{headline} of unseen prompts"),
        xlabel="of the base model",
        ylabel="of the aligned model",
    )
    figure.savefig(path)
    plt.close(figure)


def per_context(ax, records: list[dict], headline: str, *, label: str, color: str = "C0") -> None:
    """The mean of each context, after against before; and the mean over contexts.

    It is above the diagonal where it has risen.
    """
    first, last = (
        {r["prompt"]: r[headline] for r in records if r["step"] == end}
        for end in (0, records[-1]["step"])
    )
    before, after = (np.array([part[prompt] for prompt in first]) for part in (first, last))
    ax.plot(
        [min(before.min(), 0), max(before.max(), 0)],
        [min(before.min(), 0), max(before.max(), 0)],
        color="grey",
        lw=0.8,
    )
    ax.scatter(before, after, s=10, alpha=0.5, lw=0, color=color, label=label)
    mean = f"mean: {before.mean():.3f} → {after.mean():.3f}"
    ax.plot(
        before.mean(), after.mean(), marker="X", ms=9, ls="", color=color, mec="black", label=mean
    )
    ax.legend(frameon=False)


def _xy(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    y = np.array([float(r.get(name, np.nan)) for r in records])
    return np.array([r["samples"] for r in records]), np.where(np.isfinite(y), y, np.nan)


def _with_error(ax, records: list[dict], name: str, label: str | None = None, marker: str = "."):
    """A line with a band of two standard errors, which is returned.

    None, and nothing drawn, where the figure is infinite or unknown.
    """
    x, y = _xy(records, name)
    if np.isnan(y).all():
        return None
    _, error = _xy(records, f"{name}_std_error")
    (line,) = ax.plot(x, y, marker=marker, lw=1.2, label=label or title_of(name))
    ax.fill_between(x, y - 2 * error, y + 2 * error, color=line.get_color(), alpha=0.2, lw=0)
    return line


def over_lines(name: str, most: int = 34) -> str:
    """A name that is about as wide as a panel at most: of a user's own function it may be long.

    >>> over_lines("my_project.scorers:about_a_woman, mean under π").splitlines()
    ['my_project.scorers:about_a_woman,', 'mean under π']
    """
    first, *others = re.split(r"(?<=[ .:])", name)
    lines = [first]
    for part in others:
        if len(lines[-1] + part) > most:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def label_counts(ax) -> None:
    """150k for 150000 along the x-axis, so that labels do not run into one another."""
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _finish(figure, axes, path: Path, *, xlabel: str = DRAWN) -> None:
    for ax in axes.flat:
        label_counts(ax)
        if ax.axison and not ax.has_data():
            ax.text(
                0.5,
                0.5,
                "infinite or unknown throughout",
                ha="center",
                transform=ax.transAxes,
                color="grey",
            )
        elif any(not line.get_label().startswith("_") for line in ax.get_lines()):
            ax.legend(frameon=False)
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    figure.savefig(path)
    plt.close(figure)
