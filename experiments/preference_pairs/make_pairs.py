"""Preference pairs of the base model's own continuations:
python -m experiments.preference_pairs.make_pairs --help.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fjax
from fjax.models import LanguageModel
from fjax.rollouts import Prompts, make_decode, make_sample_fn
from fjax.runs import RunError
from fjax.runs.endings import leave
from fjax.runs.folder import write_text

from ..common.arguments import FolderOrName, check_numbers, check_output
from ..common.build import check_positions, load_model
from ..common.command import run
from ..common.prompts import openings, read_prompts
from ..common.rewards import make_answer_reward
from ..common.settings import ASSETS, Settings
from .data import Pair, as_line

Reward = Callable[[Sequence[Any], Sequence[str]], np.ndarray]
"""(prompts, continuations) -> one number each."""

ROWS = 256
"""Continuations that are drawn at once, about."""


@dataclass(frozen=True)
class Config:
    """Pairs of continuations of each prompt, drawn from the base model and labelled by a reward, as
    JSON lines.

    Examples:

        python -m experiments.preference_pairs.make_pairs
        python -m experiments.preference_pairs.make_pairs \\
            --labels bradley-terry --output my_pairs.jsonl
        python -m experiments.preference_pairs.make_pairs \\
            --reward my_module:my_rewards --prompts my_prompts.txt
    """

    output: Path = Path("pairs.jsonl")
    """The file to write; must not be there yet."""
    labels: Literal["best-worst", "bradley-terry"] = "best-worst"
    """best-worst: of each --candidates continuations the one with the highest reward against the
    one with the lowest. bradley-terry: any two, the first being chosen with probability σ(r - r'),
    as people who are not always sure would."""
    model: FolderOrName = "built-in"
    """The base model: built-in, a local folder, or a name on the Hugging Face hub."""
    prompts: Path | None = None
    """A text file of prompts, one a line, or JSON lines with texts or conversations, as for rlhf;
    of these the pairs are conversations. Built in: openings of held-out film-review sentences,
    those that experiments train on."""
    max_prompt_tokens: int = 32
    """Longer prompts of a file are left out, and counted."""
    pairs_per_prompt: int = 8
    """Pairs of each prompt."""
    candidates: int = 4
    """Continuations that compete for a pair, with --labels best-worst."""
    max_new_tokens: int = 32
    """Longest continuation, in tokens; one that has not ended by then is marked as cut off."""
    reward: FolderOrName = "sentiment"
    """sentiment, the folder of a reward model, or module:function, a Python function from a list of
    texts (prompt and continuation) to one number each; of conversations as for rlhf."""
    reward_folder: Path = Path("runs/sentiment-reward-model")
    """Where the built-in reward model is kept; trained when it is not there."""
    corpora: Path = ASSETS
    """Folder with sentence_polarity.zip, the labels of the built-in reward."""
    seed: int = 0
    """Seed of samples and labels."""

    def __post_init__(self):
        check_numbers(self)

    @property
    def group(self) -> int:
        """Continuations that are drawn for a pair."""
        return self.candidates if self.labels == "best-worst" else 2


class Answer(NamedTuple):
    """A continuation, whether it ended, and its reward."""

    text: str
    ended: bool
    reward: float


def draw_answers(
    config: Config, model: LanguageModel, prompts: Prompts, reward: Reward
) -> Iterator[list[Answer]]:
    """The continuations of each prompt in turn, as many as its pairs need."""
    each, count = config.group * config.pairs_per_prompt, len(prompts.texts)
    draw = make_sample_fn(
        model.decode_fn,
        model.init_cache,
        max_new_tokens=config.max_new_tokens,
        eos_id=model.eos_ids or model.eos_id,
    )
    decode, at_once = make_decode(model.tokenizer), max(1, ROWS // each)
    rng_key = jax.random.key(config.seed)
    for first in range(0, count, at_once):
        # the last batch is filled up, so that all have one shape
        ids = np.arange(first, first + at_once) % count
        tokens, where, row_ids = (
            jnp.asarray(x) for x in (prompts.tokens[ids], prompts.where[ids], ids)
        )
        drawn = draw(model.params, rng_key, tokens, where, row_ids, each=each)
        samples = fjax.Samples(*(x[: each * (count - first)] for x in jax.device_get(drawn)))
        texts = decode(samples.tokens, samples.where)
        asked = prompts.texts if prompts.given is None else prompts.given
        rewards = reward([asked[ids[i // each]] for i in range(len(texts))], texts)
        answers = [
            Answer(*row)
            for row in zip(texts, samples.finished.tolist(), rewards.tolist(), strict=True)
        ]
        yield from (answers[i : i + each] for i in range(0, len(answers), each))


def label(
    config: Config, answers: Sequence[Answer], rng: np.random.Generator
) -> tuple[Answer, Answer] | None:
    """(chosen, rejected) of the answers that compete; None if there is nothing to choose between
    them."""
    if config.labels == "best-worst":
        chosen, rejected = (
            max(answers, key=lambda answer: answer.reward),
            min(answers, key=lambda answer: answer.reward),
        )
        undecided = chosen.reward == rejected.reward
    else:
        chosen, rejected = answers
        # σ, without overflow
        if rng.random() >= np.exp(-np.logaddexp(0.0, rejected.reward - chosen.reward)):
            chosen, rejected = rejected, chosen
        undecided = False
    no_pair = (
        undecided
        or chosen.text == rejected.text
        or not (chosen.text.strip() and rejected.text.strip())
    )
    return None if no_pair else (chosen, rejected)


def make_pairs(config: Config) -> int:
    """Draws, scores, labels, writes, and says what the pairs are like."""
    if config.output.exists():
        raise RunError(f"{config.output} is there already. Give another --output, or move it away.")
    check_output(config.output, "--output")
    settings = Settings(model=config.model, max_new_tokens=config.max_new_tokens)
    model = load_model(settings)
    prompts, reports = _prompts(config, model)
    check_positions(settings, model, prompts.tokens.shape[1])
    asked = prompts.given or []
    reward = make_answer_reward(config.reward, config.reward_folder, config.corpora, asked)
    console = Console(width=None if sys.stdout.isatty() else 110)
    for report in reports:
        console.print(report, style="yellow", highlight=False, markup=False, soft_wrap=True)
    columns = TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    answers = []
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("prompts", total=len(prompts.texts))
        for some in draw_answers(config, model, prompts, reward):
            answers.append(some)
            bar.advance(task)
    console.print(_write(config, prompts, answers), highlight=False, markup=False, soft_wrap=True)
    return 0


def _prompts(config: Config, model: LanguageModel) -> tuple[Prompts, list[str]]:
    if config.prompts is None:
        return openings(model.tokenizer)[0], []
    return read_prompts(config.prompts, model.tokenizer, max_tokens=config.max_prompt_tokens)


def _write(config: Config, prompts: Prompts, answers: Sequence[Sequence[Answer]]) -> str:
    """Writes the pairs; returns what they are like."""
    rng, lines, rewards = np.random.default_rng(config.seed), [], []
    asked = prompts.texts if prompts.given is None else [c.given for c in prompts.given]
    for prompt, some in zip(asked, answers, strict=True):
        for i in range(0, len(some), config.group):
            labelled = label(config, some[i : i + config.group], rng)
            if labelled is not None:
                chosen, rejected = labelled
                lines.append(
                    as_line(Pair(prompt, chosen.text, rejected.text, chosen.ended, rejected.ended))
                )
                rewards.append((chosen.reward, rejected.reward))
    if not lines:
        raise RunError(
            "No two continuations of a prompt differ in text and reward, so there are no pairs."
        )
    text = "".join(f"{line}\n" for line in lines)
    write_text(config.output, text)
    (chosen, rejected), right = np.mean(rewards, axis=0), np.mean([a > b for a, b in rewards])
    left_out = len(answers) * config.pairs_per_prompt - len(lines)
    return (
        f"{len(lines)} pairs of {len(prompts.texts)} prompts are in {config.output} "
        f"({len(text.encode()) / 1000:.0f} kB); {left_out} were left out for want of a difference. "
        f"Mean reward {chosen:.3f} of the chosen, {rejected:.3f} of the rejected; the chosen one "
        f"has the higher reward in {right:.1%}."
    )


main = partial(run, Config, make_pairs, name="preference_pairs.make_pairs")

if __name__ == "__main__":
    leave(main())
