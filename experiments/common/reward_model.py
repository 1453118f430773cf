"""The built-in reward: a classifier's log-odds that a snippet of a film review is positive, trained
from human labels."""

import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fjax
from fjax.hosts import is_first, say, write_for_all
from fjax.models import RewardModel, gpt2, load_reward_model, save_reward_model
from fjax.runs import RunError

from .corpora import batches, held_out, pad, read_labels
from .prompt_files import Prompt
from .prompts import answered_ids, token_ids
from .settings import BUILT_IN

EPOCHS, BATCH_SIZE, LEARNING_RATE = 3, 64, 3e-4
TEXT_FORMAT = "end text end"
"""Of the snippets it is trained on; as the language model writes them."""


class Snippets(NamedTuple):
    """Tokenised sentences between two end tokens, and whether each is positive."""

    rows: list[np.ndarray]
    labels: np.ndarray


def read_snippets(folder: Path, tokenizer) -> tuple[Snippets, Snippets]:
    """(training, held out), split as the language model's pre-training was, so that neither has
    seen the latter."""
    texts = read_labels(folder)
    parts = []
    for apart in (False, True):
        chosen = sorted(text for text in texts if held_out(text) == apart)
        rows = text_rows(tokenizer, chosen, TEXT_FORMAT)
        parts.append(Snippets(rows, np.array([texts[text] for text in chosen], np.float32)))
    return parts[0], parts[1]


def text_rows(tokenizer, texts: Sequence[str], text_format: str) -> list[np.ndarray]:
    """Token ids of each text with the end tokens of `fjax.models.RewardModel.text_format`; never
    none, for "" has one."""
    words, end = text_format.split(), [tokenizer.eos_token_id]
    before, behind = (end if word == "end" else [] for word in (words[0], words[-1]))
    return [
        np.asarray([*before, *ids, *behind] or end, np.int32) for ids in token_ids(tokenizer, texts)
    ]


def train(corpora: Path, folder: Path) -> None:
    """Fine-tunes the built-in model with a scalar head by logistic regression, and reports the
    held-out accuracy."""
    base = fjax.from_pretrained(BUILT_IN)
    training, apart = read_snippets(corpora, base.tokenizer)
    if len(training.rows) < BATCH_SIZE or not apart.rows:
        raise RunError(
            f"The archive in {corpora} has {len(training.rows)} labelled snippets to train on and "
            f"{len(apart.rows)} held out: "
            "too few for a reward model."
        )
    limit = base.config.max_length
    params = {"transformer": base.params, "score": {"kernel": jnp.zeros((base.config.width, 1))}}
    score_fn = gpt2.score_fn(base.config)
    steps = EPOCHS * (len(training.rows) // BATCH_SIZE)
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps + 1)
    optimizer = optax.adamw(schedule, weight_decay=0.01)

    def loss(params, tokens, lengths, labels):
        scores = score_fn(params, tokens, jnp.arange(tokens.shape[1])[None] < lengths[:, None])
        return optax.sigmoid_binary_cross_entropy(scores, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, lengths, labels):
        value, gradient = jax.value_and_grad(loss)(params, tokens, lengths, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    params = jax.tree.map(jnp.copy, params)
    columns = TextColumn("reward model"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not is_first()) as bar:
        task = bar.add_task("reward model", total=steps)
        for tokens, lengths, labels in _epochs(training, limit):
            params, state, _ = step(params, state, tokens, lengths, labels)
            bar.advance(task)
    model = RewardModel(base.config, params, base.tokenizer, score_fn)
    right, count = accuracy(model, apart), len(apart.rows)
    error = np.sqrt(right * (1 - right) / count)
    say(
        f"Reward model: {right:.1%} ± {error:.1%} of {count} held-out snippets are classified as "
        f"people did."
    )
    given = folder, params, base.config, base.tokenizer
    write = functools.partial(save_reward_model, *given, text_format=TEXT_FORMAT)
    write_for_all(write, (folder / "config.json").is_file)


def _epochs(snippets: Snippets, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, lengths, labels): the label travels as a last token, which is taken off again."""
    carried = [
        np.append(row[:limit], int(label))
        for row, label in zip(snippets.rows, snippets.labels, strict=True)
    ]
    for epoch in range(EPOCHS):
        for tokens, lengths in batches(carried, batch_size=BATCH_SIZE, seed=0, epoch=epoch):
            rows = np.arange(len(tokens))
            labels = tokens[rows, lengths - 1].astype(np.float32)
            yield tokens[:, :limit], lengths - 1, labels


def accuracy(model: RewardModel, snippets: Snippets) -> float:
    """Share of snippets whose score has the sign of their label."""
    rows = [row[: model.config.max_length] for row in snippets.rows]
    return float(np.mean((score_rows(model, rows) > 0) == (snippets.labels > 0.5)))


def score_texts(model: RewardModel, texts: Sequence[str]) -> np.ndarray:
    """Scores of texts in the format of the model, cut to its positions."""
    rows = text_rows(model.tokenizer, texts, model.text_format or "text")
    return score_rows(model, [row[: _longest(model)] for row in rows])


def score_answers(
    model: RewardModel, prompts: Sequence[Prompt], completions: Sequence[str]
) -> np.ndarray:
    """Scores of prompts with their completions: texts in the format of the model, conversations
    through its own chat template. Of one that is too long the end is scored."""
    pairs = list(zip(prompts, completions, strict=True))
    texts = [f"{p.text}{x}" for p, x in pairs if p.messages is None]
    of_texts = iter(text_rows(model.tokenizer, texts, model.text_format or "text"))
    rows = [
        next(of_texts)
        if p.messages is None
        else np.asarray(answered_ids(model.tokenizer, p.messages, x), np.int32)
        for p, x in pairs
    ]
    return score_rows(model, [row[-_longest(model) :] for row in rows])


def _longest(model: RewardModel) -> int:
    return sys.maxsize if model.config.max_length is None else model.config.max_length


def score_rows(model: RewardModel, rows: list[np.ndarray], *, batch_size: int = 128) -> np.ndarray:
    """Scores of token rows, in batches of one size and one width, so that the program is compiled
    once."""
    score = _compiled(model.score_fn)
    width = _longest(model)
    found = []
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        tokens, lengths = pad(
            [*some, *[some[0]] * (batch_size - len(some))], multiple=min(width, 16)
        )
        where = np.arange(tokens.shape[1])[None] < lengths[:, None]
        found.append(np.asarray(score(model.params, tokens, where))[: len(some)])
    return np.concatenate(found)


@functools.cache
def _compiled(score_fn):
    """One program a model, not one a call."""
    return jax.jit(score_fn)


def load(folder: Path) -> RewardModel:
    """A reward model's folder.

    Raises:
        RunError: if it is none.
    """
    try:
        return load_reward_model(folder)
    except (OSError, ValueError) as error:
        raise RunError(f"Cannot load the reward model: {error}") from error
