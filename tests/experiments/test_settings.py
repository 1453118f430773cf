"""What a command line stands for: every number of every command, within its range or refused;
paths; and the optimiser."""

import importlib
import types
import typing
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from experiments import _arguments
from experiments._programs import load_model
from experiments._run_folder import RunError
from experiments._settings import Settings, make_optimizer

from .commands import TINY, run

EXPERIMENTS = (
    "lexical_constraint",
    "sentiment_reward",
    "gender_balance",
    "conditional",
    "preference_pairs",
)
# Command -> the module of its Config, and what must be given besides.
COMMANDS = {
    **{name: (f"{name}.config", ()) for name in EXPERIMENTS},
    "compare": ("compare.config", ("--task", "lexical_constraint", "--objectives", "ppo")),
    "pretrain": ("pretrain.config", ()),
    "make_pairs": ("preference_pairs.make_pairs", ()),
    "evaluate": ("evaluate", ("--aligned", "folder", "lexical_constraint")),
    "generate": ("generate", ("--model", "folder", "--word", "great")),
    "bench": ("bench", ()),
    "kl_gradients": ("kl_gradients", ()),
    "tabulate": ("tabulate", ("folder",)),
    "plot": ("conditional.plot", ("folder",)),
}
VALUES = ("nan", "inf", "-1", "0", "1" + "0" * 400)


def config_of(command: str) -> type:
    return importlib.import_module(f"experiments.{COMMANDS[command][0]}").Config


def numbers(annotation) -> type | None:
    """int or float, if a field of this type has numbers, alone, in a tuple or perhaps none."""
    parts = {part for part in typing.get_args(annotation) if part not in (Ellipsis, types.NoneType)}
    found = {numbers(part) for part in parts} if parts else {annotation}
    return next(iter(found & {int, float}), None)


def numeric_fields(config: type) -> dict[str, tuple[type, int]]:
    """Field -> its type and how many words it takes."""
    hints = typing.get_type_hints(config)
    counts = {
        name: 2 if tuple[float, float] in typing.get_args(hint) else 1
        for name, hint in hints.items()
    }
    return {name: (numbers(hint), counts[name]) for name, hint in hints.items() if numbers(hint)}


CASES = [
    (command, name, *rest)
    for command in COMMANDS
    for name, rest in numeric_fields(config_of(command)).items()
] + [("lexical_constraint", name, *rest) for name, rest in numeric_fields(Settings).items()]


def test_every_command_is_in_the_table():
    """A file with a command line of its own, found by what it calls."""
    folder = Path(_arguments.__file__).parent
    files = {
        path
        for path in folder.rglob("*.py")
        if "sys.exit(run(Config" in path.read_text(encoding="utf-8")
    }
    assert {path.stem if path.name != "__main__.py" else path.parent.name for path in files} == set(
        COMMANDS
    )


def test_there_is_a_row_for_every_number_and_no_other():
    assert {name for _, name, *_ in CASES} == set(_arguments.RANGES)


@pytest.mark.parametrize(
    ("command", "name", "kind", "words"), CASES, ids=lambda x: str(x) if isinstance(x, str) else ""
)
def test_a_number_is_within_its_range_or_refused_in_a_sentence(
    command, name, kind, words, monkeypatch, capsys
):
    """On the parser, with main doing nothing; whether a value is refused is read off the table."""
    low, high = _arguments.RANGES[name]
    flag = _arguments.flag(name)
    chosen = []
    for value in (
        *VALUES,
        *(f"{bound:g}" if kind is float else str(bound) for bound in (low, high)),
    ):
        chosen.clear()
        given = [*COMMANDS[command][1], flag, *([value] if words == 1 else [value, "9e5"])]
        status = run(
            monkeypatch, config_of(command), lambda config: chosen.append(config) or 0, *given
        )
        number = float(value)
        allowed = low <= number <= high and (
            kind is float or ("." not in value and value not in ("nan", "inf"))
        )
        shown = capsys.readouterr().err
        joint = needs_more_than_its_range(command, name, number)
        assert status == (0 if allowed and not joint else 2), (value, shown)
        assert bool(chosen) == (status == 0)
        assert status == 0 or flag in shown
        assert "Traceback" not in shown


def needs_more_than_its_range(command: str, name: str, number: float) -> bool:
    """Where the meaning of a number depends on others."""
    return (command, name, number) in {
        ("pretrain", "n_embd", 1),
        ("pretrain", "n_head", 1024),
        ("pretrain", "n_positions", 2),
        ("pretrain", "vocab_size", 2),
        ("kl_gradients", "vocab_size", 2**20),
        ("kl_gradients", "max_tokens", 16),
        ("lexical_constraint", "samples", 1),
        ("lexical_constraint", "clip", 1e6),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--clip", 8, -8), "--clip is the lowest and then the highest f', got 8 -8"),
        (("--clip", 0, 0), "--clip is the lowest and then the highest f', got 0 0"),
        (("--smoothing", "1e-60"), "--smoothing must be 0 or at least 1e-30"),
        (("--seed", 2**32), "--seed must be at least 0 and at most 4294967295, got 4294967296"),
        (("--run-folder", ""), "a path must not be empty"),
        (("--run-folder", " "), "a path must not be empty"),
        (("--model", ""), "a path must not be empty"),
        (("--run-folder", "~nobody-here/run"), "~nobody-here"),
    ],
)
def test_a_value_that_cannot_be_is_refused(arguments, message, monkeypatch, capsys):
    assert run(monkeypatch, config_of("lexical_constraint"), lambda _: 0, *arguments) == 2
    shown = "".join(c for c in capsys.readouterr().err if c not in " \n│╭╮╰╯─")
    assert "".join(message.split()) in shown


def test_home_is_expanded_wherever_a_path_is_taken(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    chosen = []
    for command, (_, others) in COMMANDS.items():
        if command in ("compare", "tabulate", "plot", "evaluate"):
            continue
        hints = typing.get_type_hints(config_of(command), include_extras=True)
        paths = [name for name, hint in hints.items() if takes_a_path(hint)]
        given = [word for name in paths for word in (_arguments.flag(name), "~/x")]
        with_prompts = ["--prompts", "~/p"] if command == "conditional" else []
        run(
            monkeypatch,
            config_of(command),
            lambda config: chosen.append(config) or 0,
            *others,
            *given,
            *with_prompts,
        )
        for name in paths:
            assert str(getattr(chosen[-1], name)) in ("/home/me/x", "/home/me/p"), (command, name)
    everywhere = ("--task", "lexical_constraint", "--runs", "~/a", "~/b", "--folder", "~/c")
    run(monkeypatch, config_of("compare"), lambda config: chosen.append(config) or 0, *everywhere)
    assert chosen[-1].runs == (Path("/home/me/a"), Path("/home/me/b"))
    run(
        monkeypatch,
        config_of("lexical_constraint"),
        lambda c: chosen.append(c) or 0,
        "--model=~/m",
        "--run-folder=~/r",
    )
    assert (chosen[-1].settings.model, chosen[-1].settings.run_folder) == (
        "/home/me/m",
        Path("/home/me/r"),
    )


def takes_a_path(hint) -> bool:
    return hint in (Path, Path | None, _arguments.FolderOrName, _arguments.FolderOrName | None)


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
