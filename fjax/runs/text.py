"""Texts of models and users, as they are shown; and numbers of things."""


def on_one_line(text: str) -> str:
    """A text as it is shown: spaces for line ends.

    Nothing in it would steer a terminal or hide itself.
    """
    shown = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def count(number: int, noun: str) -> str:
    """'1 step', '200 steps'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
