"""The prompts of a task: what can be set of them, and how they become those to align on and those
to evaluate on."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fjax.hosts import say
from fjax.models import LanguageModel
from fjax.rollouts import Contexts, Prompts
from fjax.runs import RunError

from .arguments import check_numbers
from .build import check_positions
from .prompt_files import Prompt, read_prompt_file
from .prompts import TooLong, openings, tokenize
from .settings import Settings


@dataclass(frozen=True)
class PromptOptions:
    """What can be set of prompts on the command line of a task that has some."""

    prompts: Path | None = None
    """A file of prompts to align on. Of a .jsonl each line is an object with a "prompt" (a text, or
    a list of messages {"role", "content"}, which go through the tokenizer's chat template) or
    "messages", and further columns, whatever functions ask for. Of any other file each line is a
    text. Built in: the first words of film-review sentences that the model has not seen."""
    prompt: str | None = None
    """One prompt in place of a file: it is aligned on and evaluated on."""
    unseen_prompts: Path | None = None
    """Such a file of prompts to evaluate on. Without it every fourth of --prompts is kept for
    that."""
    prompt_column: str | None = None
    """The column of a .jsonl that has the prompts, if neither "prompt" nor "messages"."""
    chat: bool = False
    """Put texts through the chat template, too, each as what a user says."""
    system: str | None = None
    """A system message for every conversation that has none."""
    prompts_per_step: int = 16
    """Prompts a step; each gets --samples divided by this."""
    max_prompt_tokens: int = 32
    """Longest prompt, in tokens; of a conversation all that the chat template makes count."""
    prompts_too_long: TooLong | None = None
    """What becomes of longer ones: drop, as without it, leaves them out, and counts them; cut takes
    the end of a text, and less of the oldest messages of a conversation; refuse ends the run before
    it begins."""
    normalizer: Literal["per-context", "global"] = "per-context"
    """per-context: each prompt has its own Z_c. global: one Z for all, as if prompts and
    continuations had one joint target; the prompts where the target is easy then take over. To see
    what it does wrong."""
    z_samples: int = 128
    """Samples of the base model for each prompt to evaluate on, drawn once before the first
    evaluation: its Z_c is estimated from them. Prompts where none of them has P > 0 are left out of
    all figures, and counted."""

    def __post_init__(self):
        check_numbers(self)
        if self.unseen_prompts is not None and self.prompts is None:
            raise ValueError(
                "--unseen-prompts go with --prompts; the built-in prompts have unseen ones of "
                "their own."
            )
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("Give one --prompt, or a file of --prompts; not both.")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt must not be empty.")
        for name in ("chat", "system", "prompt_column"):
            if getattr(self, name) and self.prompts is None and self.prompt is None:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} goes with --prompts; the built-in ones are texts.")


def read_all(options: PromptOptions) -> list[Prompt]:
    """The prompts of all files, before there is a tokenizer; one like the built-in ones without.

    Raises:
        RunError: if a file cannot be read, or a line is no prompt.
    """
    if options.prompt is not None:
        return [Prompt(options.prompt)]
    paths = [path for path in (options.prompts, options.unseen_prompts) if path is not None]
    found = (read_prompt_file(path, column=options.prompt_column)[0] for path in paths)
    return [prompt for prompts in found for prompt in prompts] or [Prompt("a prompt")]


def make_contexts(options: PromptOptions, settings: Settings, model: LanguageModel) -> Contexts:
    """The prompts to align on and to evaluate on, each a `Prompt` in ``given``; what was left out
    of a file is said.

    Raises:
        RunError: for whatever is wrong with a file, a prompt in both, or one without room in the
            model.
    """
    training, unseen = _prompts(options, model.tokenizer)
    longest = max(prompts.tokens.shape[1] for prompts in (training, unseen))
    check_positions(settings, model, longest)
    global_z = options.normalizer == "global"
    per_step = 1 if options.prompt is not None else options.prompts_per_step
    return Contexts(training, unseen, per_step, global_z=global_z, z_samples=options.z_samples)


def _prompts(options: PromptOptions, tokenizer) -> tuple[Prompts, Prompts]:
    if options.prompt is not None:
        alone = _load(options, Path("--prompt"), tokenizer)
        return alone, alone
    if options.prompts is None:
        training, unseen = openings(tokenizer)
        return _as_given(training), _as_given(unseen)
    training = _load(options, options.prompts, tokenizer)
    if options.unseen_prompts is None:
        return _apart(training)
    unseen = _load(options, options.unseen_prompts, tokenizer)
    keys = set(_keys(unseen))
    known = [p for key, p in zip(_keys(training), training.texts, strict=True) if key in keys]
    if known:
        raise RunError(
            f"{len(known)} prompts are in both files, {sorted(known)[0]!r:.200} first. Unseen "
            f"prompts must not be aligned on."
        )
    return training, unseen


def _as_given(prompts: Prompts) -> Prompts:
    return prompts._replace(given=list(map(Prompt, prompts.texts)))


def _load(options: PromptOptions, path: Path, tokenizer) -> Prompts:
    if options.prompt is None:
        found = read_prompt_file(path, column=options.prompt_column)
    else:
        found = [Prompt(options.prompt, number=1)], {}
    given = options.max_prompt_tokens, options.prompts_too_long or "drop"
    prompts, reports = tokenize(
        path, *found, tokenizer, *given, chat=options.chat, system=options.system
    )
    for report in reports:
        say(report)
    return prompts


def load_file(options: PromptOptions, path: Path, tokenizer) -> Prompts:
    """The prompts of another file, as the options have it; what was left out is said.

    Raises:
        RunError: for whatever is wrong with it.
    """
    return _load(dataclasses.replace(options, prompts=path, prompt=None), path, tokenizer)


def _keys(prompts: Prompts) -> list[str]:
    """What is asked, whatever its other columns."""
    return [json.dumps(prompt.given) for prompt in prompts.given or []]


def _apart(prompts: Prompts) -> tuple[Prompts, Prompts]:
    """Three of four to align on, and the fourth; those that ask the same stay together."""
    keys = _keys(prompts)
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    kept = np.array([order[key] % 4 == 3 for key in keys])
    return _some(prompts, ~kept), _some(prompts, kept)


def _some(prompts: Prompts, rows: np.ndarray) -> Prompts:
    def of(value: Any) -> Any:
        return (
            value[rows]
            if isinstance(value, np.ndarray)
            else [value[i] for i in np.flatnonzero(rows)]
        )

    return Prompts(*map(of, prompts))
