"""The compiled programs of a run: draw, score under the base, update. Each is compiled once."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fjax
from fjax.estimators import log_mixture
from fjax.models import PretrainedModel
from fjax.training import ppo, rloo
from fjax.types import LogProbFn, Params

from ._prompts import Prompts
from ._run_folder import RunError
from ._settings import (
    BUILT_IN,
    PPO_EPOCHS,
    PPO_MINIBATCHES,
    Settings,
    make_divergence,
    make_optimizer,
)

AnyArray = Any
"""A `jax.Array`, perhaps still on its way, or an `np.ndarray` on the host."""


CHOICE_KEY = 2**31 - 1
"""Folded into a step's key to choose its prompts; rows of samples fold their numbers in, and there
are never so many."""


class Batch(NamedTuple):
    """Samples of the policy, then some of the base model, and what both say of each; on the device
    or the host.

    log_pi is that of what was sampled from: the policy, or its proposal. ``contexts`` says which
    prompt each row continues; None if there are none. The rows of a prompt are together, and every
    prompt has as many.
    """

    tokens: AnyArray
    where: AnyArray
    finished: AnyArray
    log_pi: AnyArray
    log_a: AnyArray
    log_q: AnyArray
    contexts: AnyArray
    from_policy: int


class Contexts(NamedTuple):
    """Prompts to align on and others to evaluate on.

    per_step: how many of them a batch takes.
    global_z: whether all share one Z in the update; evaluations always tell them apart.
    z_samples: how many samples of the base model the Z of each prompt to evaluate on is estimated
    from.
    """

    training: Prompts
    unseen: Prompts
    per_step: int
    global_z: bool = False
    z_samples: int = 32


class Programs(NamedTuple):
    """What the loop calls.

    draw: (params of what is sampled from, key) -> Batch of ``samples`` rows, of which
    ``base_samples`` are of the base model. draw_unseen: the same with a number before: the
    how-manieth batch of an evaluation; continues the unseen prompts in turn. score: (params,
    tokens, where) -> log-probability of each row. tuner: init, and update compiled and donating its
    state. decode: Batch -> texts, without their prompts.
    training: the prompts to align on; None without contexts.
    unseen: the prompts of an evaluation; None without contexts.
    unseen_batches: after how many batches those have all been continued; 1 without contexts.
    z_rounds: how often a batch continues each unseen prompt for its Z, before the first evaluation;
    0 without contexts. policy_samples: how many of a batch are of the policy; the others are of the
    base model. to_rollout: (Batch, log P of each row) -> what an update takes.
    """

    draw: Callable[[Params, jax.Array], Batch]
    draw_unseen: Callable[[int, Params, jax.Array], Batch]
    score: LogProbFn
    tuner: fjax.Tuner
    decode: Callable[[Batch], list[str]]
    training: Prompts | None
    unseen: Prompts | None
    unseen_batches: int
    z_rounds: int
    policy_samples: int
    to_rollout: Callable[[Batch, np.ndarray], fjax.Rollout]


def hardware() -> str:
    """What this runs on, in words: one device, however many there are."""
    device, there = jax.devices()[0], jax.device_count()
    if device.platform == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return device.device_kind + (f", one of {there}" if there > 1 else "")


def load_model(settings: Settings, *, prompt_tokens: int = 1) -> PretrainedModel:
    """The built-in model, a folder's, or a hub's.

    Raises:
        RunError: if it cannot be had, or has fewer positions than are asked for.
    """
    name = BUILT_IN if settings.model == "built-in" else settings.model
    try:
        model = fjax.from_pretrained(name, dtype=jnp.dtype(settings.dtype))
    except (OSError, ValueError) as error:
        raise RunError(f"Cannot load --model {settings.model}: {error}") from error
    check_positions(settings, model, prompt_tokens)
    return model


def load_aligned(settings: Settings, base: PretrainedModel, name: str) -> PretrainedModel:
    """A model whose probabilities can be compared with the base model's.

    Raises:
        RunError: if it cannot be had, or has another shape or tokenizer.
    """
    aligned = load_model(dataclasses.replace(settings, model=name))
    if (
        not base.config.computes_as(aligned.config)
        or base.tokenizer.get_vocab() != aligned.tokenizer.get_vocab()
    ):
        raise RunError(
            f"{name} and the base model {settings.model} differ in shape or tokenizer, so that "
            f"their probabilities cannot be "
            "compared. Give the base model that it was aligned from."
        )
    return aligned


def check_positions(settings: Settings, model: PretrainedModel, prompt_tokens: int) -> None:
    """Whether prompts of so many tokens, the start token included, and what follows them have room
    in the model."""
    needed, there = prompt_tokens + settings.max_new_tokens, model.config.n_positions
    if needed > there:
        prompt = "the start token" if prompt_tokens == 1 else f"a prompt of {prompt_tokens} tokens"
        raise RunError(
            f"The model has {there} positions, but {prompt} and --max-new-tokens "
            f"{settings.max_new_tokens} need {needed}. Ask for at most "
            f"{max(there - prompt_tokens, 0)} new tokens."
        )


def make_programs(
    settings: Settings, model: PretrainedModel, contexts: Contexts | None = None
) -> Programs:
    """Without contexts the prompt is the model's end-of-sequence token, as it stands between
    texts."""
    check_contexts(settings, contexts)
    start = (
        1
        if contexts is None
        else int(min(p.where.sum(axis=1).min() for p in (contexts.training, contexts.unseen)))
    )
    score = jax.jit(fjax.make_log_prob_fn(model.logits_fn, start=start))
    draw_batch = _make_draw(settings, model, score)
    if contexts is None:
        draw, draw_unseen = _draw_from_nothing(settings, model, draw_batch)
    else:
        draw, draw_unseen = _draw_from_prompts(settings, contexts, draw_batch)
    tuner = make_tuner(
        settings,
        model,
        start,
        None if contexts is None or contexts.global_z else len(contexts.training.texts),
    )
    return Programs(
        draw,
        draw_unseen,
        score,
        fjax.Tuner(tuner.init, jax.jit(tuner.update, donate_argnums=0)),
        lambda batch: decode(model, batch.tokens, batch.where),
        None if contexts is None else contexts.training,
        None if contexts is None else contexts.unseen,
        1 if contexts is None else len(contexts.unseen.texts) // contexts.per_step,
        0 if contexts is None else -(-contexts.z_samples * contexts.per_step // settings.samples),
        settings.samples - base_samples(settings, contexts),
        partial(_to_rollout, contexts=contexts),
    )


def check_contexts(settings: Settings, contexts: Contexts | None) -> None:
    """Whether the samples of a step can be shared out among its prompts."""
    if contexts is None:
        return
    n, rest = divmod(settings.samples, contexts.per_step)
    if rest or n < 2:
        raise RunError(
            f"--samples {settings.samples} must be a multiple of the {contexts.per_step} prompts a "
            f"step, and at least twice "
            "as many: each prompt gets as many samples, which are compared with one another."
        )
    for name, prompts in (("to align on", contexts.training), ("to evaluate on", contexts.unseen)):
        if len(prompts.texts) < contexts.per_step:
            raise RunError(
                f"There are {len(prompts.texts)} prompts {name}, fewer than the "
                f"{contexts.per_step} of a step. Give more "
                "prompts, or take fewer a step."
            )


def base_samples(settings: Settings, contexts: Contexts | None) -> int:
    """How many of a batch are of the base model: as many of each prompt, and at least one where any
    are asked for."""
    if contexts is None or settings.base_samples == 0:
        return settings.base_samples
    of_each = settings.samples // contexts.per_step
    return contexts.per_step * min(
        max(round(settings.base_samples / contexts.per_step), 1), of_each - 1
    )


def make_tuner(
    settings: Settings, model: PretrainedModel, start: int, num_contexts: int | None
) -> fjax.Tuner:
    """What ``--algorithm`` stands for."""
    optimizer, log_prob_fn = (
        make_optimizer(settings, model.params),
        fjax.make_log_prob_fn(model.logits_fn, start=start),
    )
    if settings.algorithm == "rloo":
        return rloo(
            log_prob_fn,
            optimizer,
            microbatch_size=settings.microbatch_size,
            num_contexts=num_contexts,
        )
    if settings.algorithm == "ppo":
        token_log_prob_fn = fjax.log_probs.make_token_log_prob_fn(model.logits_fn, start=start)
        return ppo(
            token_log_prob_fn,
            optimizer,
            epochs=PPO_EPOCHS,
            minibatches=PPO_MINIBATCHES,
            microbatch_size=settings.microbatch_size,
            num_contexts=num_contexts,
        )
    return fjax.fdpg(
        log_prob_fn,
        optimizer,
        divergence=make_divergence(settings),
        clip=settings.clip,
        microbatch_size=settings.microbatch_size,
        num_contexts=num_contexts,
    )


class _Ask(NamedTuple):
    """Prompts, and how many samples of each; which contexts they are, if any."""

    tokens: jax.Array
    where: jax.Array
    each: int
    contexts: jax.Array | None


def _make_draw(settings: Settings, model: PretrainedModel, score: LogProbFn) -> Callable:
    """(params, key, what is asked of the policy, what of the base model) -> Batch."""
    draw_rows = _make_draw_rows(settings, model)

    def part(params, rng_key, ask, first, from_policy):
        samples, tokens, where = draw_rows(params, rng_key, ask.tokens, ask.where, ask.each, first)
        ids = None if ask.contexts is None else jnp.repeat(ask.contexts, ask.each)
        return Batch(
            tokens,
            where,
            samples.finished,
            samples.sequence_log_probs,
            None,
            None,
            ids,
            from_policy,
        )

    def draw(params, rng_key, of_policy: _Ask, of_base: _Ask):
        n = len(of_policy.tokens) * of_policy.each
        batch = part(params, rng_key, of_policy, 0, n)
        batch = batch._replace(log_a=score(model.params, batch.tokens, batch.where))
        if of_base.each * len(of_base.tokens) == 0:
            return batch._replace(log_q=batch.log_pi)
        # Row ids go on counting, so that no row of the base shares its key with one of the policy.
        more = part(model.params, rng_key, of_base, -(-n // of_base.each), n)
        more = more._replace(log_a=more.log_pi, log_pi=score(params, more.tokens, more.where))
        batch = Batch(
            *(
                a if a is None else jnp.concatenate([a, b])
                for a, b in zip(batch[:-1], more[:-1], strict=True)
            ),
            from_policy=n,
        )
        return batch._replace(log_q=_mix(batch.log_pi, batch.log_a, 1 - n / len(batch.tokens)))

    return draw


@partial(jax.jit, static_argnums=2)
def _mix(log_pi, log_a, base_fraction):
    # By the counts, not by the fraction asked for: what was drawn is what log q has to be of.
    return log_mixture(log_pi, log_a, base_fraction=base_fraction)


def make_sampler(model: PretrainedModel, *, max_new_tokens: int) -> Callable[..., fjax.Samples]:
    """(params, key, prompts, where of them, row_ids, each=) -> ``each`` continuations of every
    prompt; compiled."""

    @partial(jax.jit, static_argnames="each")
    def draw(params, rng_key, tokens, where, row_ids, each):
        rows, columns = tokens.shape
        return fjax.sample(
            model.decode_fn,
            params,
            rng_key,
            tokens,
            model.init_cache(rows, columns + max_new_tokens),
            max_new_tokens=max_new_tokens,
            eos_id=model.eos_id,
            samples_per_prompt=each,
            row_ids=row_ids,
            where=where,
        )

    return draw


def _make_draw_rows(settings: Settings, model: PretrainedModel) -> Callable:
    sampler = make_sampler(model, max_new_tokens=settings.max_new_tokens)

    @partial(jax.jit, static_argnames=("each", "first"))
    def draw_rows(params, rng_key, tokens, where, each, first):
        samples = sampler(
            params, rng_key, tokens, where, first + jnp.arange(len(tokens)), each=each
        )
        prompt, prompt_where = (jnp.repeat(x, each, axis=0) for x in (tokens, where))
        return samples, *fjax.log_probs.pack(
            prompt, samples.tokens, prompt_where=prompt_where, where=samples.where
        )

    return draw_rows


def _draw_from_nothing(
    settings: Settings, model: PretrainedModel, draw_batch: Callable
) -> tuple[Callable, Callable]:
    def ask(rows):
        return _Ask(
            jnp.full((rows, 1), model.eos_id, jnp.int32), jnp.ones((rows, 1), bool), 1, None
        )

    of_policy, of_base = ask(settings.samples - settings.base_samples), ask(settings.base_samples)

    def draw(params, rng_key):
        return draw_batch(params, rng_key, of_policy, of_base)

    return draw, lambda index, params, rng_key: draw(params, rng_key)


def _draw_from_prompts(
    settings: Settings, contexts: Contexts, draw_batch: Callable
) -> tuple[Callable, Callable]:
    """Training prompts by chance, each at most once a step; unseen ones in turn, so that all
    evaluations are of the same."""
    width = max(prompts.tokens.shape[1] for prompts in (contexts.training, contexts.unseen))
    training, unseen = (
        _widened(prompts, width) for prompts in (contexts.training, contexts.unseen)
    )
    count = contexts.per_step
    base_each = base_samples(settings, contexts) // count
    each = settings.samples // count - base_each

    def draw_for(prompts, ids, params, rng_key):
        tokens, where = (x[ids] for x in prompts)
        return draw_batch(
            params, rng_key, _Ask(tokens, where, each, ids), _Ask(tokens, where, base_each, ids)
        )

    def draw(params, rng_key):
        ids = jax.random.choice(
            jax.random.fold_in(rng_key, CHOICE_KEY), len(training[0]), (count,), replace=False
        )
        return draw_for(training, ids, params, rng_key)

    def draw_unseen(index, params, rng_key):
        return draw_for(
            unseen, index % (len(unseen[0]) // count) * count + jnp.arange(count), params, rng_key
        )

    return draw, draw_unseen


def _widened(prompts: Prompts, width: int) -> tuple[jax.Array, jax.Array]:
    """Padded on the left to a common width, so that one program serves both sets."""
    padding = ((0, 0), (width - prompts.tokens.shape[1], 0))
    return jnp.asarray(np.pad(prompts.tokens, padding)), jnp.asarray(np.pad(prompts.where, padding))


def _to_rollout(batch: Batch, log_score: np.ndarray, *, contexts: Contexts | None) -> fjax.Rollout:
    """Rows of samples; with contexts, those of each prompt in a row of its own."""
    of_base = (np.arange(len(batch.tokens)) >= batch.from_policy).astype(np.int32)
    arrays = batch.tokens, batch.where, batch.log_q, log_score, of_base
    if contexts is None:
        tokens, where, log_q, scores, strata = map(jnp.asarray, arrays)
        return fjax.Rollout(tokens, where, log_q, scores, strata=strata)
    c, n = contexts.per_step, batch.from_policy
    rows = np.concatenate(
        [np.arange(n).reshape(c, -1), np.arange(n, len(batch.tokens)).reshape(c, -1)], axis=1
    )
    ids = None if contexts.global_z else batch.contexts[rows[:, 0]]
    tokens, where, log_q, scores, strata = (jnp.asarray(x)[rows] for x in arrays)
    return fjax.Rollout(tokens, where, log_q, scores, ids, strata)


def decode(model: PretrainedModel, tokens: AnyArray, where: AnyArray) -> list[str]:
    """The texts of the tokens that count, without the end-of-sequence token."""
    rows = [
        row[keep].tolist() for row, keep in zip(np.asarray(tokens), np.asarray(where), strict=True)
    ]
    return model.tokenizer.batch_decode(rows, skip_special_tokens=True)


def export(folder: Path, params: Params, model: PretrainedModel) -> None:
    """The aligned model as a Hugging Face folder; what an export that was killed left beside it
    goes."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    fjax.save_pretrained(folder, params, model.config, model.tokenizer)
