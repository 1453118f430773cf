"""What can be asked of a continuation, given its prompt."""

import re

TURNS = {"but", "yet", "though", "although", "however", "despite"}


def turns(prompt: str, continuation: str) -> bool:
    """Whether the continuation turns against its opening: one of `TURNS`, and none that the prompt
    has already."""
    return bool(_words(continuation) & TURNS - _words(prompt))


def repeats(prompt: str, continuation: str) -> bool:
    """Whether the continuation uses a word of the prompt again, of three letters or more."""
    return not _words(prompt).isdisjoint(_words(continuation))


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"[^\W\d_]+", text.lower()) if len(word) >= 3}
