"""Prompts: encoded for the sampler, read from a file, or the openings of sentences that no model
has seen."""

import codecs
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fjax.rollouts import Prompts
from fjax.runs import RunError

from .corpora import held_out, read_labels
from .settings import BUILT_IN

SHOWN = 8
"""Line numbers that a report names; there may be thousands."""


def encode(texts: Sequence[str], tokenizer, *, references: Sequence[str] | None = None) -> Prompts:
    """Token ids of at least one prompt."""
    end = tokenizer.eos_token_id
    rows = [[end, *ids] for ids in token_ids(tokenizer, texts)]
    width = max(map(len, rows))
    tokens = np.array([[end] * (width - len(row)) + row for row in rows], np.int32)
    where = np.arange(width) >= width - np.array([[len(row)] for row in rows])
    return Prompts(
        list(texts), tokens, where, [""] * len(texts) if references is None else list(references)
    )


def token_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Of each text, and nothing before or after it; a text that spells a special token has its
    characters, not the token.

    Every text that experiments are given goes through here, so that they alone say where one ends.

    Raises:
        RunError: if the tokenizer reads something in a text as its end token all the same, as an
            unknown word may be.
    """
    rows = _characters(tokenizer, texts)
    for text, row in zip(texts, rows, strict=True):
        if tokenizer.eos_token_id in row:
            raise RunError(
                f"The tokenizer reads a part of {text!r:.80} as its end token "
                f"{tokenizer.eos_token!r}, as it does with what "
                "it does not know. Leave that part out, or take a model that knows it."
            )
    return rows


def _characters(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    # Not verbose: whoever asks compares the lengths with the model's positions, and says more than
    # transformers would.
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return tokenizer(list(texts), **options).input_ids if texts else []


def read_prompts(path: Path, tokenizer, *, max_tokens: int) -> tuple[Prompts, list[str]]:
    """The prompts of a text file, one a line, and a report of each kind of line that was left out.

    Spaces around a prompt are dropped: a model's words begin with their space, so it belongs to the
    continuation. Left out are blank lines, repetitions of an earlier line, prompts of more than
    ``max_tokens`` tokens of their own, and those that `token_ids` refuses.

    Raises:
        RunError: if the file cannot be read, is empty, or nothing of it is left.
    """
    lines = _read_lines(path)
    first = {text: number for number, text in reversed(list(enumerate(lines, 1))) if text}
    rows = dict(zip(first, _characters(tokenizer, list(first)), strict=True))
    left_out: dict[str, list[int]] = {
        "blank": [],
        "repeated": [],
        f"longer than {max_tokens} tokens": [],
        f"read as {tokenizer.eos_token!r} by the tokenizer, in part": [],
    }
    blank, repeated, long, unknown = left_out.values()
    kept = []
    for number, text in enumerate(lines, 1):
        if not rows.get(text):
            blank.append(number)
        elif first[text] != number:
            repeated.append(number)
        elif len(rows[text]) > max_tokens:
            long.append(number)
        elif tokenizer.eos_token_id in rows[text]:
            unknown.append(number)
        else:
            kept.append(text)
    reports = [
        f"{path}, left out as {why}: {_count(numbers)}."
        for why, numbers in left_out.items()
        if numbers
    ]
    if not kept:
        raise RunError(
            f"There is no prompt in {path}. {' '.join(reports)} Give a text file with one prompt a "
            f"line."
        )
    return encode(kept, tokenizer), reports


def _read_lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"Cannot read the prompts {path}: {error.strerror}.") from error
    if not data.strip():
        raise RunError(f"{path} is empty. Give a text file with one prompt a line.")
    lines = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        try:
            lines.append(line.decode().strip())
        except UnicodeDecodeError as error:
            raise RunError(
                f"Line {number} of {path} is not UTF-8 text ({error.reason}). Save the file as "
                f"UTF-8."
            ) from error
    return lines


def _count(numbers: list[int]) -> str:
    """'1 line (4)', '3 lines (4, 5, 9)'."""
    shown = ", ".join(map(str, numbers[:SHOWN])) + (", …" if len(numbers) > SHOWN else "")
    return f"{len(numbers)} line{'s' if len(numbers) > 1 else ''} ({shown})"


def openings(tokenizer, *, words: int = 4) -> tuple[Prompts, Prompts]:
    """The built-in contexts: the first words of held-out review snippets, in two parts without a
    common opening.

    Of the sentences of 8 to 30 words that neither the built-in model nor the built-in reward has
    seen, the rest being the reference.

    Returns:
        About two thirds of them to align on, and the others, by a hash and in an order of it that
        is as good as random.
    """
    found = {}
    for text in sorted(read_labels(BUILT_IN.parent)):
        if held_out(text) and 8 <= len(text.split()) <= 30:
            opening = " ".join(text.split()[:words])
            found.setdefault(opening, text.removeprefix(opening))
    by_hash = sorted(found, key=_digest)
    unseen = [opening for opening in by_hash if _digest(opening)[-1] % 3 == 0]
    training = [opening for opening in by_hash if _digest(opening)[-1] % 3]
    both = [
        encode(part, tokenizer, references=[found[opening] for opening in part])
        for part in (training, unseen)
    ]
    return both[0], both[1]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
