"""Prompts as the sampler wants them: from files, put through the tokenizer's chat template where
they are conversations, or the openings of sentences that no model has seen."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fjax.rollouts import Prompts
from fjax.runs import RunError

from .corpora import held_out, read_labels
from .prompt_files import LeftOut, Messages, Prompt, form, read_prompt_file
from .settings import BUILT_IN

SHOWN = 8
"""Line numbers that a report names; there may be thousands."""

TooLong = Literal["drop", "cut", "refuse"]
"""What becomes of prompts that are too long."""


def encode(texts: Sequence[str], tokenizer, *, references: Sequence[str] | None = None) -> Prompts:
    """Token ids of at least one prompt."""
    rows = [[start_id(tokenizer), *ids] for ids in token_ids(tokenizer, texts)]
    given = [""] * len(texts) if references is None else list(references)
    return Prompts(list(texts), *_padded(rows, tokenizer), given)


def start_id(tokenizer) -> int:
    """The token that stands before a text, as `fjax.models.LanguageModel.bos_id` has it."""
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def _padded(rows: Sequence[list[int]], tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and where, padded on the left."""
    end, width = tokenizer.eos_token_id, max(map(len, rows))
    tokens = np.array([[end] * (width - len(row)) + row for row in rows], np.int32)
    return tokens, np.arange(width) >= width - np.array([[len(row)] for row in rows])


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
    """`load_prompts` for whoever wants no more of a prompt than its text; conversations stay."""
    prompts, reports = load_prompts(path, tokenizer, max_tokens=max_tokens)
    if any(prompt.messages for prompt in prompts.given or []):
        return prompts, reports
    return prompts._replace(given=None), reports


def load_prompts(
    path: Path,
    tokenizer,
    *,
    max_tokens: int,
    too_long: TooLong = "drop",
    column: str | None = None,
    chat: bool = False,
    system: str | None = None,
) -> tuple[Prompts, list[str]]:
    """The prompts of a file, each a `Prompt` in ``given``, and a report of each kind of line that
    was left out or cut.

    Left out are blank lines, repetitions of an earlier line, prompts of more than ``max_tokens``
    tokens (a text's own; of a conversation all), and texts that `token_ids` refuses. A text is cut
    from the left, a conversation in its messages, the oldest first.

    Args:
        path: see `read_prompt_file`.
        tokenizer: of the model.
        max_tokens: longest prompt.
        too_long: leave longer ones out, cut them, or end here.
        column: of JSON lines, the one that holds the prompts.
        chat: whether a text is what a user says, rather than to be continued.
        system: said before each conversation that has no such message.

    Raises:
        RunError: if the file cannot be read, a line is no prompt, the chat template is missing or
            fails, a prompt is too long where that is refused, or nothing is left.
    """
    found = read_prompt_file(path, column=column)
    return tokenize(path, *found, tokenizer, max_tokens, too_long, chat=chat, system=system)


def tokenize(
    source: Path,
    prompts: Sequence[Prompt],
    left_out: LeftOut,
    tokenizer,
    max_tokens: int,
    too_long: TooLong,
    *,
    chat: bool,
    system: str | None,
) -> tuple[Prompts, list[str]]:
    """`load_prompts` of those that have been read; ``source`` is where they are from, in
    messages."""
    prompts = [_as_chat(p, system) if chat or p.messages else p for p in prompts]
    if system and not any(prompt.messages for prompt in prompts):
        raise RunError(f"--system is for conversations, and {source} has none: add --chat.")
    kept, rows, said = _fitting(source, prompts, left_out, tokenizer, max_tokens, too_long)
    reports = [f"{source}, {what}: {_count(numbers)}." for what, numbers in said.items() if numbers]
    if not kept:
        raise RunError(
            f"There is no prompt in {source}. {' '.join(reports)} Give a text file with "
            f"{form(source)}."
        )
    references = [str(prompt.columns.get("reference") or "") for prompt in kept]
    texts = [prompt.text for prompt in kept]
    return Prompts(texts, *_padded(rows, tokenizer), references, kept), reports


def _fitting(
    path: Path,
    prompts: Sequence[Prompt],
    left_out: LeftOut,
    tokenizer,
    most: int,
    too_long: TooLong,
) -> tuple[list[Prompt], list[list[int]], LeftOut]:
    """Those that can be prompts, all tokens of each, and which lines were left out or cut."""
    long, unknown, cut, kept, rows = [], [], [], [], []
    for prompt, whole in zip(prompts, _token_rows(path, prompts, tokenizer), strict=True):
        shorten = too_long == "cut" and len(whole) > most
        row = _cut(path, prompt, whole, tokenizer, most) if shorten else whole
        if len(row) > most:
            _check_may_drop(path, prompt, len(row), most, too_long)
            long.append(prompt.number)
        elif prompt.messages is None and tokenizer.eos_token_id in row:
            unknown.append(prompt.number)
        else:
            kept.append(prompt)
            rows.append(row if prompt.messages else [start_id(tokenizer), *row])
            cut += [prompt.number] if shorten else []
    why = {
        **left_out,
        f"longer than {most} tokens": long,
        f"read as {tokenizer.eos_token!r} by the tokenizer, in part": unknown,
    }
    said = {f"left out as {name}": numbers for name, numbers in why.items()}
    return kept, rows, said | {f"cut to {most} tokens": cut}


