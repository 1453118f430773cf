"""Documentation that is tested: examples run, the table regenerates, every public name is
described, no link is broken."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

import fjax
from experiments.common import arguments as arguments_of
from experiments.common import command
from experiments.tools import kl_gradients
from tests import make_notebook
from tests.make_api_page import FROM_TRL, LAYERS, MODULES, from_trl, layers, page

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


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", path.read_text(), re.DOTALL)


def body(script: str) -> str:
    """A script of docs/examples without its docstring."""
    return (ROOT / "docs/examples" / f"{script}.py").read_text().split('"""', 2)[2].strip()


def smaller(code: str) -> str:
    for given, taken in SMALLER.items():
        code = code.replace(given, taken)
    return code


def test_the_quickstart_is_one_text():
    """In the scripts, on the page, in the README and in the notebook."""
    first, by_hand = blocks(make_notebook.PAGE, "python")
    assert first == body("quickstart")
    assert first in blocks(ROOT / "README.md", "python")
    assert by_hand.removeprefix("import jax\n\n") in body("handwritten")
    text = make_notebook.NOTEBOOK.read_text()
    assert text == make_notebook.notebook(make_notebook.PAGE.read_text()), "tests.make_notebook"


@pytest.mark.usefixtures("bare")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """On a tiny model, and in small numbers: what `fjax.runs.align` does, then the same by hand."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in make_notebook.code(make_notebook.NOTEBOOK.read_text()):
        exec(compile(smaller(cell), "quickstart.ipynb", "exec"), names)
    assert names["result"].status == 0
    assert (tmp_path / "runs/great/model").is_dir()
    for figures in (names["result"].figures, names["figures"]):
        assert 0 <= figures["satisfaction"].value <= 1
        assert 0 < figures["jensen_shannon"].value < 0.75
    assert names["info"].finite
    assert "Estimate(" in capsys.readouterr().out


def test_the_script_by_hand_is_whole():
    """Its loop is run as the notebook's; what stands above it, the notebook has from before."""
    above = body("handwritten").partition("update = ")[0].splitlines()
    names = set(filter(None, above)) - set(body("quickstart").splitlines())
    assert all(
        line.startswith(("import jax", "from fjax", "def ", "model =", "target ="))
        for line in names
    ), names


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


def test_the_page_for_those_who_come_from_trl_answers_as_the_commands_do():
    text = FROM_TRL.read_text()
    assert text == from_trl(text), "python -m tests.make_api_page"


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


COMMANDS = [
    (path, words)
    for path in [
        *PAGES,
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "experiments").rglob("README.md")),
    ]
    for block in blocks(path, "sh")
    for line in block.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))
]
"""Every line of every block of shell."""


@pytest.mark.parametrize(
    ("path", "words"),
    COMMANDS,
    ids=[f"{path.parent.name}-{' '.join(w)[:60]}" for path, w in COMMANDS],
)
def test_a_command_is_one_that_there_is(path, words, monkeypatch):
    """Programs are asked to parse it, and to do nothing."""
    program, *rest = words
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        assert set(re.findall(r"[\w-]+", rest[1].partition("[")[2])) <= set(extras)
    elif program == "fjax":
        assert parses(["experiments", *rest], monkeypatch)
    elif program.endswith("python") and rest[0] == "-m":
        assert parses(rest[1:], monkeypatch)
    else:
        assert (ROOT / (rest[0] if program.endswith("python") else program)).exists()


def parses(words: list[str], monkeypatch) -> bool:
    """Whether ``python -m`` would take these words: it is run with the parser alone behind it."""
    module, *arguments = words
    spec = importlib.util.find_spec(module)
    if not module.startswith("experiments"):
        return spec is not None
    name = module if spec.submodule_search_locations is None else f"{module}.__main__"
    parsed = []

    def parse(config, main, name, computes):
        parsed.append(arguments_of.parse(config, name))
        return 0

    monkeypatch.setattr(command, "_run", parse)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported before
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(name, run_name="__main__")
    return not ended.value.code and (len(parsed) == 1 or not arguments or "--help" in arguments)


def test_links_lead_somewhere():
    for path in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


def test_what_the_glossary_names_in_full_exists():
    text = (ROOT / "docs" / "glossary.md").read_text()
    for name in re.findall(r"`(fjax\.[\w.]+)`", text):
        assert pkgutil.resolve_name(name), name


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
