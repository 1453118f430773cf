"""Stages on the command line: one word each, as ``forward_kl:9600:100``; and filter_sft as one."""

from collections.abc import Sequence
from functools import cache

from fjax import divergences
from fjax.runs.stages import Stage

FORM = "DIVERGENCE:SAMPLES:UPDATES, as in forward_kl:9600:100"

UPDATES_PER_STEP, LOOK_EVERY = 5, 5
"""Updates of a step, and steps between two looks at the held-out samples."""

FILTER_LOOK_EVERY, FILTER_PATIENCE = 2, 3
"""The same with ``--algorithm filter_sft``, which soon knows a few hits by heart; and after how
many looks without a new lowest divergence it ends."""


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


def parse_filter_stage(words: tuple[str, ...], samples: int, updates: int) -> Stage:
    """The one stage of filter_sft, early stopping included.

    Args:
        words: of ``--stages``, if any.
        samples: to draw, if there are none.
        updates: at most, if there are none.

    Raises:
        ValueError: for several stages, or one that does not descend forward KL.

    >>> stage = parse_filter_stage((), 11_520, 45)
    >>> stage.samples, stage.updates, stage.patience
    (11520, 45, 3)
    """
    first, *others = words or (f"forward_kl:{samples}:{updates}",)
    if others or not first.startswith("forward_kl:"):
        raise ValueError(
            f"--algorithm filter_sft draws once, from the base model, and raises the likelihood of "
            f"what the target keeps: leave --stages out, or give one, forward_kl:SAMPLES:UPDATES; "
            f"got {' '.join(words)}."
        )
    (stage,) = parse_stages((first,))
    return stage._replace(patience=FILTER_PATIENCE)


def count_steps(stages: Sequence[Stage], samples: int) -> int:
    """Of a run in these stages, with so many samples in a step that draws.

    >>> count_steps(parse_stages(("forward_kl:9600:100",)), 256)
    58
    """
    return sum(-(-s.samples // samples) + -(-s.updates // UPDATES_PER_STEP) for s in stages)


_by_name = cache(divergences.by_name)
"""The same f for the same name, so that stages share a compiled program."""
