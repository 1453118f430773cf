"""Stages on the command line: one word each, as ``forward_kl:9600:100``."""

from functools import cache

from fjax import divergences
from fjax.runs.stages import Stage

FORM = "DIVERGENCE:SAMPLES:UPDATES, as in forward_kl:9600:100"


def parse_stage(word: str) -> Stage:
    """``forward_kl:9600:100``: forward KL, 9,600 samples to draw first, 100 updates.

    Raises:
        ValueError: for anything else, with what is allowed.

    >>> stage = parse_stage("alpha=0.5:3200:75")
    >>> stage.samples, stage.updates
    (3200, 75)
    """
    name, *numbers = word.split(":")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"--stages {word!r} is not {FORM}: a divergence and two whole numbers.")
    samples, updates = map(int, numbers)
    if updates < 1:
        raise ValueError(f"--stages {word!r} makes no update; give at least 1.")
    try:
        divergence = _by_name(name)
    except ValueError as error:
        raise ValueError(f"--stages {word!r}: {error}") from error
    return Stage(divergence, samples, updates)


def parse_stages(words: tuple[str, ...]) -> tuple[Stage, ...]:
    """All of them, in order.

    Raises:
        ValueError: if one cannot be read, or the first draws nothing.
    """
    stages = tuple(map(parse_stage, words))
    if stages and stages[0].samples < 1:
        raise ValueError(f"--stages: the first, {words[0]!r}, must draw samples.")
    return stages


_by_name = cache(divergences.by_name)
"""The same f for the same name, so that stages share a compiled program."""
