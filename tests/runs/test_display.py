"""What is printed: the bar at any width, tables in order, hits in samples."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from fjax.divergences import by_name, jensen_shannon
from fjax.estimators import Estimate
from fjax.evaluation import Evaluation, Scored
from fjax.runs import Display
from fjax.runs.aim import Aim

AIM = Aim("p", ("satisfaction",), "satisfaction", "jensen_shannon", {"forward_kl": None, "reverse_kl": None, "jensen_shannon": 0.693}, "great")  # fmt: skip


def terminal(width: int) -> tuple[Display, io.StringIO]:
    """One of so many columns."""
    display, screen = Display(), io.StringIO()
    display._console = Console(file=screen, width=width, force_terminal=True, color_system="256")
    return display, screen


def lines(screen: io.StringIO) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain)]


def note(record: dict, divergence=None) -> str:
    """Of a step, without a terminal."""
    display, screen = Display(), io.StringIO()
    display._console = Console(file=screen, width=110)
    shown = {"headline": "satisfaction", "divergence": divergence}
    with display.progress("align", total=10, completed=0, **shown) as bar:
        bar(10, {"seconds": 1.0} | record)
    return screen.getvalue().strip()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_keeps_count_rate_and_time_left_at_any_width(width):
    display, screen = terminal(width)
    clock = [0.0]
    display._console.get_time = lambda: clock[0]
    record = {"satisfaction": 0.8512, "divergence": 0.3112, "log_z": -4.38, "seconds": 1.0}
    shown = {"headline": "satisfaction", "divergence": jensen_shannon()}
    with display.progress("align", total=1000, completed=0, **shown) as bar:
        for done in range(1, 201):
            clock[0] += 3.5
            bar(done, record)
    last = [line for line in lines(screen) if line.startswith("align")][-1]
    assert len(last) <= width
    assert "200/1000 17/min 0:46:40" in last
    if width >= 80:
        assert "satisfaction 0.85  JS 0.31 of at most 0.69" in last
    if width >= 120:
        assert last.endswith("log Z -4.4")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("jensen_shannon", 0.3112, "JS 0.31 of at most 0.69"),
        ("jensen_shannon", 2.07, "JS at most 0.69"),
        ("reverse_kl", 13.66, "KL(π‖p) 13.7"),
        (None, 2.07, "divergence 2.1"),
    ],
)
def test_a_steps_own_divergence_is_never_shown_above_its_limit(name, value, expected):
    """JS of 2.07 was shown."""
    divergence = None if name is None else by_name(name)
    assert (
        note({"divergence": np.array(value, np.float32)}, divergence)
        == f"step 10/10  {expected}  1 s"
    )


def test_a_step_without_these_figures():
    assert note({"grad_norm": 1.0}) == "step 10/10    1 s"


def evaluated(**figures: tuple[float, float, float]) -> Evaluation:
    one = np.zeros(2)
    features = {"satisfaction": np.array([1.0, 0.0])}
    texts = {"prompts": ["", ""], "texts": ["a great [bold]film\\", "no"], "references": ["", ""]}
    samples = Scored(*[one] * 6, contexts=None, **texts, features=features)
    return Evaluation({n: Estimate(*x) for n, x in figures.items()}, samples, None, {})


FIGURES = {
    "satisfaction": (0.8, 0.01, 900.0),
    "log_z": (-4.4, 0.1, 50.0),
    "forward_kl": (1.94, 0.05, 50.0),
    "reverse_kl": (np.inf, np.inf, 50.0),
    "jensen_shannon": (0.31, 0.01, 50.0),
    "entropy": (85.0, 1.0, 900.0),
}


def rows_of(printed: list[str]) -> list[str]:
    return [line.split("│")[1].strip() for line in printed if line.startswith("│")]


def test_rows_are_in_order_and_what_is_infinite_is_left_out_with_the_reason():
    display, screen = terminal(80)
    display.evaluation(evaluated(**FIGURES), 5, AIM)
    printed = lines(screen)
    assert rows_of(printed) == [
        "satisfaction", "JS(π, p), at most 0.693", "KL(p‖π)", "entropy of π", "log Z",
    ]  # fmt: skip
    assert "Left out, for π says what p rules out: KL(π‖p), infinite." in printed


def test_a_divergence_that_is_infinite_only_before_stays():
    display, screen = terminal(80)
    finite = FIGURES | {"reverse_kl": (3.2, 0.1, 50.0)}
    before = {"reverse_kl": np.inf, "reverse_kl_std_error": np.inf}
    display.beside(before, evaluated(**finite), AIM, None, first="before", last="after")
    (row,) = (line for line in lines(screen) if "KL(π‖p)" in line)
    assert row.split() == ["│", "KL(π‖p)", "│", "∞", "│", "3.20", "±", "0.10", "│"]


def test_a_figure_that_rests_on_too_little_is_shown_as_such():
    display, screen = terminal(80)
    few = FIGURES | {"forward_kl": (13.7, 0.3, 4.0)}
    display.evaluation(evaluated(**few), 5, AIM)
    printed = "\n".join(lines(screen))
    assert re.search(r"KL\(p‖π\) +│ +14 ± \?", printed)
    assert "± ? is of a figure that rests on too little: fewer than 10 effective samples" in printed
    assert "0.310 ± 0.010" in printed


def test_p_has_a_column_of_what_is_known_of_it(tmp_path):
    display, screen = terminal(100)
    of_p = {"entropy": 88.7, "entropy_std_error": 1.0, "length": 24.8, "length_std_error": 0.3}
    display.summary({0: of_p}, evaluated(**FIGURES), of_p, AIM, None, tmp_path, 1.0)
    printed = lines(screen)
    (entropy,) = (line for line in printed if "entropy" in line and "│" in line)
    cells = [cell.strip() for cell in entropy.split("│")[2:5]]
    assert cells == ["88.7 ± 1.0", "85.0 ± 1.0", "88.7 ± 1.0"]
    assert any("samples as varied as p's." in line for line in printed)


def test_hits_are_highlighted_and_the_verdict_is_said():
    display, screen = terminal(80)
    before = {"satisfaction": 0.01, "satisfaction_std_error": 0.004}
    display.beside(before, evaluated(**FIGURES), AIM, None, first="before", last="after")
    assert "\x1b[1;32mgreat\x1b[0m" in screen.getvalue()
    printed = lines(screen)
    assert any(line.strip() == "✓  a great [bold]film\\" for line in printed)
    assert any(line.startswith("satisfaction 0.010 → 0.80; ") for line in printed)


def test_without_a_terminal_long_work_says_how_far_it_is(capsys, monkeypatch):
    seconds = iter(range(0, 1000, 7))
    monkeypatch.setattr("fjax.runs.display.time.monotonic", lambda: float(next(seconds)))
    with Display().counting("exact") as progress:
        advance = progress(9)
        for done in range(1, 10):
            advance(done)
    assert capsys.readouterr().out.splitlines() == ["exact  3/9", "exact  6/9", "exact  9/9"]
