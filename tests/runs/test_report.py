"""The page of a run, read back as XML: what it shows, and that nothing in it is run or loaded."""

import base64
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fjax.runs import RunError, report
from fjax.runs.aim import Aim
from fjax.training import JsonlLogger

CONFIG = {"word": "<great>", "steps": 10, "clip": None}
ABOUT = {
    "command": "python -m x --word '<great>'",
    "versions": {"fjax": "1.0", "jax": "2.0"},
    "devices": ["H100", "H100"],
}
PICTURE = b"\x89PNG\r\n\x1a\n and so on"


def evaluation(step: int, **figures: tuple[float, float]) -> dict:
    record = {"kind": "evaluation", "step": step, "seconds": 60.0 * step, "samples": 1000 * step}
    for name, (value, error) in figures.items():
        record |= {name: value, f"{name}_std_error": error, f"{name}_ess": 50.0}
    return record


def run_folder(folder: Path, evaluations: list[dict], samples: list[dict]) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | ABOUT))
    (folder / "evaluation.png").write_bytes(PICTURE)
    for name, records in (
        ("metrics", [{"kind": "step", "step": 1}, *evaluations]),
        ("samples", samples),
    ):
        with JsonlLogger(folder / f"{name}.jsonl") as logger:
            for record in records:
                logger.log(record)
    return folder


def page(folder: Path) -> ElementTree.Element:
    report.write(folder)
    return ElementTree.fromstring((folder / "report.html").read_text())


def cells(root: ElementTree.Element, kind: str) -> list[list[str]]:
    return [
        ["".join(cell.itertext()) for cell in row]
        for row in root.iterfind(f".//table[@class='{kind}']/tr")
    ]


def test_figures_before_and_after_with_their_standard_errors(tmp_path):
    first = evaluation(
        0, satisfaction=(0.01234, 0.0042), log_z=(-4.5, 0.12), reverse_kl=(np.inf, np.inf)
    )
    middle = evaluation(5, satisfaction=(0.5, 0.1))
    last = evaluation(
        10,
        satisfaction=(0.8, 0.0131),
        log_z=(np.nan, np.inf),
        reverse_kl=(36.61, 9.71),
        distinct_2=(0.5, np.nan),
    )
    root = page(run_folder(tmp_path, [first, middle, last], [{"step": 0, "text": "a"}]))
    assert cells(root, "figures") == [
        ["", "before (step 0)", "after (step 10)"],
        ["satisfaction", "0.0123 ± 0.0042", "0.800 ± 0.013"],
        ["log Z", "-4.50 ± 0.12", "unknown"],
        ["KL(π‖p)", "∞", "36.6 ± 9.7"],
        ["distinct-2", "–", "0.500"],
    ]


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.0, np.nan, "0"),
        (1.0, 0.0, "1.00"),
        (1234.5, np.nan, "1234"),
        (-1e-7, 1e-6, "0"),
        (-1e-3, 1e-6, "-0.0010 ± 0.0000"),
        (1234.5, 67.8, "1234 ± 68"),
    ],
)
def test_as_many_digits_as_mean_something(tmp_path, value, error, expected):
    record = evaluation(0, length=(value, error))
    assert (
        cells(page(run_folder(tmp_path, [record], [{"step": 0, "text": "a"}])), "figures")[1][1]
        == expected
    )


def test_samples_of_the_first_and_last_step_side_by_side_and_from_all_contexts(tmp_path):
    records = [
        {"step": step, "text": f"{step}, {i}", "reward": i / 3}
        for step in (0, 5, 10)
        for i in range(64 - step)
    ]
    rows = cells(page(run_folder(tmp_path, [evaluation(0)], records)), "samples")
    assert len(rows) == 1 + report.SHOWN
    assert rows[0] == ["before (step 0)", "after (step 10)"]
    assert rows[1] == ["0, 0reward 0", "10, 0reward 0"]
    assert rows[-1] == ["0, 63reward 21", "10, 53reward 17.7"]


def test_prompts_and_uneven_numbers_of_samples(tmp_path):
    records = [
        {"step": 0, "prompt": "once", "text": "upon a time"},
        {"step": 0, "text": ""},
        {"step": 3, "text": "inf"},
    ]
    rows = cells(page(run_folder(tmp_path, [evaluation(0)], records)), "samples")
    assert rows[1:] == [["once upon a time", "inf"], ["(empty)", ""]]


