"""Pieces of Markdown, of texts that a model or a user wrote."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence


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


def front_matter(fields: Mapping[str, str | Sequence[str]]) -> str:
    """What the hub reads of a page, in YAML, of which JSON is a part.

    >>> print(front_matter({"license": "cc-by-4.0", "tags": ["fjax", "a: b"]}))
    ---
    license: cc-by-4.0
    tags: [fjax, "a: b"]
    ---
    """
    shown = {
        name: _word(value) if isinstance(value, str) else f"[{', '.join(map(_word, value))}]"
        for name, value in fields.items()
    }
    return "\n".join(["---", *(f"{name}: {value}" for name, value in shown.items()), "---"])


def _word(text: str) -> str:
    """As it is where YAML takes it for nothing but a text: no number, no date, no truth value."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in _NOT_TEXT
    return text if plain else json.dumps(text, ensure_ascii=False)


_NOT_TEXT = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
