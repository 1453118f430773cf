"""What a command line may say: every number within its range, every path with ~ expanded and none
of them empty."""

import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar, get_type_hints

import tyro

from fjax.runs import RunError

from .trl_flags import TRL_FLAGS

ConfigT = TypeVar("ConfigT")

MANY = 10**8
"""Steps, and whatever is counted in them: eight updates each, as of PPO, still fit into an
int32."""
ROWS = 2**20
"""Rows, columns and tokens that are held at once."""


class Range(NamedTuple):
    """Bounds of a number, both allowed; it must be finite anyway."""

    low: float
    high: float


RANGES = {
    "acceptance_rate": Range(1e-6, 1),
    "adam_learning_rate": Range(1e-12, 1e3),
    "base_fraction": Range(0, 0.9),
    "batch_size": Range(1, ROWS),
    "beta": Range(1e-6, 1e6),
    "candidates": Range(2, ROWS),
    "checkpoint_every": Range(1, MANY),
    "clip": Range(-1e6, 1e6),
    "dropout": Range(0, 0.9),
    "epochs": Range(1, 10_000),
    "eval_every": Range(1, MANY),
    "eval_samples": Range(1, 2**24),
    "exact_draws": Range(1, 2**30),
    "exact_samples": Range(1, ROWS),
    "fit_samples": Range(2, 2**24),
    "jobs": Range(1, 1024),
    "learning_rate": Range(1e-12, 1e3),
    "log_beta": Range(-1e6, 1e6),
    "lora_alpha": Range(1e-6, 1e6),
    "lora_rank": Range(1, 2**16),
    "max_grad_norm": Range(1e-9, 1e9),
    "max_new_tokens": Range(1, ROWS),
    "max_prompt_tokens": Range(1, ROWS),
    "max_prompts": Range(1, ROWS),
    "max_proposals": Range(1, MANY),
    "max_tokens": Range(1, 16),
    "microbatch_size": Range(1, ROWS),
    "minibatch_size": Range(2, ROWS),
    "moment": Range(-1e6, 1e6),
    "n_embd": Range(1, 2**16),
    "n_head": Range(1, 1024),
    "n_layer": Range(1, 1024),
    "n_positions": Range(2, ROWS),
    "pairs_per_prompt": Range(1, ROWS),
    "pairs_per_step": Range(1, ROWS),
    "patience": Range(1, MANY),
    "process": Range(0, 2**16 - 1),
    "processes": Range(1, 2**16),
    "prompts_per_batch": Range(1, ROWS),
    "prompts_per_step": Range(2, ROWS),  # for a single prompt there is lexical_constraint
    "proposal_every": Range(1, MANY),
    "resume_from": Range(0, MANY),
    "reward_beta": Range(1e-6, 1e6),
    "reward_max": Range(-1e6, 1e6),
    "reward_weights": Range(-1e6, 1e6),
    "rounds": Range(1, 10_000),
    "rows": Range(1, ROWS),
    "samples": Range(1, ROWS),
    "scoring_ms": Range(1, 10**6),
    "seed": Range(0, 2**32 - 1),  # a key of jax has 32 bits: 2³² would be 0 again
    "seeds": Range(0, 2**32 - 1),
    "share": Range(1e-6, 0.9999),
    "smoothing": Range(0, 0.999),
    "steps": Range(1, MANY),
    "stop_below": Range(1e-9, 1e6),
    "vocab_size": Range(2, ROWS),
    "vocabulary": Range(1, ROWS),
    "warmup_steps": Range(0, MANY),
    "weight_decay": Range(0, 10),
    "z_samples": Range(1, ROWS),
}
"""Of every number of every command, by its field. What depends on other fields too is for the
configuration to say."""


def check_numbers(config) -> None:
    """Whether each number of a configuration is finite and within its row of `RANGES`.

    Raises:
        ValueError: if one is not, with what is allowed.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _check(field.name, number)


def _check(name: str, number: float) -> None:
    low, high = RANGES[name]
    if not low <= number <= high:  # NaN is not, either
        shown = (
            number
            if isinstance(number, float) or abs(number) < 10**20
            else "a number of that many digits"
        )
        raise ValueError(
            f"{flag(name)} must be at least {_plain(low)} and at most {_plain(high)}, got {shown}."
        )


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def check_output(path: Path | None, flag: str) -> None:
    """Whether a file can be written there, before there is anything to write.

    Raises:
        RunError: if not.
    """
    if path is None:
        return
    if path.is_dir():
        raise RunError(f"{flag} {path} is a folder. Name a file.")
    if not path.parent.is_dir():
        raise RunError(f"There is no folder {path.parent} for {flag} {path}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RunError(f"{flag} {path} may not be written.")


def flag(name: str) -> str:
    """As it is given on the command line."""
    return f"--{name.replace('_', '-')}"


def parse(config: type[ConfigT], prog: str, arguments: Sequence[str] | None = None) -> ConfigT:
    """The configuration that a command line stands for; tyro ends the process where it cannot be
    read, and for --help.

    Raises:
        ValueError: for a value that its type allows and its meaning does not, and for a flag that
            TRL has and this command has not.
    """
    _check_foreign(config, sys.argv[1:] if arguments is None else arguments)
    description = as_called(inspect.cleandoc(config.__doc__ or ""), prog)
    return tyro.cli(config, prog=prog, description=description, args=arguments, registry=_REGISTRY)


def as_called(text: str, prog: str) -> str:
    """Examples as they are typed where the program is installed: there is no `experiments` there.

    >>> as_called("python -m experiments.rlhf --help", "fjax rlhf")
    'fjax rlhf --help'
    """
    return re.sub(r"python -m experiments[. ]", "fjax ", text) if prog.startswith("fjax ") else text


def _check_foreign(config: type, arguments: Sequence[str]) -> None:
    """Answers flags of TRL with ours; what stands after -- is another command's."""
    ours = set(map(flag, names_of(config)))
    for word in takewhile(lambda word: word != "--", arguments):
        theirs = word.partition("=")[0].replace("_", "-")
        if theirs in TRL_FLAGS and theirs not in ours:
            raise ValueError(f"There is no {theirs} here, which is TRL's: {TRL_FLAGS[theirs]}")


def names_of(config: type) -> Iterator[str]:
    """The fields of a configuration, those of the settings in it included."""
    for name, hint in get_type_hints(config).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from names_of(hint)
        else:
            yield name


def _expanded(text: str) -> str:
    if not text.strip():
        raise ValueError("a path must not be empty")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:  # ~nobody/
        raise ValueError(str(error)) from error


def _of_one_word(make) -> tyro.constructors.PrimitiveConstructorSpec:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=make.__name__.upper(),
        instance_from_str=lambda words: make(_expanded(words[0])),
        is_instance=lambda value: isinstance(value, make),
        str_from_instance=lambda value: [str(value)],
    )


FolderOrName = Annotated[str, _of_one_word(str)]
"""A model by its folder, in which ~ is expanded, or by its name; or whatever else is known by a
word."""

_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _path(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    return _of_one_word(Path) if info.type is Path else None
