"""Comparisons: what is run and what is not, numbers, pictures. Most runs are made up."""

import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.compare import plan, plots, processes, results, table
from experiments.compare.__main__ import main
from experiments.compare.config import Config
from experiments.compare.objectives import parse_objective, parse_objectives
from experiments.compare.plan import Place, Plan, is_complete, make_plans
from experiments.compare.run import main as make_comparison
from experiments.compare.run import report as write_report
from experiments.lexical_constraint.__main__ import main as lexical_constraint
from experiments.tasks import TASKS
from fjax.divergences import names
from fjax.runs import RunError
from fjax.runs.names import title_of
from fjax.training import JsonlLogger, read_jsonl
from tests import pictures

from .commands import SMALL, run

ROOT = Path(__file__).parents[2]
TASK = ("--task", "lexical_constraint")
ARGUMENTS = tuple(map(str, ("--word", "w9", *SMALL, "--steps", 2)))


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(processes, "POLL", 0.02)
    return lambda *arguments: run(monkeypatch, main, *arguments)


def error_of(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def write_run(
    folder: Path,
    config: dict,
    *,
    last: dict,
    steps: int = 2,
    finished: bool = True,
    of_steps: str = "reward_std",
) -> None:
    """What a run leaves behind, as far as a comparison looks at it."""
    (folder / "model").mkdir(parents=True) if finished else folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    first = {name: 0.5 * value for name, value in last.items()}
    with JsonlLogger(folder / "metrics.jsonl") as logger:
        for step in range(0, steps + 1, 2):
            figures = first if step == 0 else last
            errors = {f"{name}_std_error": 0.01 for name in figures}
            logger.log(
                {"kind": "evaluation", "step": step, "samples": 16 * step, "seconds": 5.0 * step}
                | figures
                | errors
            )
            for taken in range(step + 1, min(step + 2, steps) + 1):
                logger.log(
                    {"kind": "step", "step": taken, "samples": 16 * taken, of_steps: 1.0 + taken}
                )


def planned(
    folder: Path, *objectives: str, seeds: tuple[int, ...] = (0, 1), more: tuple[str, ...] = ()
) -> list[Plan]:
    return make_plans(
        Config("lexical_constraint", objectives, seeds, folder=folder, arguments=ARGUMENTS + more),
        folder,
    )


def figures_of(value: float) -> dict:
    return {
        "satisfaction": value,
        "kl_to_base": 2 * value,
        "entropy": 40.0,
        "reverse_kl": float("inf"),
        "distinct_2": 0.5,
    }


# Objectives


@pytest.mark.parametrize(
    ("text", "label", "flags", "file_name"),
    [
        ("jensen_shannon", "jensen_shannon", "--divergence jensen_shannon", "jensen_shannon"),
        ("alpha=0.5", "alpha=0.5", "--divergence alpha=0.5", "alpha-0.5"),
        ("alpha=-1", "alpha=-1", "--divergence alpha=-1", "alpha--1"),
        ("rloo", "rloo", "--algorithm rloo --divergence reverse_kl", "rloo"),
        (
            "filter_sft",
            "filter_sft",
            "--algorithm filter_sft --divergence forward_kl",
            "filter_sft",
        ),
        (
            "reverse_kl, f' in [-8, 8]: --clip -8 8",
            "reverse_kl, f' in [-8, 8]",
            "--clip -8 8",
            "reverse_kl-f-in--8-8",
        ),
        ("a reward: --reward 'my module:f'", "a reward", "--reward|my module:f", "a-reward"),
    ],
)
def test_an_objective_is_flags_of_the_task(text, label, flags, file_name):
    objective = parse_objective(text)
    assert objective.label == label
    assert list(objective.flags) == (flags.split("|") if "|" in flags else flags.split())
    assert objective.file_name == file_name


@pytest.mark.parametrize("name", names())
def test_every_divergence_of_the_library_is_an_objective(name):
    assert parse_objective(name).flags == ("--divergence", name)


BAD = [
    (
        {"objectives": ("forward_lk",)},
        '--objectives are a divergence, rloo, ppo, filter_sft, or "label: --flag value" with flags of the '
        "task; got 'forward_lk'. There is no divergence 'forward_lk'. There are ",
    ),
    ({"objectives": ("alpha",)}, "'alpha' lacks its parameter. It is written alpha=0.5"),
    ({"objectives": ("alpha=inf",)}, "It is written alpha=0.5"),
    ({"objectives": ("clipped:",)}, "\"label: --flag value --flag value\"; got 'clipped:'"),
    ({"objectives": ("clipped: 8",)}, "got 'clipped: 8'"),
    ({"objectives": ("odd: --word 'x",)}, "has flags that cannot be read: No closing quotation"),
    ({"objectives": ("ppo", "ppo")}, "'ppo' and 'ppo' would share a folder"),
    (
        {"objectives": ("a b: --clip -8 8", "a-b: --clip -4 4")},
        "'a b' and 'a-b' would share a folder",
    ),
    ({}, "Name what to compare with --objectives"),
    ({"objectives": ("ppo",), "seeds": (1, 1)}, "each once; got 1 1"),
    ({"objectives": ("ppo",), "jobs": 0}, "--jobs must be at least 1"),
    (
        {"objectives": ("ppo",), "arguments": ("--seed", "3")},
        "--seed is given to each run by the comparison",
    ),
    (
        {"objectives": ("x: --run_folder=here",)},
        "--run_folder=here is given to each run by the comparison",
    ),
    # What the task itself would refuse is found out before the first run.
    (
        {"objectives": ("x: --clpi -8 8",)},
        "lexical_constraint refuses the objective 'x' for the reason above",
    ),
    (
        {"objectives": ("ppo",), "arguments": ("--clip", "-8", "8")},
        "refuses the objective 'ppo' for the reason above",
    ),
    (
        {"only_report": True},
        "There is no comparison runs/compare/lexical_constraint-* to report on",
    ),
    ({"runs": (Path("nowhere"),)}, "nowhere is no run folder"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message[-40:] for _, message in BAD])
def test_bad_input_is_named_before_any_run(monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.compare.run.run_all", None)
    with pytest.raises((ValueError, RunError)) as error:
        make_comparison(Config("lexical_constraint", **options))
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_command_says_it_in_a_sentence(compare, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (("--objectives", "forward_lk"), "There is no divergence 'forward_lk'"),
        (("--objectives", "ppo", "--", "--clip", "-8", "8"), "refuses the objective 'ppo'"),
        (("--runs", "nowhere"), "nowhere is no run folder"),
    ):
        assert compare(*TASK, *arguments) == 2
        assert message in error_of(capsys)
    assert compare("--task", "lexical") == 2
    shown = error_of(capsys)
    assert all(task.name in shown for task in TASKS)


# What is run, what is resumed, what is left alone


def test_every_objective_with_every_seed_seed_by_seed(tmp_path):
    plans = planned(tmp_path, "jensen_shannon", "alpha=0.5")
    assert [p.place.folder.name for p in plans] == [
        "jensen_shannon-seed0", "alpha-0.5-seed0", "jensen_shannon-seed1", "alpha-0.5-seed1",
    ]  # fmt: skip
    assert plans[3].command == [
        sys.executable, "-m", "experiments.lexical_constraint", *ARGUMENTS, "--divergence", "alpha=0.5",
        "--seed", "1", "--run-folder", str(tmp_path / "alpha-0.5-seed1"),
    ]  # fmt: skip
    assert plans[3].config["divergence"] == "alpha=0.5"
    assert plans[3].config["seed"] == 1
    assert plans[3].steps == 2


def test_steps_of_stages_are_their_own(tmp_path):
    """Whatever --steps says: a run that took more than that is neither refused nor run again."""
    staged, filtering = planned(
        tmp_path, "staged: --stages forward_kl:64:20 jensen_shannon:32:5", "filter_sft", seeds=(0,)
    )
    assert (staged.steps, filtering.steps) == (4 + 4 + 2 + 1, 2 + 1)
    write_run(staged.place.folder, staged.config, last=figures_of(0.5), steps=10)
    assert planned(tmp_path, "staged: --stages forward_kl:64:20 jensen_shannon:32:5", seeds=(0,))


def test_what_is_complete_is_not_run_again(tmp_path):
    (fresh, *_), done = planned(tmp_path, "ppo"), figures_of(0.5)
    assert not is_complete(fresh)
    # stopped while the last evaluation was made
    write_run(fresh.place.folder, fresh.config, last=done, finished=False)
    assert not is_complete(fresh)
    (fresh.place.folder / "model").mkdir()
    assert is_complete(fresh)
    longer, *_ = planned(tmp_path, "ppo", more=("--steps", "4"))
    assert not is_complete(longer)
    with JsonlLogger(longer.place.folder / "metrics.jsonl") as logger:
        logger.log({"kind": "evaluation", "step": 4, "samples": 64, "seconds": 9.0})
    assert is_complete(longer)  # although config.json is that of the first two steps


def test_a_run_that_stopped_early_is_complete_by_the_same_rules_alone(tmp_path):
    patient, *_ = planned(tmp_path, "ppo", more=("--steps", "50", "--patience", "1"))
    write_run(patient.place.folder, patient.config, last=figures_of(0.5), steps=4)
    assert is_complete(patient)
    moved = patient._replace(config=patient.config | {"corpora": "elsewhere"})
    assert is_complete(moved)  # another clone of the repository stops no run
    more, *_ = planned(tmp_path, "ppo", more=("--steps", "50", "--patience", "2"))
    assert not is_complete(more)


def test_another_run_in_the_folder_is_refused(compare, tmp_path, capsys):
    here, *_ = planned(tmp_path, "ppo")
    write_run(here.place.folder, here.config | {"word": "w8"}, last=figures_of(0.5))
    arguments = (*TASK, "--objectives", "ppo", "--seeds", 0, "--folder", tmp_path, "--", *ARGUMENTS)
    assert compare(*arguments) == 2
    assert "(word: 'w8' there, 'w9' now)" in error_of(capsys)
    (here.place.folder / "config.json").write_text(json.dumps(here.config))
    assert compare(*arguments, "--steps", 1) == 2
    assert "has taken more than --steps 1 already" in error_of(capsys)
    (here.place.folder / "config.json").unlink()
    assert compare(*arguments) == 2
    assert "holds something else than a run" in error_of(capsys)


def test_the_folder_is_that_of_the_same_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def folder(*arguments: str, objectives=("ppo",), report=False) -> str:
        chosen = Config(
            "conditional", objectives, only_report=report, runs=(Path(),), arguments=arguments
        )
        return str(plan.default_folder(chosen))

    assert folder("--beta", "1") == "runs/compare/conditional-0"
    for i, beta in enumerate("12"):
        path = Path(f"runs/compare/conditional-{i}")
        path.mkdir(parents=True)
        (path / "compare.json").write_text(json.dumps({"arguments": ["--beta", beta]}))
    assert folder("--beta", "1") == "runs/compare/conditional-0"
    assert folder("--beta", "2", objectives=("rloo", "ppo")) == "runs/compare/conditional-1"
    assert folder("--beta", "3") == "runs/compare/conditional-2"
    assert folder(report=True) == "runs/compare/conditional-1"
    # A report on runs made elsewhere takes the place of no comparison's own.
    assert folder("--beta", "1", objectives=()) == "runs/compare/conditional-2"


def test_the_current_step_is_read_from_the_end(tmp_path):
    assert plan.current_step(tmp_path) == 0
    line = '{"kind": "step", "step": %d, "samples": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(
        "".join(line % i for i in range(3000)) + '{"kind": "step", "st'
    )
    assert plan.current_step(tmp_path) == 2999


# The table


def result(
    label: str, seed: int, last: dict, config: dict | None = None, samples: int = 32
) -> results.Result:
    errors = {f"{name}_std_error": 0.01 for name in last}
    first = (
        {"step": 0, "samples": 0, "seconds": 3.0} | dict.fromkeys(last, 0.01 * (seed + 1)) | errors
    )
    end = {"step": 2, "samples": samples, "seconds": 10.0 + 2 * seed} | last | errors
    return results.Result(
        Place(label, seed, Path(label)),
        config or {"divergence": label, "seed": seed},
        [first, end],
        [],
    )


def test_the_numbers_of_the_table():
    infinite, unknown = float("inf"), float("nan")
    runs = [
        result(
            "js",
            0,
            {"satisfaction": 0.7, "kl_to_base": 12.0, "reverse_kl": infinite, "log_z": -4.0},
            samples=2000,
        ),
        result(
            "js",
            1,
            {"satisfaction": 0.8, "kl_to_base": 10.0, "reverse_kl": 2.0, "log_z": unknown},
            samples=2100,
        ),
        result(
            "kl",
            0,
            {"satisfaction": 0.05, "kl_to_base": 1.5, "reverse_kl": 3.0, "log_z": -infinite},
        ),
    ]
    missing = [Place("kl", 1, Path("kl-seed1")), Place("tv|x", 0, Path("tv-seed0"))]
    names = ("satisfaction", "kl_to_base", "reverse_kl", "log_z", "alpha")  # no run has the last
    # sd of 0.7, 0.8 is 0.1 / √2 = 0.0707; of 12, 10 it is √2; of 2000, 2100 it is 70.7; of 10 s, 12
    # s it is √2.
    assert table.rows(runs, missing, names) == [
        "|  | satisfaction | KL(π‖a) | KL(π‖p) | log Z | samples drawn | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| base model | 0.0150 ± 0.0071 | 0.0150 ± 0.0071 | 0.0150 ± 0.0071 | 0.0150 ± 0.0071 | 0 "
        "| – |",
        "| js | 0.750 ± 0.071 | 11.0 ± 1.4 | ∞ | – | 2,050 ± 71 | 11 ± 1 |",
        "| kl (1 of 2 seeds) | 0.0500 ± 0.0100 | 1.50 ± 0.01 | 3.00 ± 0.01 | -∞ | 32 | 10 |",
        "| tv\\|x (0 of 1 seeds) | – | – | – | – | – | – |",
    ]


def test_the_notes_say_what_the_numbers_are_and_what_is_missing(tmp_path):
    configs = [
        {"divergence": "x", "seed": 0, "clip": clip, "learning_rate": 0.1, "steps": 5}
        for clip in (None, [-8, 8])
    ]
    runs = [
        result("a", 0, {}, configs[0]),
        result("b", 0, {}, configs[0]),
        result("clipped", 0, {}, configs[1]),
    ]
    text = "\n".join(table.notes(runs, [Place("c", 1, tmp_path / "c-seed1")]))
    assert "of seed 0 alone; ± is the standard error" in text
    assert "do not share: clip [-8, 8] (clipped), null (the others)." in text
    assert "**Missing**, since they are not finished: c, seed 1 (not begun)." in text
    text = "\n".join(table.notes([result("a", 0, {}), result("a", 3, {})], []))
    assert (
        text == "Mean ± standard deviation over 2 seeds (0, 3) of the last evaluation of each run."
    )
    several = [result("a", 0, {}), result("a", 3, {}), result("b", 0, {}), result("c", 0, {})]
    text = "\n".join(table.notes(several, []))
    assert text.endswith(" Of b, c there is one run: ± is its standard error.")


def test_curves_meet_where_samples_do():
    runs = [
        [
            {"samples": 0, "entropy": 4.0},
            {"samples": 10, "entropy": 1.0},
            {"samples": 20, "entropy": float("inf")},
        ],
        [
            {"samples": 0, "entropy": 6.0},
            {"samples": 10, "entropy": 3.0},
            {"samples": 30, "entropy": 7.0},
        ],
    ]
    found = results.curve(runs, "entropy")
    np.testing.assert_array_equal(found.at, [0, 10, 20, 30])
    np.testing.assert_allclose(found.mean, [5.0, 2.0, np.nan, 7.0])
    np.testing.assert_allclose(found.deviation, [2**0.5, 2**0.5, np.nan, np.nan])


def test_of_stages_the_last_figure_at_so_many_samples_counts():
    """They learn many times from what was drawn; against seconds every step is there."""
    records = [
        {"step": step, "samples": samples, "seconds": 10.0 * step, "entropy": entropy}
        for step, samples, entropy in ((0, 0, 4.0), (2, 64, 3.0), (4, 64, 1.0))
    ]
    slower = [r | {"seconds": 12.0 * r["step"], "entropy": r["entropy"] + 2} for r in records]
    found = results.curve([records, slower], "entropy")
    np.testing.assert_array_equal(found.at, [0, 64])
    np.testing.assert_array_equal(found.mean, [5.0, 2.0])
    found = results.curve_of_time([records, slower], "entropy")
    np.testing.assert_array_equal(found.at, [0.0, 22.0, 44.0])
    np.testing.assert_array_equal(found.mean, [5.0, 4.0, 2.0])


def test_rejection_from_the_base_has_a_row_with_its_cost():
    figures = {"satisfaction": 0.5, "entropy": 90.0, "forward_kl": 2.0, "self_bleu": 0.2}
    of_p = {
        "kind": "target", "satisfaction": 1.0, "satisfaction_std_error": 0.0, "entropy": 88.7,
        "entropy_std_error": 1.3, "drawn": 20_480, "exact_samples": 256,
    }  # fmt: skip
    filtered, other = (
        result(label, 0, figures)._replace(of_p=of_p) for label in ("filter_sft", "js")
    )
    older = result("older", 0, figures)
    table_of = lambda *runs: table.rows(runs, [], figures)  # noqa: E731
    assert table_of(filtered, other, older)[3] == (
        "| base + rejection: p itself | 1.00 ± 0.00 | 88.7 ± 1.3 | 0 | – | 80 a sample | – |"
    )
    assert table_of(filtered, older)[4].startswith("| filter_sft | 0.500 ± 0.010 |")
    elsewhere = other._replace(of_p=of_p | {"entropy": 70.0})  # of another target
    assert table_of(filtered, elsewhere)[3].startswith("| filter_sft |")
    assert table_of(older)[3].startswith("| older |")


def test_the_later_of_two_records_of_a_step_counts(tmp_path):
    folder = tmp_path / "a-seed0"
    write_run(folder, {"divergence": "forward_kl", "seed": 0}, last=figures_of(0.5))
    with JsonlLogger(folder / "metrics.jsonl") as logger:
        logger.log(
            {"kind": "evaluation", "step": 2, "samples": 32, "seconds": 9.0, "satisfaction": 0.9}
        )
    read = results.read_result(Place("a", 0, folder))
    assert [record["satisfaction"] for record in read.evaluations] == [0.25, 0.9]
    assert [record["step"] for record in read.steps] == [1, 2]


# Reports


def test_looks_are_distinct_and_legends_name_every_objective():
    for count in (3, 10, 14):
        assert len({str(plots.look(i, count)) for i in range(count)}) == count


def test_a_legend_of_many_long_names_stays_within_the_picture(tmp_path, monkeypatch):
    pictures.small(monkeypatch, empty=False)
    figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for i in range(10):
        ax.plot([0, 1], label=f"one pass, objective {i}")
    monkeypatch.setattr(plots.plt, "close", lambda _: None)
    plots.finish(figure, tmp_path / "picture.png")
    box = figure.legends[0].get_window_extent()
    assert len(figure.legends) == 1
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_runs_made_elsewhere_are_labelled_and_reported(compare, monkeypatch, tmp_path, capsys):
    config = {"divergence": "reverse_kl", "clip": [-8, 8], "seed": 0, "algorithm": "fdpg"}
    write_run(tmp_path / "great-0", config, last=figures_of(0.8))
    write_run(tmp_path / "my js-seed1", config | {"seed": 1}, last=figures_of(0.6))
    folders = [tmp_path / "great-0", tmp_path / "my js-seed1"]
    monkeypatch.setattr("experiments.compare.plots.write", lambda *_: ["curves.png"])
    assert (
        compare(
            *TASK,
            "--runs",
            *folders,
            "--folder",
            tmp_path / "out",
            "--figures",
            "satisfaction",
            "entrpy",
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "No run has the figures entrpy; they are left out. There are satisfaction, kl_to_base"
        in printed
    )
    assert "| reverse_kl, f' clipped to [-8, 8] | 0.800 ± 0.010 | 32 | 10 |" in printed
    assert "| my js | 0.600 ± 0.010 | 32 | 10 |" in printed
    write_run(tmp_path / "great-1", config, last=figures_of(0.8), finished=False)
    assert (
        compare(*TASK, "--runs", folders[0], tmp_path / "great-1", "--folder", tmp_path / "out")
        == 2
    )
    assert "great-0 and" in (shown := error_of(capsys))
    assert "are both reverse_kl, f' clipped to [-8, 8], seed 0. Rename one" in shown


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"algorithm": "ppo", "divergence": "reverse_kl"}, "ppo"),
        ({"algorithm": "fdpg", "divergence": "alpha=0.5", "clip": None}, "alpha=0.5"),
        (
            {"divergence": "reverse_kl", "clip": [-8, 8], "proposal": "adaptive"},
            "reverse_kl, f' clipped to [-8, 8], adaptive proposal",
        ),
        # Of runs that were made before α was a part of the name, and before there were algorithms.
        ({"algorithm": "fdpg", "divergence": "alpha", "alpha": 0.5, "clip": None}, "alpha=0.5"),
        ({"algorithm": "fdpg", "divergence": "jensen_shannon", "alpha": 0.5}, "jensen_shannon"),
        ({"divergence": "forward_kl"}, "forward_kl"),
    ],
)
def test_labels_of_configurations(config, label):
    assert results.label_of(config) == label


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_table_begins_with_the_headlines_of_the_task(task):
    last = dict.fromkeys((*table.REPORTED, *task.headlines), 0.4)
    header, *_ = table.rows([result("a", 0, last)], [], (*task.headlines, *table.REPORTED))
    assert header.startswith(" | ".join(["| ", *map(title_of, task.headlines), "KL(π‖a) |"]))


