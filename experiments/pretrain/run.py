"""Trains the tokenizer, the 5-gram and the GPT-2, and goes on from the last checkpoint when called
again."""

import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fjax.models import gpt2
from fjax.runs import RunError
from fjax.training import Checkpoints, JsonlLogger

from ..common import corpora as data
from . import card, ngram, train
from .config import Config

console = Console(stderr=True)


def model_config(config: Config) -> gpt2.GPT2Config:
    return gpt2.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.n_positions,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        resid_pdrop=config.dropout,
    )


def fit(config: Config, rows: list[np.ndarray]) -> tuple[gpt2.Params, float]:
    """The trained parameters and the seconds that this and earlier calls spent on them."""
    model, steps_per_epoch = model_config(config), len(rows) // config.batch_size
    total = config.epochs * steps_per_epoch
    tx = train.optimizer(config, total)
    params_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    params = gpt2.init_params(model, params_key)
    state, seconds = train.State(jnp.int32(0), params, tx.init(params)), 0.0
    with Checkpoints(config.run_folder / "checkpoints", keep=1) as checkpoints:
        if checkpoints.latest is not None:
            restored = checkpoints.restore({"state": state, "seconds": np.zeros(())})
            state, seconds = restored["state"], float(restored["seconds"])
            console.print(f"Going on from step {checkpoints.latest} in {config.run_folder}.")
        step, begun, done = (
            train.make_step(model, tx, dropout_key),
            time.monotonic() - seconds,
            int(state.step),
        )
        with (
            _progress() as bar,
            JsonlLogger(config.run_folder / "metrics.jsonl", after_step=done or -1) as logger,
        ):
            task = bar.add_task("pretrain", total=total, completed=done, nats=math.nan)
            for tokens, lengths in _from_step(config, rows, done, total, steps_per_epoch):
                state, loss = step(state, tokens, lengths)
                done += 1
                if done % 10 == 0:
                    bar.update(task, completed=done, nats=float(loss))
                    logger.log(
                        {"step": done, "nats": float(loss), "seconds": time.monotonic() - begun}
                    )
                if done % config.checkpoint_every == 0 or done == total:
                    checkpoints.save(
                        done, {"state": state, "seconds": np.asarray(time.monotonic() - begun)}
                    )
    return state.params, time.monotonic() - begun


def _from_step(
    config: Config, rows: list[np.ndarray], done: int, total: int, steps_per_epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for position in range(done // steps_per_epoch, config.epochs):
        epoch = data.batches(rows, batch_size=config.batch_size, seed=config.seed, epoch=position)
        for i, batch in enumerate(epoch):
            if done <= position * steps_per_epoch + i < total:
                yield batch


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, TextColumn("{task.fields[nats]:.3f} nats a token"), console=console)


def check_rows(config: Config, rows: list[np.ndarray], held_out: list[np.ndarray]) -> None:
    """Whether there are steps to take, and no sentence is too long, before minutes are spent.

    Raises:
        RunError: if not.
    """
    if len(rows) < config.batch_size:
        raise RunError(
            f"There are {len(rows)} sentences to train on, fewer than --batch-size "
            f"{config.batch_size}."
        )
    steps = config.epochs * (len(rows) // config.batch_size)
    if steps <= config.warmup_steps:
        raise RunError(
            f"The training has {steps} steps, no more than --warmup-steps {config.warmup_steps}. "
            f"Take fewer of these."
        )
    longest = max(map(len, rows + held_out))
    if longest > config.n_positions:
        raise RunError(
            f"The longest sentence has {longest} tokens, more than --n-positions "
            f"{config.n_positions}. Take more."
        )


def main(config: Config) -> int:
    config.run_folder.mkdir(parents=True, exist_ok=True)
    split = data.read_sentences(config.corpora)
    tokenizer = data.train_tokenizer(split.train, vocab_size=config.vocab_size)
    rows, held_out = data.encode(tokenizer, split.train), data.encode(tokenizer, split.held_out)
    console.print(f"{len(rows)} training and {len(held_out)} held-out sentences.")
    check_rows(config, rows, held_out)
    params, seconds = fit(config, rows)
    console.print("Counting the 5-gram.")
    five_gram = ngram.fit(rows, order=5, vocab_size=config.vocab_size)
    five_gram_nats = ngram.negative_log_likelihood(five_gram, held_out) / len(held_out)
    card.write(config, model_config(config), params, tokenizer, split, five_gram_nats, seconds)
    console.print(f"The model and its card are in {config.output}.")
    return 0