def _as_chat(prompt: Prompt, system: str | None) -> Prompt:
    messages = prompt.messages or [{"role": "user", "content": str(prompt.given)}]
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return prompt._replace(messages=messages)


def _token_rows(path: Path, prompts: Sequence[Prompt], tokenizer) -> list[list[int]]:
    """Token ids of each: of a text its own, of a conversation all that the template makes."""
    texts = [prompt.text for prompt in prompts if prompt.messages is None]
    of_texts = iter(_characters(tokenizer, texts))
    return [
        next(of_texts)
        if prompt.messages is None
        else chat_ids(tokenizer, prompt.messages, f"line {prompt.number} of {path}")
        for prompt in prompts
    ]


def chat_ids(tokenizer, messages: Messages, title: str) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks, or goes on: what the chat
    template makes of it, which brings its own start and its own end tokens.

    Raises:
        RunError: if there is no template, it fails, or ends with the end of a sequence.
    """
    _check_template(tokenizer, title)
    begun = messages[-1]["role"] == "assistant"
    turn = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
    ids = _template(tokenizer, messages, title, **turn)
    if ids[-1:] == [tokenizer.eos_token_id]:
        raise RunError(
            f"The chat template ends {title} with {tokenizer.eos_token!r}, after which nothing can "
            f"follow: it has no add_generation_prompt. Take a model whose template has one."
        )
    return ids


def answered_ids(tokenizer, messages: Messages, answer: str) -> list[int]:
    """Token ids of a conversation with the assistant's answer, which goes on with what it had
    begun.

    Raises:
        RunError: if there is no template, or it fails.
    """
    *before, last = messages
    if last["role"] == "assistant":
        messages, answer = before, last["content"] + answer
    whole = [*messages, {"role": "assistant", "content": answer}]
    _check_template(tokenizer, "a prompt")
    return _template(tokenizer, whole, "a prompt and its answer")


def _check_template(tokenizer, title: str) -> None:
    if tokenizer.chat_template is None:
        raise RunError(
            f"{title} is a conversation, and the tokenizer has no chat template. Take a model that "
            f"has one (chat_template in tokenizer_config.json), or give texts."
        )


def answer_ids(
    tokenizer, messages: Messages, answer: str, ends: Sequence[int], title: str
) -> list[int]:
    """Token ids of the assistant's answer to a conversation, behind those of `chat_ids`: what the
    chat template writes of it, up to the token of ``ends`` that ends the turn, which is the last.

    Raises:
        RunError: if there is no template, it fails, or writes the conversation otherwise once it is
            answered; or if the answer spells an end token.
    """
    _check_template(tokenizer, title)
    before = _rendered(tokenizer, messages, title, add_generation_prompt=True)
    whole = [*messages, {"role": "assistant", "content": answer}]
    after = _rendered(tokenizer, whole, title)
    if not after.startswith(before):
        raise RunError(
            f"The chat template writes {title} otherwise once it is answered, so that it cannot be "
            f"told which tokens are the answer's. Give such pairs as texts."
        )
    ids = _ids(tokenizer, after.removeprefix(before))
    found = [i for i, token in enumerate(ids) if token in ends]
    if len(found) > 1:
        raise RunError(
            f"An answer to {title} spells an end token, {tokenizer.decode(ids[found[0]])!r}: "
            f"{answer!r:.100}. Leave it out of the text; the chat template puts one behind it."
        )
    return ids[: found[0] + 1] if found else [*ids, ends[0]]


def _template(tokenizer, messages: Messages, title: str, **turn: bool) -> list[int]:
    return _ids(tokenizer, _rendered(tokenizer, messages, title, **turn))


def _ids(tokenizer, rendered: str) -> list[int]:
    return tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids


def _rendered(tokenizer, messages: Messages, title: str, **turn: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **turn)
    except Exception as error:  # a template is a program, which may fail in any way
        raise RunError(
            f"The chat template fails on {title}, {type(error).__name__}: {error!s:.300}"
        ) from error


def _cut(path: Path, prompt: Prompt, row: list[int], tokenizer, most: int) -> list[int]:
    """The end of a text; a conversation with less in its messages, the template being whole."""
    if prompt.messages is None:
        return row[-most:]
    messages = [dict(message) for message in prompt.messages]
    for message in messages:
        own = _characters(tokenizer, [message["content"]])[0]
        # By one more each time it is still too long: pieces of a text may tokenize as more.
        while len(row) > most and own and message["role"] != "system":
            own = own[len(row) - most :]
            message["content"] = tokenizer.decode(own)
            row = chat_ids(tokenizer, messages, f"line {prompt.number} of {path}")
    return row


def _check_may_drop(path: Path, prompt: Prompt, tokens: int, most: int, too_long: TooLong) -> None:
    if too_long == "refuse":
        raise RunError(
            f"Line {prompt.number} of {path} has {tokens} tokens, and --max-prompt-tokens is "
            f"{most}. Raise that, or leave such prompts out or cut them: --prompts-too-long drop "
            f"or cut."
        )


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
