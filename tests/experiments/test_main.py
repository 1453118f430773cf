"""`python -m experiments`: every command by its name; and what a task must have to be one."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import experiments
from experiments.__main__ import TOOLS, main
from experiments.common.settings import Settings
from experiments.tasks import TASKS

from .commands import run

ROOT = Path(experiments.__file__).parent
PAGE = (ROOT / "README.md").read_text("utf-8")
NAMES = [*(task.name for task in TASKS), *TOOLS]


@pytest.mark.command
@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_all_commands_are_listed(arguments, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, main, *arguments) == 0
    shown, errors = capsys.readouterr()
    assert "usage: python -m experiments COMMAND [--help]" in shown
    assert errors == ""
    lines = shown.splitlines()
    names = [line.split()[0] for line in lines if line[:2].isspace() and not line[2].isspace()]
    assert names == NAMES
    assert max(map(len, lines)) <= 80


def test_a_command_that_does_not_exist_is_answered_with_those_that_do(monkeypatch, capsys):
    assert run(monkeypatch, main, "lexical", "--word", "great") == 2
    shown, errors = capsys.readouterr()
    assert shown == ""
    assert "There is no command 'lexical'." in errors
    assert all(f"  {name} " in errors for name in NAMES)


@pytest.mark.parametrize("name", ["lexical_constraint", "compare", "pretrain"])
def test_a_command_is_the_same_by_either_name(name, monkeypatch, capsys):
    """Help, and what it says of a flag that does not exist, which is the command's own status."""
    own = importlib.import_module(f"experiments.{name}.__main__").main
    for arguments, status in ((("--help",), 0), (("--no-such-flag",), 2)):
        assert run(monkeypatch, main, name, *arguments) == status
        by_name = capsys.readouterr()
        assert run(monkeypatch, own, *arguments) == status
        assert capsys.readouterr() == by_name
    assert sys.argv[1:] == ["--no-such-flag"]


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_is_there_and_has_its_help(name, monkeypatch, capsys):
    assert run(monkeypatch, main, name, "--help") == 0
    assert f"usage: python -m experiments {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["evaluate", "lexical_constraint"])
def test_examples_are_typed_as_the_installed_program_is(name, monkeypatch, capsys):
    """In the wheel there is no `experiments` that python -m would find."""
    monkeypatch.setattr("experiments.common.command.PROGRAM", "fjax")
    assert run(monkeypatch, main, name, "--help") == 0
    shown = capsys.readouterr().out
    assert f"usage: fjax {name}" in shown
    assert f"    fjax {name} " in shown
    assert "python -m" not in shown


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_is_a_folder_with_all_that_it_takes(task):
    folder = ROOT / task.name
    for name in ("__init__.py", "__main__.py", "config.py", "target.py", "README.md"):
        assert (folder / name).is_file(), name
    assert f"python -m experiments.{task.name}" in (folder / "README.md").read_text("utf-8")
    assert Path(inspect.getfile(task.config)).parent == folder
    assert isinstance(task.config().settings, Settings)
    assert isinstance(task.title(task.config()), str)
    assert task.headlines or task.name == "moments"  # which the user names


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_all_commands_has_each(name):
    assert f"| [{name}]({name}/README.md) |" in PAGE or f"| `{name}` |" in PAGE


def test_no_folder_is_a_task_without_being_listed():
    found = {path.parent.name for path in ROOT.glob("*/target.py")}
    assert found == {task.name for task in TASKS}


def configs() -> list[type]:
    modules = (importlib.import_module(f"experiments{module}") for module, _ in TOOLS.values())
    tools = [module.Config for module in modules]
    return [Settings, *(task.config for task in TASKS), *tools]


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.__module__)
def test_every_field_says_what_it_is(config):
    """In the line behind it, which is where the help has it from."""
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(sys.modules[config.__module__])).body
        if isinstance(node, ast.ClassDef) and node.name == config.__name__
    )
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(after, ast.Expr), ast.unparse(node)
            assert isinstance(ast.literal_eval(after.value), str), ast.unparse(node)


def commands(text: str) -> list[str]:
    """Of the examples of a docstring, each on one line."""
    _, _, examples = inspect.cleandoc(text).partition("Examples:\n")
    return [line.strip() for line in examples.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.__module__)
def test_the_examples_of_the_help_are_whole_commands(config):
    """A terminal of 80 columns breaks none of their lines; each goes on behind a backslash."""
    text = inspect.cleandoc(config.__doc__ or "")
    assert max(map(len, text.partition("Examples:")[2].splitlines() or [""])) < 80
    for command in commands(text):
        assert command.startswith("python -m experiments"), command
        assert command.count("python") == 1, command
