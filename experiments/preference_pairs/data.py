"""Pairs of a chosen and a rejected continuation: lines of a file, then arrays, then the batch of
each step."""

import codecs
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax.runs import RunError
from fjax.training import PairBatch

from ..common.prompt_files import Messages, Prompt
from ..common.prompts import answer_ids, chat_ids, start_id, token_ids
from .conversations import prompt_and_answers

SHOWN = 5
"""Bad lines that a report names; there may be thousands."""
SCORED = 128
"""Rows that are scored at once under the base model."""

Score = Callable[[jax.Array, jax.Array], jax.Array]
"""(tokens, where) -> log-probability of each row under the base model."""


class Pair(NamedTuple):
    """A prompt and two continuations, which bring the space between with them; or a conversation
    and two answers of the assistant.

    ended: whether the text ended there, rather than being cut off; its end-of-sequence token counts
    only then.
    """

    prompt: str | Messages
    chosen: str
    rejected: str
    chosen_ended: bool = True
    rejected_ended: bool = True

    @property
    def shown(self) -> str:
        """The prompt as a text."""
        return Prompt(self.prompt).text


def as_line(pair: Pair) -> str:
    """A line of JSON; what has its default is left out."""
    written = {name: value for name, value in pair._asdict().items() if value is not True}
    return json.dumps(written)


