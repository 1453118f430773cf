"""What a command line stands for: every number of every command, within its range or refused;
paths; and the optimiser."""

import dataclasses
import importlib
import types
import typing
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import experiments.__main__ as every_command
from experiments.common import arguments
from experiments.common.arguments import parse
from experiments.common.build import load_model, make_optimizer
from experiments.common.settings import Settings
from experiments.tasks import TASKS
from fjax.divergences import names
from fjax.runs import RunError

from .commands import TINY

# Command -> the module of its Config, and what must be given besides.
COMMANDS = {
    **{task.name: (f"{task.name}.config", ()) for task in TASKS},
    "moments": ("moments.config", ("--target", "mine:about_food", "--moment", "0.5")),
    "compare": ("compare.config", ("--task", "lexical_constraint", "--objectives", "ppo")),
    "pretrain": ("pretrain.config", ()),
    "make_pairs": ("preference_pairs.make_pairs", ()),
    "evaluate": ("tools.evaluate", ("--aligned", "folder", "lexical_constraint")),
    "generate": ("tools.generate", ("--model", "folder", "--word", "great")),
    "bench": ("tools.bench", ()),
    "kl_gradients": ("tools.kl_gradients", ()),
    "gradient_noise": ("tools.gradient_noise", ()),
    "tabulate": ("tools.tabulate", ("folder",)),
    "plot": ("conditional.plot", ("folder",)),
}
VALUES = (float("nan"), float("inf"), -1, 0, 10**400, -(10**400))


def config_of(command: str) -> type:
    return importlib.import_module(f"experiments.{COMMANDS[command][0]}").Config


def numbers(annotation) -> type | None:
    """int or float, if a field of this type has numbers, alone, in a tuple or perhaps none."""
    parts = {part for part in typing.get_args(annotation) if part not in (Ellipsis, types.NoneType)}
    found = {numbers(part) for part in parts} if parts else {annotation}
    return next(iter(found & {int, float}), None)


CASES = [
    (command, name, kind)
    for command in COMMANDS
    for name, hint in typing.get_type_hints(config_of(command)).items()
    if (kind := numbers(hint))
] + [
    ("settings", name, kind)
    for name, hint in typing.get_type_hints(Settings).items()
    if (kind := numbers(hint))
]


def test_every_command_is_in_the_table():
    """A file with a command line of its own, found by what it calls."""
    folder = Path(every_command.__file__).parent
    files = {
        path
        for path in folder.rglob("*.py")
        if "leave(main())" in path.read_text(encoding="utf-8") and path.parent != folder
    }
    assert {path.stem if path.name != "__main__.py" else path.parent.name for path in files} == set(
        COMMANDS
    )


def test_there_is_a_row_for_every_number_and_no_other():
    assert {name for _, name, _ in CASES} == set(arguments.RANGES)


@pytest.fixture(scope="module")
def allowed():
    """A configuration of each command, with what must be given."""
    found = {name: parse(config_of(name), name, others) for name, (_, others) in COMMANDS.items()}
    several = {"coordinator": "here:1", "processes": 2**16, "process": 0, "mesh": "data=-1"}
    return found | {"settings": Settings(run_folder=Path("run"), **several)}


