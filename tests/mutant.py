"""What a mutant is."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One line of code, and what becomes of it.

    Attributes:
        what: is broken, in words.
        path: of the file.
        before: what stands there, exactly once.
        after: what is put in its place.
        tests: files that must notice, separated by spaces.
    """

    what: str
    path: str
    before: str
    after: str
    tests: str


def of(path: str, tests: str, *breaks: tuple[str, str, str]) -> list[Mutant]:
    """Several of one file."""
    return [Mutant(what, path, before, after, tests) for what, before, after in breaks]