# Two headlines; and steps on pairs, which have a margin and no pseudo-reward.
@pytest.mark.command
@pytest.mark.parametrize("name", ["sentiment_reward", "preference_pairs"])
def test_a_report_has_its_pictures(name, tmp_path, capsys, monkeypatch):
    pictures.small(monkeypatch, empty=False)
    (headlines,) = (task.headlines for task in TASKS if task.name == name)
    figures = dict.fromkeys(headlines, 0.4) | dict.fromkeys(plots.PANELS, 1.0)
    offline = name == "preference_pairs"
    places, options = [], {"steps": 4, "of_steps": "margin" if offline else "reward_std"}
    for label in ("a", "b"):
        for seed in (0, 1):
            places.append(Place(label, seed, tmp_path / f"{label}-seed{seed}"))
            write_run(
                places[-1].folder,
                {"seed": seed},
                last=figures | {"reverse_kl": float("inf")},
                **options,
            )
    assert write_report(Config(name, only_report=True), tmp_path / "out", places, []) == 0
    written = {"curves.png", "frontier.png", "cost.png"} | (set() if offline else {"spread.png"})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.md", *written}
    text = (tmp_path / "out" / "table.md").read_text()
    assert set(re.findall(r"\((.*png)\)", text)) == written
    assert ("| pairs seen |" in text) == offline
    for path in (tmp_path / "out").glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert "| a | 0.400 ± 0.000 |" in capsys.readouterr().out


