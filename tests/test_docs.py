"""Documentation that is tested: examples run, the table regenerates, every public name is
described, no link is broken."""

import doctest
import importlib
import importlib.util
import inspect
import re
import runpy
from pathlib import Path

import pytest

import fjax
from experiments.tools import kl_gradients
from tests.make_api_page import LAYERS, MODULES, layers, page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MATHEMATICS = MODULES[: MODULES.index("testing") + 1]


def names(module: str) -> dict[str, object]:
    """What a module offers."""
    loaded = importlib.import_module(f"fjax.{module}")
    return {name: getattr(loaded, name) for name in loaded.__all__}


@pytest.mark.usefixtures("bare")  # as whoever pastes them runs them
@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if ">>>" in path.read_text()],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_examples_run(path):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    parser = doctest.DocTestParser()
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    test = parser.get_doctest(
        "\n".join(b for b in blocks if ">>>" in b), {}, path.name, str(path), 0
    )
    output: list[str] = []
    assert doctest.DocTestRunner(optionflags=flags).run(test, out=output.append).failed == 0, (
        "".join(output)
    )


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    "script", sorted((ROOT / "docs/examples").glob("*_*.py")), ids=lambda p: p.stem
)
def test_a_model_of_ones_own_is_aligned(script):
    """Of plain functions, Flax NNX and Equinox, as the how-to has it."""
    if script.stem == "equinox_model":
        pytest.importorskip("equinox")  # of the extra `test`
    found = runpy.run_path(str(script))
    assert found["before"] < 0.2
    assert found["after"] > 0.6
    assert found["info"].finite


SMALLER = {
    '"built-in"': repr(str(ROOT / "tests" / "fixtures" / "tiny-gpt2")),
    '"great"': '"w9"',
    "steps=90": "steps=2, eval_samples=32",
    "range(90)": "range(2)",
    "max_new_tokens=40, samples=128, base_samples=16": "max_new_tokens=8, samples=16, base_samples=2",
    '[""] * 128': '[""] * 16',
    "512": "32",
}
"""What stands in for what in the examples of whole runs, so that they take seconds."""


@pytest.mark.parametrize("script", ["quickstart", "handwritten"])
def test_whole_runs_from_python(script, tmp_path, monkeypatch, capsys):
    """The twenty lines of the README, and the same by hand, on a tiny model."""
    text = (ROOT / "docs/examples" / f"{script}.py").read_text()
    for given, smaller in SMALLER.items():
        text = text.replace(given, smaller)
    (tmp_path / "script.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path("script.py")
    figures = found["result"].figures if script == "quickstart" else found["figures"]
    assert 0 <= figures["satisfaction"].value <= 1
    assert 0 < figures["jensen_shannon"].value < 0.75
    if script == "quickstart":
        assert (tmp_path / "runs/great/model").is_dir()
    assert "Estimate(" in capsys.readouterr().out


def test_the_readme_shows_the_quickstart():
    code = (ROOT / "docs/examples/quickstart.py").read_text().split('"""\n\n', 1)[1]
    assert code in (ROOT / "README.md").read_text()
    assert len([line for line in code.splitlines() if line.strip()]) <= 25


def test_the_readme_has_an_example_without_flax():
    readme = (ROOT / "README.md").read_text()
    (example,) = (b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if ">>>" in b)
    assert "flax" not in example
    assert len(example.splitlines()) <= 22


def test_the_table_of_kl_gradients_is_what_its_script_makes():
    assert (ROOT / "docs" / "kl_gradients.md").read_text() == kl_gradients.page(
        kl_gradients.Config()
    )


def test_the_page_of_all_names_is_what_its_script_makes():
    text = (ROOT / "docs" / "api.md").read_text()
    assert text == page()
    for name in [*fjax.__all__, *(name for module in MODULES for name in names(module))]:
        assert f"`{name}`" in text, name


def test_the_rules_of_the_layers_are_those_that_are_enforced():
    text = LAYERS.read_text()
    assert text == layers(text), "python -m tests.make_api_page"


@pytest.mark.parametrize("module", MATHEMATICS)
def test_every_function_of_the_mathematics_has_formula_shapes_and_source(module):
    for name, thing in names(module).items():
        if not inspect.isfunction(thing) and not inspect.isclass(thing):
            continue  # a type, described below it in the source
        text = thing.__doc__ or ""
        assert text.strip(), name
        if inspect.isclass(thing):
            continue
        assert "Source:" in text, name
        assert ">>>" in text, name
        arguments = [a for a in thing.__annotations__ if a != "return"]
        described = "Args:" in text or len(arguments) <= 1
        assert described, name


def test_links_lead_somewhere():
    for path in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


def test_tests_that_the_derivations_name_exist():
    everything = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    text = (ROOT / "docs" / "derivations.md").read_text()
    for name in re.findall(r"`(?:[\w/.]+::)?(test_\w+)`", text):
        assert f"def {name}(" in everything, name


def site(name: str):
    """A module of docs/site, which is no package: MkDocs loads its files by their path."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs/site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_has_its_page_in_the_reference():
    pages = {path.stem: path.read_text() for path in (ROOT / "docs/reference").glob("*.md")}
    for module in (*MODULES, "types"):
        assert f"::: fjax.{module}\n" in pages[module]


def test_what_a_page_would_fetch_from_elsewhere_is_seen():
    pages = site("pages")
    local = (
        '<a href="https://x.org">x</a><link rel="canonical" href="https://x.org"><img src="a.png">'
    )
    assert pages.fetched(local) == []
    for loading in (
        '<script src="https://cdn.org/a.js">',
        '<link rel="preconnect" href="//fonts.org">',
        '<img alt="" src="http://x.org/a.png">',
        '<style>@import url("https://fonts.org/a.css")</style>',
        '<p style="background: url(https://x.org/a.png)">',
    ):
        assert len(pages.fetched(local + loading)) == 1, loading


def test_links_of_the_repository_are_led_to_the_pages_of_the_site():
    pages = site("pages")

    def led(link, source):
        uri = source.removeprefix("docs/")
        return pages.new_place(link, source=ROOT / source, uri=uri)

    assert (
        led("../experiments/compare/README.md", "docs/findings.md")
        == "experiments/compare/README.md"
    )
    assert led("../findings.md#a", "docs/how-to/x.md") == "../findings.md#a"
    assert led("../../docs/figures/x.png", "experiments/compare/README.md") == "../../figures/x.png"
