"""Pictures of a run: what is drawn, and what is said where there is nothing to draw."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from fjax.runs import plots
from fjax.runs.aim import Aim
from fjax.runs.names import NAMES
from fjax.training import JsonlLogger

AIM = Aim(
    headlines=("satisfaction",),
    bound="satisfaction",
    objective="jensen_shannon",
    at_most={"forward_kl": None, "reverse_kl": None, "jensen_shannon": 0.69},
)
SAID = "infinite or unknown throughout"


def evaluation(step, **figures):
    record = {"kind": "evaluation", "step": step, "samples": 100 * step, "seconds": 1.0}
    for name, value in figures.items():
        record |= {name: value, f"{name}_std_error": 0.1, f"{name}_ess": 5.0}
    return record


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """(records of the metrics, of contexts) -> name of a picture -> its axes by their titles."""
    kept = []
    monkeypatch.setattr(plots.plt, "close", kept.append)
    monkeypatch.setitem(plots.STYLE, "savefig.dpi", 30)

    def draw(metrics, contexts=(), *, aim=AIM):
        for name, records in (("metrics", metrics), ("contexts", contexts)):
            with JsonlLogger(tmp_path / f"{name}.jsonl") as logger:
                for record in records:
                    logger.log(record)
        plots.write(tmp_path, aim)
        names = [
            n for n in ("evaluation", "training", "contexts") if (tmp_path / f"{n}.png").exists()
        ]
        return {
            name: {ax.get_title(): ax for ax in figure.axes}
            for name, figure in zip(names, kept, strict=True)
        }

    yield draw
    monkeypatch.undo()
    plt.close("all")


def test_figures_with_their_errors_and_a_gap_where_one_is_infinite(drawn):
    values = (0.1, np.inf, 0.4)
    metrics = [evaluation(i, forward_kl=x, satisfaction=0.2 * i) for i, x in enumerate(values)]
    axes = drawn(metrics)["evaluation"]
    line, before = axes["unbounded divergences from the target"].get_lines()
    assert (before.get_label(), before.get_ydata()[0]) == ("KL(p‖π) before", 0.1)
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0.1], [100, np.nan], [200, 0.4]])
    (band,) = axes["unbounded divergences from the target"].collections
    corners = {tuple(np.round(point, 6)) for point in band.get_paths()[0].vertices}
    assert {(0, -0.1), (0, 0.3)} <= corners  # two standard errors
    headline = axes["satisfaction, mean under π"]
    assert headline.get_ylim() == (0, 1.02)
    assert [line.get_label() for line in headline.get_lines()] == [
        "fresh samples", "p",
    ]  # fmt: skip
    assert [text.get_text() for text in axes["bounded divergences from the target"].texts] == [SAID]


def test_every_curve_has_a_name_and_what_is_known_of_p_and_of_limits_is_dashed(drawn):
    metrics = [
        {"kind": "target", "step": 0, "entropy": 88.0, "length": 25.0},
        {"kind": "step", "step": 1, "samples": 50, "satisfaction": 0.1},
        *(evaluation(i, jensen_shannon=0.6, entropy=80.0, length=20.0, satisfaction=0.5) for i in (0, 1)),
    ]  # fmt: skip
    axes = drawn(metrics)["evaluation"]
    levels = {
        title: [
            (line.get_label(), line.get_ydata()[0])
            for line in ax.get_lines()
            if line.get_ls() == "--"
        ]
        for title, ax in axes.items()
    }
    assert levels["satisfaction, mean under π"] == [("p", 1.0)]
    assert levels["entropy of a sample, nats"] == [("p", 88.0)]
    assert levels["tokens a sample"] == [("p", 25.0)]
    assert levels["bounded divergences from the target"] == [("the most of JS(π, p)", 0.69)]
    for ax in axes.values():
        labels = [line.get_label() for line in ax.get_lines()]
        assert not labels or [t.get_text() for t in ax.get_legend().get_texts()] == labels
        assert not any(label.startswith("_") for label in labels)


def test_a_training_without_the_figures_of_a_tuner(drawn):
    """Of a stepper of one's own."""
    step = {"kind": "step", "step": 1, "samples": 100, "grad_norm": 0.5}
    axes = drawn([evaluation(0, entropy=1.0), step], aim=Aim())["training"]
    assert axes["norm of the gradient"].get_yscale() == "log"
    assert len(axes["effective samples of π/q"].get_lines()) == 1  # nothing was clipped
    assert axes["running estimate of log Z"].texts[0].get_text() == SAID


