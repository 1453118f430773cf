"""Files of prompts: a text on each line, or JSON lines of texts and conversations with whatever
else a reward wants to know of them."""

import codecs
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fjax.runs import RunError

from .functions import Taken

ROLES = ("system", "user", "assistant", "tool")
"""Who may speak in a conversation."""

COLUMNS = ("prompt", "messages")
"""Where a prompt stands in a JSON line, if nothing else is said."""

Messages = list[dict[str, str]]
"""A conversation: {"role": ..., "content": ...} of each message."""

LeftOut = dict[str, list[int]]
"""Why lines were left out -> their numbers."""


class Prompt(NamedTuple):
    """A prompt as its file has it.

    given: a text, or a conversation.
    columns: what else its line has, by name.
    number: of its line.
    messages: the conversation that is put through the chat template; none of a text that is
        continued as it stands.
    """

    given: str | Messages
    columns: Mapping[str, Any] = {}
    number: int = 0
    messages: Messages | None = None

    @property
    def text(self) -> str:
        """To be shown: the text, the only message, or each message behind its role."""
        if isinstance(self.given, str):
            return self.given
        if len(self.given) == 1:
            return self.given[0]["content"]
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.given)


def read_prompt_file(path: Path, *, column: str | None = None) -> tuple[list[Prompt], LeftOut]:
    """The prompts of a file, and the lines that were left out: blank ones, and repetitions.

    Of a .jsonl file each line is an object, whose ``column`` holds a text or a conversation; texts
    stay as they are. Of any other file each line is a text without the spaces around it: a model's
    words begin with their space, so it belongs to the continuation.

    Raises:
        RunError: if the file cannot be read or is empty, or for the first line that is no prompt.
    """
    found = _json_lines(path, column) if _is_json(path) else _text_lines(path)
    left_out: LeftOut = {"blank": [], "repeated": []}
    blank, repeated = left_out.values()
    kept: dict[str, Prompt] = {}
    for prompt in found:
        key = json.dumps([prompt.given, prompt.columns], sort_keys=True)
        if not prompt.given or (isinstance(prompt.given, str) and not prompt.given.strip()):
            blank.append(prompt.number)
        elif key in kept:
            repeated.append(prompt.number)
        else:
            kept[key] = prompt
    return list(kept.values()), left_out


def choose_columns(
    taken: Taken, prompts: Sequence[Prompt], title: str, *, but: Container[str]
) -> list[str]:
    """The columns that a function asks for by name, besides what it is given anyway.

    Raises:
        RunError: if it needs one that a line has not.
    """
    there = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    for name in taken.needed:
        without = [prompt.number for prompt in prompts if name not in prompt.columns]
        if name not in but and without:
            has = f"columns are {', '.join(map(repr, there))}" if there else "there are no columns"
            raise RunError(
                f"{title} asks for {name!r}, which {len(without)} of {len(prompts)} prompts have "
                f"not (line {without[0]} is the first); {has}."
            )
    return [name for name in there if name not in but and (taken.anything or name in taken.names)]


def _is_json(path: Path) -> bool:
    return path.suffix == ".jsonl"


def form(path: Path) -> str:
    """What a file of that name has to have."""
    return "one JSON object a line" if _is_json(path) else "one prompt a line"


def _text_lines(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        yield Prompt(line.strip(), number=number)


def _json_lines(path: Path, column: str | None) -> Iterator[Prompt]:
    for number, line in _lines(path):
        try:
            row = json.loads(line) if line.strip() else {"prompt": ""}
        except ValueError as error:
            raise RunError(f"Line {number} of {path} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise RunError(
                f'Line {number} of {path} is no JSON object like {{"prompt": "..."}}: {line:.80}'
            )
        name = _prompt_column(row, column) if line.strip() else "prompt"
        if name is None:
            raise RunError(_no_column(path, number, row, column))
        given = row.pop(name)
        wrong = what_is_wrong(given)
        if wrong:
            raise RunError(f"Line {number} of {path}: {name!r} {wrong}")
        yield Prompt(given, row, number, None if isinstance(given, str) else given)


def _prompt_column(row: Mapping[str, Any], column: str | None) -> str | None:
    names = COLUMNS if column is None else (column,)
    return next((name for name in names if name in row), None)


def _no_column(path: Path, number: int, row: Mapping[str, Any], column: str | None) -> str:
    wanted = " or ".join(map(repr, COLUMNS if column is None else (column,)))
    return (
        f"Line {number} of {path} has no column {wanted}, only "
        f"{', '.join(map(repr, row)) or 'none'}. Name the one with the prompts: --prompt-column."
    )


def what_is_wrong(given: Any) -> str | None:
    """With what should be a text or a conversation; None where nothing is."""
    if isinstance(given, str):
        return None
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        return f'must be a text or a list of {{"role", "content"}}, got {given!r:.80}.'
    for message in given:
        if not isinstance(message.get("content"), str):
            return f"has a message whose content is no text: {message!r:.120}."
        if message.get("role") not in ROLES:
            return f"has a message of {message.get('role')!r}; roles are {', '.join(ROLES)}."
    if given and all(message["role"] != "user" for message in given):
        return "has no message of the user, so there is nothing to answer."
    return None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"Cannot read the prompts {path}: {error.strerror}.") from error
    if not data.strip():
        raise RunError(f"{path} is empty. Give a text file with {form(path)}.")
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise RunError(
                f"Line {number} of {path} is not UTF-8 text ({error.reason}). Save the file as "
                f"UTF-8."
            ) from error
