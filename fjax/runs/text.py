"""Texts of models and users, as they are shown; and numbers of things."""

import re
from collections.abc import Iterator


def on_one_line(text: str) -> str:
    """A text as it is shown: spaces for line ends.

    Nothing in it would steer a terminal or hide itself.
    """
    shown = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def pieces(text: str, highlight: str) -> Iterator[tuple[str, bool]]:
    """A text on one line in pieces, each with whether the regular expression found it.

    >>> list(pieces("a great film", "great"))
    [('a ', False), ('great', True), (' film', False)]
    """
    shown, done = on_one_line(text), 0
    for found in re.finditer(highlight, shown) if highlight else ():
        yield shown[done : found.start()], False
        yield found.group(), True
        done = found.end()
    yield shown[done:], False


def count(number: int, noun: str) -> str:
    """'1 step', '200 steps'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