@pytest.mark.parametrize(
    ("command", "name", "kind"), CASES, ids=lambda x: str(x) if isinstance(x, str) else ""
)
def test_a_number_is_within_its_range_or_refused_in_a_sentence(command, name, kind, allowed):
    """Whether a value is refused is read off the table."""
    low, high = arguments.RANGES[name]
    for number in (*VALUES, low, high):
        several = isinstance(getattr(allowed[command], name), tuple)
        value = (number, 9e5) if name == "clip" else (number,) if several else number
        if low <= number <= high and not needs_more_than_its_range(command, name, number):
            assert getattr(dataclasses.replace(allowed[command], **{name: value}), name) == value
            continue
        with pytest.raises(ValueError, match=arguments.flag(name)):
            dataclasses.replace(allowed[command], **{name: value})


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--steps", "nan", "--steps"),
        ("--steps", "1.5", "--steps"),
        ("--steps", "1e3", "--steps"),
        ("--learning-rate", "fast", "--learning-rate"),
        ("--clip", "8", "--clip"),
    ],
)
def test_what_is_no_number_is_refused_by_its_flag(flag, value, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(config_of("lexical_constraint"), "x", (flag, value))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def needs_more_than_its_range(command: str, name: str, number: float) -> bool:
    """Where the meaning of a number depends on others."""
    return (command, name, number) in {
        ("pretrain", "n_embd", 1),
        ("pretrain", "n_head", 1024),
        ("pretrain", "n_positions", 2),
        ("pretrain", "vocab_size", 2),
        ("kl_gradients", "vocab_size", 2**20),
        ("kl_gradients", "max_tokens", 16),
        ("settings", "samples", 1),
        ("settings", "clip", 1e6),
        ("settings", "lora_alpha", 1e-6),
        ("settings", "lora_alpha", 1e6),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--clip", "8", "-8"), "--clip is the lowest and then the highest f', got 8 -8"),
        (("--clip", "0", "0"), "--clip is the lowest and then the highest f', got 0 0"),
        (("--smoothing", "1e-60"), "--smoothing must be 0 or at least 1e-30"),
        (
            ("--seed", str(2**32)),
            "--seed must be at least 0 and at most 4294967295, got 4294967296",
        ),
        (("--run-folder", ""), "a path must not be empty"),
        (("--run-folder", " "), "a path must not be empty"),
        (("--model", ""), "a path must not be empty"),
        (("--run-folder", "~nobody-here/run"), "~nobody-here"),
    ],
)
def test_a_value_that_cannot_be_is_refused(given, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        parse(config_of("lexical_constraint"), "x", given)
    shown = "".join(c for c in capsys.readouterr().err if c not in " \n│╭╮╰╯─")
    assert "".join(message.split()) in shown + "".join(str(error.value).split())


@pytest.mark.parametrize("name", names())
def test_every_divergence_of_the_library_can_be_given(name):
    settings = parse(config_of("lexical_constraint"), "x", ("--divergence", name)).settings
    assert settings.divergence == name
    assert settings.title == name.replace("=", "-")


@pytest.mark.parametrize("name", ["kl", "alpha", "alpha=x", "jensen_shannon=1", ""])
def test_a_divergence_that_does_not_exist_is_answered_with_those_that_do(name):
    with pytest.raises(ValueError, match="--divergence: ") as error:
        Settings(divergence=name)
    assert all(known in str(error.value) for known in names())


def test_home_is_expanded_wherever_a_path_is_taken(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for command, (_, others) in COMMANDS.items():
        if command in ("compare", "tabulate", "plot", "evaluate"):
            continue
        hints = typing.get_type_hints(config_of(command), include_extras=True)
        paths = [name for name, hint in hints.items() if takes_a_path(hint)]
        paths = [name for name in paths if (command, name) != ("generate", "run")]  # no --word then
        given = [word for name in paths for word in (arguments.flag(name), "~/x")]
        with_prompts = ["--prompts", "~/p"] if command == "conditional" else []
        chosen = parse(config_of(command), command, (*others, *given, *with_prompts))
        for name in paths:
            value = getattr(chosen, name)
            (value,) = value if isinstance(value, tuple) else (value,)
            assert str(value) in ("/home/me/x", "/home/me/p"), (command, name)
    everywhere = ("--task", "lexical_constraint", "--runs", "~/a", "~/b", "--folder", "~/c")
    chosen = parse(config_of("compare"), "compare", everywhere)
    assert chosen.runs == (Path("/home/me/a"), Path("/home/me/b"))
    assert parse(config_of("generate"), "x", ("--run", "~/r")).run == Path("/home/me/r")
    chosen = parse(config_of("lexical_constraint"), "x", ("--model=~/m", "--run-folder=~/r"))
    assert chosen.settings.model == "/home/me/m"
    assert chosen.settings.run_folder == Path("/home/me/r")


def takes_a_path(hint) -> bool:
    word = arguments.FolderOrName
    return hint in (Path, Path | None, word, word | None, tuple[word, ...])


def test_every_word_that_may_be_a_folder_is_taken_as_one():
    """A field that names a model or a reward must not be a bare str, in which ~ stays."""
    for command in [*COMMANDS, Settings]:
        config = config_of(command) if isinstance(command, str) else command
        for name, hint in typing.get_type_hints(config, include_extras=True).items():
            if name in ("model", "start", "base", "aligned", "reward"):
                assert takes_a_path(hint), (command, name)


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_a_warm_up_the_first_step_has_the_whole_rate(params, warmup):
    settings = Settings(optimizer="sgd", learning_rate=0.5, warmup_steps=warmup, max_grad_norm=1e9)
    descend = make_optimizer(settings, params)
    updates, _ = descend.update(jax.tree.map(np.ones_like, params), descend.init(params), params)
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], -0.5)


@pytest.fixture(scope="module")
def params():
    return load_model(Settings(model=str(TINY), max_new_tokens=8)).params


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_only_what_is_trainable_moves_and_only_its_gradient_is_clipped(params, optimizer):
    settings = Settings(
        trainable="wte|^h_0/.*bias",
        optimizer=optimizer,
        learning_rate=0.1,
        warmup_steps=1,
        max_grad_norm=0.5,
    )
    descend = make_optimizer(settings, params)
    updates, _ = descend.update(jax.tree.map(np.ones_like, params), descend.init(params), params)
    moved = {
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, update in jax.tree_util.tree_leaves_with_path(updates)
        if np.asarray(update).any()
    }
    biases = {
        f"h_0/{name}/bias"
        for name in ("attn/c_attn", "attn/c_proj", "ln_1", "ln_2", "mlp/c_fc", "mlp/c_proj")
    }
    assert moved == biases | {"wte/embedding"}
    if optimizer == "sgd":
        np.testing.assert_allclose(optax.tree.norm(updates), 0.1 * 0.5, rtol=1e-5)


def test_a_pattern_without_parameters_is_refused(params):
    with pytest.raises(
        RunError,
        match=r"--trainable 'lm_head' is in no parameter's path\. There are h_N/.*, wte/emb",
    ):
        make_optimizer(Settings(trainable="lm_head"), params)
    with pytest.raises(ValueError, match=r"--trainable must be a regular expression, got '\(wte'"):
        Settings(trainable="(wte")