def read_pairs(path: Path, *, skip_bad: bool) -> tuple[list[Pair], list[str]]:
    """The pairs of a file of JSON lines, and a report of the lines that were left out.

    Each line is an object with the texts "prompt", "chosen" and "rejected", and perhaps
    "chosen_ended" and "rejected_ended", true or false; or with conversations in their place, see
    `prompt_and_answers`. Other keys are not looked at.

    Raises:
        RunError: if the file cannot be read, is empty, has a bad line (unless those are skipped),
            or no good one.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise RunError(f"Cannot read the pairs {path}: {error.strerror}.") from error
    if not lines:
        raise RunError(
            f'{path} is empty. Give a file of JSON lines with "prompt", "chosen" and "rejected".'
        )
    pairs, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            pairs.append(_parse(line))
        except ValueError as error:
            bad.append(f"line {number} {error}")
    count = f"{len(bad)} of {len(lines)} lines"
    if bad and not (skip_bad and pairs):
        advice = (
            "Mend them, or use the rest with --skip-bad-lines."
            if pairs
            else "No line is left to be used."
        )
        raise RunError(f"{count} of {path} are bad, first {bad[0]}. {advice}")
    more = "; …" if len(bad) > SHOWN else ""
    return pairs, [f"{path}: {count} left out: {'; '.join(bad[:SHOWN])}{more}."] if bad else []


def _parse(line: bytes) -> Pair:
    """The pair of a line; a ValueError says what is wrong with it, as the rest of a sentence."""
    found = _object(line)
    for name in ("chosen", "rejected"):
        if name not in found:
            raise ValueError(f'has no "{name}"')
    prompt: str | Messages | None = None
    if any(_is_messages(found.get(name)) for name in ("prompt", "chosen", "rejected")):
        prompt, found["chosen"], found["rejected"] = prompt_and_answers(found)
        found["prompt"] = "a conversation"
    for name in ("prompt", "chosen", "rejected"):
        if name not in found:
            raise ValueError(f'has no "{name}"')
        if not isinstance(found[name], str):
            raise ValueError(f'has a "{name}" that is no text but {found[name]!r:.40}')
        if not found[name].strip():
            raise ValueError(f'has an empty "{name}"')
        if any("\ud800" <= character <= "\udfff" for character in found[name]):
            raise ValueError(
                f'has half a character in "{name}", which is no text (a lone surrogate)'
            )
    for name in ("chosen_ended", "rejected_ended"):
        if not isinstance(found.get(name, True), bool):
            raise ValueError(
                f'has a "{name}" that is neither true nor false but {found[name]!r:.40}'
            )
    if found["chosen"] == found["rejected"]:
        raise ValueError('has the same text as "chosen" and "rejected"')
    pair = Pair(**{name: found[name] for name in Pair._fields if name in found})
    return pair if prompt is None else pair._replace(prompt=prompt)


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def _object(line: bytes) -> dict:
    """The JSON object of a line, in which no key of a pair stands twice: which of the two were
    meant?"""
    try:
        found = json.loads(line.decode(), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply to be read") from error
    if not isinstance(found, dict):
        raise ValueError(f"is a JSON {type(found).__name__}, not an object")
    return found


def _once(items: list[tuple[str, object]]) -> dict:
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'has "{twice}" twice')
    return found


def to_batch(
    pairs: Sequence[Pair],
    tokenizer,
    score: Score,
    *,
    max_tokens: int,
    ends: Sequence[int] = (),
) -> tuple[PairBatch, list[str]]:
    """All pairs as arrays of one width, a multiple of 8, and a report of those that are too long.

    The log-probabilities under the base model are computed here, once, in batches of one size.

    Args:
        pairs: at least one.
        tokenizer: of the model.
        score: of the base model, compiled.
        max_tokens: longest row: start token, prompt, continuation and end; at most the model's
            positions.
        ends: the model's end tokens; the tokenizer's if none are given.

    Raises:
        RunError: if all are too long, or the chat template is missing or fails on a conversation.
    """
    ends = tuple(ends) or (tokenizer.eos_token_id,)
    both = [_rows(pairs, tokenizer, side, ends) for side in ("chosen", "rejected")]
    lengths = np.max([[len(row) for row, _ in rows] for rows in both], axis=0)
    kept = np.flatnonzero(lengths <= max_tokens)
    long = len(pairs) - len(kept)
    report = f"{long} of {len(pairs)} pairs have more than {max_tokens} tokens"
    if not len(kept):
        raise RunError(f"{report}, so that none is left.")
    width = -(-int(lengths[kept].max()) // 8) * 8
    arrays = [_padded([rows[i] for i in kept], width) for rows in both]
    log_a = [_in_batches(score, *part) for part in arrays]
    (chosen, chosen_where), (rejected, rejected_where) = (
        [jnp.asarray(x) for x in part] for part in arrays
    )
    batch = PairBatch(chosen, chosen_where, rejected, rejected_where, *log_a)
    return batch, [f"{report} and were left out."] if long else []


def _rows(
    pairs: Sequence[Pair], tokenizer, side: str, ends: Sequence[int]
) -> list[tuple[list[int], int]]:
    """(start token, prompt, continuation and end; how many of these come before the continuation)
    of each pair. A chat template brings its own start."""
    texts = [pair for pair in pairs if isinstance(pair.prompt, str)]
    prompts = iter(token_ids(tokenizer, [pair.shown for pair in texts]))
    continuations = iter(token_ids(tokenizer, [getattr(pair, side) for pair in texts]))
    rows = []
    for pair in pairs:
        if isinstance(pair.prompt, str):
            before = [start_id(tokenizer), *next(prompts)]
            after = [*next(continuations), tokenizer.eos_token_id]
        else:
            title = f"the pair of {pair.shown!r:.80}"
            before = chat_ids(tokenizer, pair.prompt, title)
            after = answer_ids(tokenizer, pair.prompt, getattr(pair, side), ends, title)
        ended = getattr(pair, f"{side}_ended")
        rows.append(([*before, *(after if ended else after[:-1])], len(before)))
    return rows


def _padded(rows: list[tuple[list[int], int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, where), with zeros on the right, which count no more than the prompts do."""
    tokens, where = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, (row, begins) in enumerate(rows):
        tokens[i, : len(row)] = row
        where[i, begins : len(row)] = True
    return tokens, where


def _in_batches(score: Score, tokens: np.ndarray, where: np.ndarray) -> jax.Array:
    """Scores of all rows, the last batch filled up with earlier rows."""
    count = len(tokens)
    rows = np.arange(-(-count // SCORED) * SCORED).reshape(-1, SCORED) % count
    scores = [score(jnp.asarray(tokens[some]), jnp.asarray(where[some])) for some in rows]
    return jnp.concatenate(scores)[:count]


def batch_at(pairs: PairBatch, step: int, *, batch_size: int, seed: int) -> PairBatch:
    """The batch of a step: a function of seed and step alone, so that a resumed run goes on as if
    never interrupted.

    Each epoch goes through the pairs in an order of its own, and leaves out those that do not fill
    a batch.

    Raises:
        RunError: if there are fewer pairs than a batch has.
    """
    count = len(pairs.chosen_tokens)
    if count < batch_size:
        raise RunError(
            f"There are {count} pairs to be used, fewer than the {batch_size} of a step. Take "
            f"smaller steps."
        )
    epoch, place = divmod(step, count // batch_size)
    rows = np.random.default_rng((seed, epoch)).permutation(count)[
        place * batch_size : (place + 1) * batch_size
    ]
    return jax.tree.map(lambda x: x[rows], pairs)
