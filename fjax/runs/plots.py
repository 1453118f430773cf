"""A run at a glance, as pictures drawn from metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from fjax.runs.folder import by_step, read_contexts, read_metrics
from fjax.runs.names import title_of

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


def write(folder: Path, headline: str, *, bounded: bool) -> None:
    """evaluation.png (what was reached), training.png (how it went), and with prompts contexts.png.

    Args:
        folder: of the run, which is read.
        headline: the feature that is shown first; "" shows none.
        bounded: whether its mean is between 0 and 1.
    """
    records, of_contexts = read_metrics(folder), read_contexts(folder)
    evaluations = list(by_step(records, "evaluation").values())
    steps = [record for record in records if record["kind"] == "step"]
    with plt.style.context(STYLE):
        _evaluation(folder / "evaluation.png", evaluations, steps, headline, bounded=bounded)
        if steps:
            draw = _training if counted(steps) == DRAWN else _offline_training
            draw(folder / "training.png", steps)
        if of_contexts and headline:
            _contexts(folder / "contexts.png", of_contexts, headline)


def _evaluation(
    path: Path, evaluations: list[dict], steps: list[dict], headline: str, *, bounded: bool
) -> None:
    figure, axes = plt.subplots(2, 3)
    if headline:
        label = "each step's own samples"
        axes[0, 0].plot(*_xy(steps, headline), lw=0.6, alpha=0.4, color="C0", label=label)
        _with_error(axes[0, 0], evaluations, headline, label="fresh samples")
        axes[0, 0].set_title(f"{headline}, mean under π")
    if bounded:
        axes[0, 0].set_ylim(0, 1.02)
    for name in ("forward_kl", "reverse_kl"):
        _with_error(axes[0, 1], evaluations, name)
    axes[0, 1].set_title("divergence from the target, nats")
    for name in ("total_variation", "jensen_shannon"):
        _with_error(axes[0, 2], evaluations, name)
    axes[0, 2].set_title("bounded divergences")
    _with_error(axes[1, 0], evaluations, "kl_to_base")
    axes[1, 0].set_title("KL from the base model, nats")
    _with_error(axes[1, 1], evaluations, "entropy")
    axes[1, 1].set_title("entropy of a sample, nats")
    for n in (1, 2, 3):
        axes[1, 2].plot(*_xy(evaluations, f"distinct_{n}"), marker=".", label=f"distinct-{n}")
    axes[1, 2].set(title="distinct n-grams / all", ylim=(0, None))
    _finish(figure, axes, path, xlabel=counted(steps))


def _training(path: Path, steps: list[dict]) -> None:
    figure, axes = plt.subplots(2, 3)
    _with_error(axes[0, 0], steps, "log_z", marker="")
    axes[0, 0].set_title("running estimate of log Z")
    _with_error(axes[0, 1], steps, "divergence", marker="")
    axes[0, 1].set_title("the objective, on each step's samples")
    axes[0, 2].plot(*_xy(steps, "reward_std"), lw=0.8)
    axes[0, 2].set_title("spread of the pseudo-reward -f'(π/p)")
    axes[1, 0].plot(*_xy(steps, "grad_norm"), lw=0.8)
    if any(record.get("grad_norm", 0) > 0 for record in steps):
        axes[1, 0].set_yscale("log")
    axes[1, 0].set_title("norm of the gradient")
    axes[1, 1].plot(*_xy(steps, "divergence_ess"), lw=0.8)
    axes[1, 1].set_title("effective samples of the divergence")
    axes[1, 2].plot(*_xy(steps, "importance_ess"), lw=0.8, label="effective samples")
    if any(record.get("clipped_fraction") for record in steps):
        samples = steps[-1]["samples"] / steps[-1]["step"]
        x, y = _xy(steps, "clipped_fraction")
        axes[1, 2].plot(x, y * samples, lw=0.8, label="samples with clipped f'")
    axes[1, 2].set(title="effective samples of π/q", ylim=(0, None))
    _finish(figure, axes, path)


def _offline_training(path: Path, steps: list[dict]) -> None:
    """Of steps on preference pairs."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 6))
    panels = {
        "loss": "loss",
        "accuracy": "pairs in the right order",
        "grad_norm": "norm of the gradient",
    }
    for ax, (name, title) in zip((axes[0, 0], axes[0, 1], axes[1, 0]), panels.items(), strict=True):
        ax.plot(*_xy(steps, name), lw=0.8)
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
        title=f"{headline} of unseen prompts",
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


def _with_error(
    ax, records: list[dict], name: str, label: str | None = None, marker: str = "."
) -> None:
    """A line with a band of two standard errors.

    Nothing where the figure is infinite or unknown.
    """
    x, y = _xy(records, name)
    if np.isnan(y).all():
        return
    _, error = _xy(records, f"{name}_std_error")
    (line,) = ax.plot(x, y, marker=marker, lw=1.2, label=label or title_of(name))
    ax.fill_between(x, y - 2 * error, y + 2 * error, color=line.get_color(), alpha=0.2, lw=0)


def label_counts(ax) -> None:
    """150k for 150000 along the x-axis, so that labels do not run into one another."""
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _finish(figure, axes, path: Path, *, xlabel: str = DRAWN) -> None:
    for ax in axes.flat:
        label_counts(ax)
        if not ax.has_data():
            ax.text(
                0.5,
                0.5,
                "infinite or unknown throughout",
                ha="center",
                transform=ax.transAxes,
                color="grey",
            )
        elif len(ax.get_lines()) > 1:
            ax.legend(frameon=False)
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    figure.savefig(path)
    plt.close(figure)