# The whole command


def make_here(monkeypatch):
    """Runs in this process, by the arguments that processes of their own would have."""

    def run_here(plans, jobs):
        for one in plans:
            interpreter, _, module, *arguments = one.command
            assert (interpreter, module) == (sys.executable, "experiments.lexical_constraint")
            one.place.log.write_text("")
            assert run(monkeypatch, lexical_constraint, *arguments) == 0

    monkeypatch.setattr("experiments.compare.run.run_all", run_here)


def test_a_comparison_makes_what_is_left_and_reports_on_all(compare, monkeypatch, tmp_path, capsys):
    """Two objectives with two seeds, of which three runs are there already."""
    monkeypatch.setattr("experiments.compare.plots.write", lambda *_: ["curves.png"])
    make_here(monkeypatch)
    *there, left = planned(tmp_path, "forward_kl", "js: --divergence jensen_shannon")
    for i, one in enumerate(there):
        write_run(one.place.folder, one.config, last=figures_of(0.5 + 0.1 * i))
    before = {one.place.folder: (one.place.folder / "metrics.jsonl").read_bytes() for one in there}
    objectives = ("--objectives", "forward_kl", "js: --divergence jensen_shannon", "--seeds", 0, 1)
    command = (*TASK, *objectives, "--folder", tmp_path, "--", *ARGUMENTS)
    assert compare(*command) == 0
    printed = capsys.readouterr().out
    assert "1 of 4 runs are to be made, 1 at a time" in printed
    assert {folder: (folder / "metrics.jsonl").read_bytes() for folder in before} == before
    last = read_jsonl(left.place.folder / "metrics.jsonl")[-1]
    assert (last["step"], last["samples"]) == (2, 32)
    # described by --eval-samples of the policy, as any other objective
    assert last["entropy_ess"] == 32
    text = (tmp_path / "table.md").read_text()
    mean, deviation = (
        np.mean([0.6, last["satisfaction"]]),
        np.std([0.6, last["satisfaction"]], ddof=1),
    )
    assert f"| js | {mean:.3f} ± {deviation:.3f} |" in text
    assert "| forward_kl | 0.600 ± 0.141 |" in text
    assert (
        "python -m experiments.compare --task lexical_constraint --objectives forward_kl 'js: "
        "--divergence" in text
    )

    # Again: nothing is left to be made. Then a run is lost, and said to be missing.
    assert compare(*command) == 0
    assert "are to be made" not in capsys.readouterr().out
    (left.place.folder / "model").rename(tmp_path / "elsewhere")
    assert compare(*TASK, "--only-report", "--folder", tmp_path) == 1
    printed = capsys.readouterr().out
    assert "| js (1 of 2 seeds) | 0.600 ± 0.010 |" in printed
    assert f"not finished: js, seed 1 ({left.place.log})" in printed
    assert (
        compare(
            *TASK, "--only-report", "--objectives", "js: --x", "--seeds", 1, "--folder", tmp_path
        )
        == 2
    )
    assert "There is no finished run of lexical_constraint" in error_of(capsys)


def test_help_teaches(compare, capsys):
    assert compare("--help") == 0
    printed = capsys.readouterr().out
    assert "--divergence of that name" in printed
    assert "python -m experiments.compare --task sentiment_reward" in printed


def test_the_examples_of_the_help_are_objectives():
    words = [
        part.split('"')[1]
        for part in (Config.__doc__ or "").split("--objectives ")[1:]
        if '"' in part
    ]
    assert all(parse_objectives([word])[0].flags for word in words)
