"""Pairs that are conversations: which messages are the prompt, and what the assistant answers."""

from collections.abc import Sequence
from typing import Any

from ..common.prompt_files import Messages, what_is_wrong


def prompt_and_answers(found: dict[str, Any]) -> tuple[Messages, str, str]:
    """The messages of the prompt, and the two answers of a line in which one of "prompt", "chosen"
    and "rejected" is a list of messages.

    "prompt" may be messages, or what the user says, and is left out where "chosen" and "rejected"
    are whole conversations: then it is their common beginning. Each of these is an answer as a
    text, as one message of the assistant, or behind the prompt's messages again.

    Raises:
        ValueError: if they are none of that, as the rest of a sentence about the line.
    """
    for name in ("prompt", "chosen", "rejected"):
        _check_messages(name, found.get(name))
    if "prompt" in found:
        given = found["prompt"]
        prompt = [{"role": "user", "content": given}] if isinstance(given, str) else given
    else:
        prompt = _common_beginning(found["chosen"], found["rejected"])
    if all(message["role"] != "user" for message in prompt):
        raise ValueError("has no message of the user before the answers, so nothing to answer")
    chosen, rejected = (_answer(name, found[name], prompt) for name in ("chosen", "rejected"))
    return prompt, chosen, rejected


def _check_messages(name: str, given: Any) -> None:
    if given is None or isinstance(given, str):
        return
    # whether a user speaks is asked of the prompt alone
    wrong = what_is_wrong(given if name == "prompt" else [*given, {"role": "user", "content": ""}])
    if not given or wrong:
        raise ValueError(f'has a "{name}" that {wrong or "is empty"}'.rstrip("."))


def _common_beginning(chosen: Any, rejected: Any) -> Messages:
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError('has no "prompt", and "chosen" and "rejected" are not both conversations')
    same = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        same += 1
    if same == len(chosen) == len(rejected):
        raise ValueError('has the same conversation as "chosen" and "rejected"')
    if not same:
        raise ValueError(
            'has no "prompt", and "chosen" and "rejected" begin with different messages: their '
            "common beginning would be it"
        )
    return chosen[:same]


def _answer(name: str, given: str | Messages, prompt: Messages) -> str:
    if isinstance(given, str):
        return given
    answer = given[len(prompt) :] if given[: len(prompt)] == prompt else given
    if [message["role"] for message in answer] != ["assistant"]:
        raise ValueError(
            f'has a "{name}" with the messages of {_roles(given)}, and its prompt has '
            f"{_roles(prompt)}: what follows a prompt is one message of the assistant"
        )
    return answer[0]["content"]


def _roles(messages: Sequence[dict[str, str]]) -> str:
    return ", ".join(message["role"] for message in messages) or "nobody"