def test_a_run_in_stages_is_drawn_by_its_steps(drawn):
    """Those that learn draw nothing: against samples their curves would stand on end."""
    draws = {"log_z": -4.0, "log_z_std_error": 0.1, "log_z_ess": 50.0}
    learns = {"grad_norm": 0.5, "reward_std": 1.0, "importance_ess": 20.0}
    figures = (1, draws), (1, learns), (1, learns), (2, draws), (2, learns)
    steps = [
        {"kind": "step", "step": n, "samples": 100, "stage": stage, **found}
        for n, (stage, found) in enumerate(figures, 1)
    ]
    axes = drawn([evaluation(0, entropy=1.0), *steps])["training"]
    norm, begins = axes["norm of the gradient"].get_lines()
    np.testing.assert_array_equal(norm.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(norm.get_ydata(), [np.nan, 0.5, 0.5, np.nan, 0.5])
    assert begins.get_xdata()[0] == 4
    assert "the objective, on held-out samples" not in axes  # there was no look


def test_looks_at_held_out_samples_are_drawn_where_there_were_some(drawn):
    steps = [
        {"kind": "step", "step": n, "samples": 100, "stage": 1, **found}
        for n, found in enumerate(({}, {"held_out": 0.5}, {}, {"held_out": 0.4}), 1)
    ]
    axes = drawn([evaluation(0, entropy=1.0), *steps])["training"]
    (line,) = axes["the objective, on held-out samples"].get_lines()
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([2, 4], [0.5, 0.4])


def test_steps_on_pairs_have_pictures_of_their_own(drawn):
    step = {"kind": "step", "step": 1, "samples": 8, "margin": 0.1, "accuracy": 0.5, "loss": 0.7}
    axes = drawn([evaluation(0, entropy=1.0), step])["training"]
    assert {"loss", "pairs in the right order", "mean log π/a"} <= axes.keys()
    assert axes["mean log π/a"].get_xlabel() == "pairs seen"


def test_contexts_before_and_after(drawn):
    contexts = [
        {"step": step, "prompt": prompt, "log_z": -1.0, "satisfaction": value}
        for step, values in ((0, (0.1, 0.3)), (5, (0.5, 0.9)))
        for prompt, value in zip("ab", values, strict=True)
    ]
    (ax,) = drawn([evaluation(0, satisfaction=0.2)], contexts)["contexts"].values()
    assert ax.collections[0].get_offsets().tolist() == [[0.1, 0.5], [0.3, 0.9]]
    assert "mean: 0.200 → 0.700" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_long_name_stays_within_its_panel(drawn):
    """Such as that of a function in a user's module; and every name of the library is one line."""
    name = "experiments.smollm2.scorers:about_a_woman"
    aim = Aim(headlines=(name,), objective="jensen_shannon")
    axes = drawn([evaluation(0, **{name: 0.2})], aim=aim)["evaluation"]
    (title,) = (title for title in axes if title.startswith("experiments"))
    assert title == "experiments.smollm2.scorers:\nabout_a_woman, mean under π"
    widths = [x.get_window_extent().width for x in (axes[title].title, axes[title])]
    assert widths[0] <= 1.15 * widths[1]  # as wide as the titles beside it
    assert all("\n" not in plots.over_lines(title) for title in NAMES.values())


def test_contexts_of_a_target_without_a_headline_have_no_picture(drawn):
    contexts = [{"step": 0, "prompt": "a", "log_z": -1.0}]
    found = drawn([evaluation(0, entropy=1.0)], contexts, aim=Aim())
    assert list(found) == ["evaluation"]
