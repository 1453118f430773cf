"""Tables in Markdown, of texts that a model or a user wrote."""

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of cells, the first the header; cells that are not ours go through `as_text` before.

    >>> print(table(["what", "n"], [["a", "1"]]))
    | what | n |
    | --- | --- |
    | a | 1 |
    """
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_text(value: object) -> str:
    r"""Anything on one line, as itself: nothing in it is markup, a link or the end of a cell.

    >>> print(as_text("a|b <i> *c*\nd"))
    a\|b &lt;i> \*c\* d
    """
    shown = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", shown)