def test_one_file_that_runs_and_loads_nothing_whatever_the_texts_are(tmp_path):
    evil = "<script>alert('&')</script>\x00\x1b[31m\ud800 <img src='http://x'>"
    records = [{"step": 0, "prompt": evil, "text": evil}, {"step": 1, "text": evil}]
    root = page(run_folder(tmp_path, [evaluation(0)], records))
    assert not list(root.iter("script"))
    (picture,) = root.iter("img")
    assert base64.b64decode(picture.get("src").removeprefix("data:image/png;base64,")) == PICTURE
    shown = "<script>alert('&')</script>\ufffd\ufffd[31m\ufffd <img src='http://x'>"
    assert cells(root, "samples")[1] == [f"{shown} {shown}", shown]
    assert "default-src 'none'" in (tmp_path / "report.html").read_text()


def test_how_to_make_it_again_settings_versions_and_devices(tmp_path):
    root = page(run_folder(tmp_path, [evaluation(0), evaluation(10)], [{"step": 0, "text": "a"}]))
    assert [element.text for tag in ("title", "h1") for element in root.iter(tag)] == [
        tmp_path.name
    ] * 2
    assert root.find(".//pre").text == ABOUT["command"]
    size = "10 steps, 10,000 samples, 600 s on 2 × H100\n(fjax 1.0, jax 2.0)"
    assert root.find(".//p").text == f"{tmp_path.name}: {size}"
    settings = {
        group.find("dt").text: group.find("dd").text for group in root.iterfind(".//dl/div")
    }
    assert settings == {"word": "<great>", "steps": "10", "clip": "none"}


def aimed(folder: Path, **options) -> None:
    """As a run of today describes itself."""
    known = Aim(**{"headlines": ("satisfaction",), "objective": "jensen_shannon"} | options)
    (folder / "config.json").write_text(json.dumps(CONFIG | ABOUT | {"aim": known._asdict()}))


def test_target_and_success_are_in_the_first_line_and_the_objective_in_the_second_row(tmp_path):
    first = evaluation(
        0, entropy=(90.0, 1.0), jensen_shannon=(0.66, 0.01), satisfaction=(0.01, 0.004)
    )
    last = evaluation(
        10, entropy=(89.0, 1.0), jensen_shannon=(0.31, 0.01), satisfaction=(0.85, 0.01)
    )
    run_folder(tmp_path, [first, last], [{"step": 0, "text": "a"}])
    aimed(tmp_path, target="p ∝ a·[<great>]", at_most={"jensen_shannon": 0.6931})
    root = page(tmp_path)
    assert "".join(root.find(".//h1").itertext()) == (
        "p ∝ a·[<great>]: satisfaction 0.010 → 0.85; 0.31 of 0.66 in JS(π, p) from the target left; "
        "samples as varied as before."
    )
    assert [row[0] for row in cells(root, "figures")[1:]] == [
        "satisfaction", "JS(π, p), at most 0.693", "entropy of π",
    ]  # fmt: skip
    assert "aim" not in {term.text for term in root.iter("dt")}


def test_what_is_infinite_by_nature_is_left_out_and_p_has_a_column(tmp_path):
    records = [
        evaluation(step, reverse_kl=(np.inf, np.inf), entropy=(80.0, 1.0)) for step in (0, 10)
    ]
    run_folder(
        tmp_path,
        [*records, evaluation(0, entropy=(88.0, 2.0)) | {"kind": "target"}],
        [{"step": 0, "text": "a"}],
    )
    aimed(tmp_path, at_most={"reverse_kl": None})
    root = page(tmp_path)
    assert cells(root, "figures") == [
        ["", "before (step 0)", "after (step 10)", "p"],
        ["entropy of π", "80.0 ± 1.0", "80.0 ± 1.0", "88.0 ± 2.0"],
    ]
    said = [p.text for p in root.iter("p")]
    assert any("Left out, for π says what p rules out: KL(π‖p), infinite." in line for line in said)


def test_hits_are_highlighted_and_nothing_in_them_is_run(tmp_path):
    text = "<b>Great</b> greater & <i>GREAT"
    run_folder(tmp_path, [evaluation(0)], [{"step": 0, "text": text}])
    aimed(tmp_path, highlight=r"(?i)<\w>great\b")
    root = page(tmp_path)
    assert [mark.text for mark in root.iter("mark")] == [
        "<b>Great",
        "<i>GREAT",
    ] * 2  # before and after
    assert cells(root, "samples")[1] == [text, text]
    assert not list(root.iter("b"))


def test_what_has_no_evaluation_has_no_report(tmp_path):
    with pytest.raises(RunError, match="no evaluation yet"):
        report.write(run_folder(tmp_path, [], []))
