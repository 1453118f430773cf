"""Runs beside one another."""

import json

import pytest

from experiments.tools import tabulate
from fjax.training import JsonlLogger

from .commands import run


@pytest.mark.command
def test_the_last_evaluation_of_each_run_is_a_row(monkeypatch, capsys, tmp_path):
    old = {"alpha": 0.5}  # of a run from before the value was a part of the name
    others = {"jensen_shannon": {"clip": None}, "reverse_kl": {"clip": [-8, 8]}, "alpha": old}
    for name, settings in others.items():
        (tmp_path / name).mkdir()
        config = {"divergence": name} | settings
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with JsonlLogger(tmp_path / name / "metrics.jsonl") as logger:
            for step, value in ((0, 0.01), (1, 0.5), (2, 0.75)):
                figures = {
                    "satisfaction": value,
                    "satisfaction_std_error": 0.02,
                    "log_z": -4.5,
                    "log_z_std_error": float("inf"),
                }
                logger.log(
                    {"kind": "evaluation", "step": step, "samples": 1000 * step, "seconds": 3.0}
                    | figures
                )
                logger.log({"kind": "step", "step": step + 1})
    folders = [tmp_path / name for name in others]
    assert (
        run(
            monkeypatch,
            tabulate.main,
            *folders,
            "--figures",
            "satisfaction",
            "log_z",
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "|  | satisfaction | log Z | samples drawn | seconds |",
        "| --- | --- | --- | --- | --- |",
        "| base model | 0.0100 ± 0.0200 | -4.5 | 0 | 3 |",
        "| jensen_shannon | 0.750 ± 0.020 | -4.5 | 2,000 | 3 |",
        "| reverse_kl, f' clipped to [-8, 8] | 0.750 ± 0.020 | -4.5 | 2,000 | 3 |",
        "| alpha=0.5 | 0.750 ± 0.020 | -4.5 | 2,000 | 3 |",
    ]


def test_samples_of_the_first_evaluation_stand_beside_those_of_the_last(
    monkeypatch, capsys, tmp_path
):
    (tmp_path / "config.json").write_text('{"divergence": "reverse_kl"}')
    with (
        JsonlLogger(tmp_path / "metrics.jsonl") as metrics,
        JsonlLogger(tmp_path / "samples.jsonl") as samples,
    ):
        for step in (0, 1, 2):
            metrics.log({"kind": "evaluation", "step": step, "samples": step, "seconds": 1.0})
            for i in range(6):
                samples.log({"step": step, "prompt": f"p{i}", "text": f"*x*{step}{i}"})
    assert run(monkeypatch, tabulate.main, tmp_path, "--samples", 2, "--figures", "log_z") == 0
    assert capsys.readouterr().out.splitlines()[4:] == [
        "",
        f"{tmp_path.name}:",
        "",
        "| before (step 0) | after (step 2) |",
        "| --- | --- |",
        r"| **p0** \*x\*00 | **p0** \*x\*20 |",
        r"| **p5** \*x\*05 | **p5** \*x\*25 |",
    ]
    assert run(monkeypatch, tabulate.main, tmp_path, "--samples", 0) == 2
    assert "samples" in capsys.readouterr().err


def test_what_is_no_run_is_named(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, tabulate.main, tmp_path) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert run(monkeypatch, tabulate.main) == 2
    assert "Name at least one run folder" in capsys.readouterr().err
