"""Drawing what an update is made of: samples of the policy and of the base model.

Each comes with the density of what it was drawn from. A batch is drawn from q = (1 - ε) π + ε a, in
numbers that are fixed beforehand. The base model's share bounds the importance weights P/q wherever
the policy no longer covers the target, and so keeps log Z right; the off-policy form of the loss
keeps its gradient exact.

Everything is given as functions, so that samples may come from anywhere: an engine outside of JAX
serves as a `SampleFn` if it returns what it drew and the log-probability of each token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax.estimators import log_mixture
from fjax.log_probs import make_log_prob_fn, pack
from fjax.sampling import Samples, Transform, identity, sample
from fjax.training import Rollout
from fjax.types import Array, DecodeFn, LogProbFn, Params, PRNGKeyArray, SampleFn

__all__ = [
    "Batch",
    "Collector",
    "Contexts",
    "Prompts",
    "make_collector",
    "make_context_draw",
    "make_decode",
    "make_draw",
    "make_sample_fn",
    "model_collector",
    "to_rollout",
]

AnyArray = Any
"""A `jax.Array`, perhaps still being computed, or an `np.ndarray` on the host."""

Draw = Callable[[Params, PRNGKeyArray], "Batch"]
"""(parameters of what is sampled from, key) -> Batch."""

CHOICE_KEY = 2**31 - 1
"""Folded into a step's key to choose its prompts; rows of samples fold their numbers in, and there
are never so many."""


class Prompts(NamedTuple):
    """C prompts, padded on the left to the longest.

    Attributes:
        texts: of the prompts.
        tokens: ``[C, P]``; each row is the token that starts a text, and the prompt; what a chat
            template makes has its own start.
        where: ``[C, P]``; True at real tokens, that first one among them.
        references: what followed in the source, beginning with a space where a word began; ""
            where unknown.
        given: what a target's features are given of each prompt, if not its text: messages, an
            answer to compare with, whatever they ask for.
    """

    texts: list[str]
    tokens: np.ndarray
    where: np.ndarray
    references: list[str]
    given: list[Any] | None = None


class Contexts(NamedTuple):
    """Prompts to align on and others to evaluate on.

    Attributes:
        training: to align on.
        unseen: to evaluate on.
        per_step: how many of them a batch takes.
        global_z: whether all share one Z in the update; evaluations always tell them apart.
        z_samples: how many samples of the base model the Z of each unseen prompt is estimated from.
    """

    training: Prompts
    unseen: Prompts
    per_step: int
    global_z: bool = False
    z_samples: int = 32

    @property
    def start(self) -> int:
        """The first column that every prompt leaves to the completion: for `make_log_prob_fn`."""
        return int(min(p.where.sum(axis=1).min() for p in (self.training, self.unseen)))


class Batch(NamedTuple):
    """Samples of the policy, then some of the base model, and what both say of each.

    On the device or the host. The rows of a context are together, and every context has the same
    number.

    Attributes:
        tokens: ``[N, T]``, prompt and completion, padded on the right.
        where: ``[N, T]``, True at the completion's tokens.
        finished: ``[N]``, whether the row drew an end of sequence.
        log_proposal: ``[N]``, log-probability under what was sampled from: the policy, or a copy
            of it that is renewed now and then.
        log_a: ``[N]``, under the base model.
        log_q: ``[N]``, under the mixture of both that the rows are of together.
        contexts: ``[N]``, which prompt each row continues; None if there are none.
        from_policy: how many rows are not of the base model.
    """

    tokens: AnyArray
    where: AnyArray
    finished: AnyArray
    log_proposal: AnyArray
    log_a: AnyArray
    log_q: AnyArray
    contexts: AnyArray
    from_policy: int


class Collector(NamedTuple):
    """How a run draws, for its steps and for its evaluations; `make_collector` makes one.

    Attributes:
        draw: (parameters that are sampled from, key) -> `Batch` of a step.
        draw_unseen: (index, params, key) -> the batch of that index in an evaluation; it continues
            the unseen prompts in turn.
        score: (params, tokens, where) -> log-probability of each row.
        decode: (tokens, where) -> texts of the tokens that count.
        samples: rows of a batch.
        policy_samples: how many of them are of the policy; the others are of the base model.
        contexts: the prompts; None without any.
    """

    draw: Draw
    draw_unseen: Callable[[int, Params, PRNGKeyArray], Batch]
    score: LogProbFn
    decode: Callable[[AnyArray, AnyArray], list[str]]
    samples: int
    policy_samples: int
    contexts: Contexts | None

    @property
    def unseen_batches(self) -> int:
        """Batches that it takes to continue all unseen prompts once; 1 without contexts."""
        contexts = self.contexts
        return 1 if contexts is None else len(contexts.unseen.texts) // contexts.per_step

    @property
    def z_rounds(self) -> int:
        """Batches that continue each unseen prompt to estimate its Z; 0 without contexts."""
        contexts = self.contexts
        return 0 if contexts is None else -(-contexts.z_samples * contexts.per_step // self.samples)


def make_sample_fn(
    decode_fn: DecodeFn,
    init_cache: Callable[[int, int], Any],
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    transform: Transform = identity,
) -> SampleFn:
    """The sampler of `fjax.sampling` for one model, compiled once for each number of prompts.

    Args:
        decode_fn: the cached model.
        init_cache: (rows, columns) -> an empty cache.
        max_new_tokens: longest completion.
        eos_id: what ends it.
        transform: of the logits, such as `fjax.sampling.temperature`.

    Returns:
        (params, key, tokens ``[C, P]``, where ``[C, P]``, row_ids ``[C]``, each=n) -> `Samples` of
        C·n rows, those of a prompt together.
    """

    @partial(jax.jit, static_argnames="each")
    def sample_fn(params, rng_key, tokens, where, row_ids, *, each):
        rows, columns = tokens.shape
        return sample(
            decode_fn,
            params,
            rng_key,
            tokens,
            init_cache(rows, columns + max_new_tokens),
            max_new_tokens=max_new_tokens,
            eos_id=eos_id,
            transform=transform,
            samples_per_prompt=each,
            row_ids=row_ids,
            where=where,
        )

    return sample_fn


def make_decode(tokenizer: Any) -> Callable[[AnyArray, AnyArray], list[str]]:
    """(tokens, where) -> texts of the tokens that count, without special ones.

    By a tokenizer of transformers.
    """

    def decode(tokens: AnyArray, where: AnyArray) -> list[str]:
        pairs = zip(np.asarray(tokens), np.asarray(where), strict=True)
        rows = [row[keep].tolist() for row, keep in pairs]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    return decode


class _Ask(NamedTuple):
    """Prompts, and how many samples of each; which contexts they are, if any."""

    tokens: Array
    where: Array
    each: int
    contexts: Array | None


def make_draw(
    sample_fn: SampleFn,
    log_prob_fn: LogProbFn,
    base_params: Params,
    *,
    start_id: int | Sequence[int],
    samples: int,
    base_samples: int = 0,
) -> Draw:
    """Draws texts that all begin alike, some from the policy and the others from the base model.

    Args:
        sample_fn: the sampler.
        log_prob_fn: log-probability of each row; best compiled.
        base_params: of the base model a.
        start_id: the token that starts a text; or several, a prompt that all texts continue.
        samples: rows of a batch.
        base_samples: how many of them are of the base model.

    Raises:
        ValueError: if there would be no sample of the policy.
    """
    _check_numbers(samples, base_samples)
    draw_batch = _make_draw_batch(sample_fn, log_prob_fn, base_params)

    def ask(rows):
        tokens = jnp.tile(jnp.asarray(start_id, jnp.int32).reshape(1, -1), (rows, 1))
        return _Ask(tokens, jnp.ones(tokens.shape, bool), 1, None)

    of_policy, of_base = ask(samples - base_samples), ask(base_samples)

    def draw(params: Params, rng_key: PRNGKeyArray) -> Batch:
        return draw_batch(params, rng_key, of_policy, of_base)

    return draw


def make_context_draw(
    sample_fn: SampleFn,
    log_prob_fn: LogProbFn,
    base_params: Params,
    contexts: Contexts,
    *,
    samples: int,
    base_samples: int = 0,
) -> tuple[Draw, Callable[[int, Params, PRNGKeyArray], Batch]]:
    """Draws completions of prompts, the same number of each.

    Args:
        sample_fn: the sampler.
        log_prob_fn: log-probability of each row; best compiled.
        base_params: of the base model a.
        contexts: the prompts.
        samples: rows of a batch, a multiple of ``contexts.per_step``.
        base_samples: how many of them are of the base model, another multiple.

    Returns:
        How to draw for a step, from training prompts at random, each at most once; and for an
        evaluation, from unseen ones in turn, so that all evaluations are of the same prompts.

    Raises:
        ValueError: if samples cannot be shared out, or prompts are too few.
    """
    _check_contexts(contexts, samples, base_samples)
    draw_batch = _make_draw_batch(sample_fn, log_prob_fn, base_params)
    width = max(prompts.tokens.shape[1] for prompts in (contexts.training, contexts.unseen))
    training, unseen = (_widened(p, width) for p in (contexts.training, contexts.unseen))
    count = contexts.per_step
    base_each = base_samples // count
    each = samples // count - base_each

    def draw_for(prompts, ids, params, rng_key):
        tokens, where = (x[ids] for x in prompts)
        asks = (_Ask(tokens, where, n, ids) for n in (each, base_each))
        return draw_batch(params, rng_key, *asks)

    def draw(params: Params, rng_key: PRNGKeyArray) -> Batch:
        key = jax.random.fold_in(rng_key, CHOICE_KEY)
        ids = jax.random.choice(key, len(training[0]), (count,), replace=False)
        return draw_for(training, ids, params, rng_key)

    def draw_unseen(index: int, params: Params, rng_key: PRNGKeyArray) -> Batch:
        first = index % (len(unseen[0]) // count) * count
        return draw_for(unseen, first + jnp.arange(count), params, rng_key)

    return draw, draw_unseen


def make_collector(
    sample_fn: SampleFn,
    log_prob_fn: LogProbFn,
    base_params: Params,
    decode: Callable[[AnyArray, AnyArray], list[str]],
    *,
    start_id: int | Sequence[int],
    samples: int,
    base_samples: int = 0,
    contexts: Contexts | None = None,
) -> Collector:
    """Everything that a run draws with.

    Args:
        sample_fn: the sampler.
        log_prob_fn: log-probability of each row; it is compiled here.
        base_params: of the base model a.
        decode: (tokens, where) -> texts of the tokens that count.
        start_id: the token that starts a text, or several, where there are no contexts.
        samples: rows of a batch.
        base_samples: how many of them are of the base model; with contexts rounded to the same
            number of each, at least one if any are asked for.
        contexts: prompts to align and to evaluate on.

    Raises:
        ValueError: if samples cannot be shared out among prompts, or prompts are too few.
    """
    scored = jax.jit(log_prob_fn)
    given = sample_fn, scored, base_params
    if contexts is None:
        numbers = {"samples": samples, "base_samples": base_samples}
        draw = make_draw(*given, start_id=start_id, **numbers)
        draw_unseen = lambda index, params, rng_key: draw(params, rng_key)  # noqa: E731
    else:
        _check_contexts(contexts, samples, 0)
        base_samples = _shared_out(base_samples, samples, contexts.per_step)
        numbers = {"samples": samples, "base_samples": base_samples}
        draw, draw_unseen = make_context_draw(*given, contexts, **numbers)

    policy_samples = samples - base_samples
    return Collector(draw, draw_unseen, scored, decode, samples, policy_samples, contexts)


def model_collector(
    model: Any,
    *,
    max_new_tokens: int,
    samples: int,
    base_samples: int = 0,
    contexts: Contexts | None = None,
    transform: Transform = identity,
) -> Collector:
    """`make_collector` of a `fjax.models.LanguageModel`, or whatever has its fields.

    It uses the model's own sampler and tokenizer; without contexts all texts continue its
    ``start_ids``.

    With a transform the policy is the transformed distribution: give it to the tuner's
    `make_log_prob_fn` too.
    """
    sample_fn = make_sample_fn(
        model.decode_fn,
        model.init_cache,
        max_new_tokens=max_new_tokens,
        eos_id=model.eos_ids or model.eos_id,
        transform=transform,
    )
    return make_collector(
        sample_fn,
        make_log_prob_fn(
            model.logits_fn,
            start=len(model.start_ids) if contexts is None else contexts.start,
            transform=transform,
        ),
        model.params,
        make_decode(model.tokenizer),
        start_id=model.start_ids,
        samples=samples,
        base_samples=base_samples,
        contexts=contexts,
    )


def to_rollout(batch: Batch, log_score: AnyArray, *, contexts: Contexts | None = None) -> Rollout:
    """The rollout that an update takes, from a batch and log P of its rows.

    With contexts it has a row for each of them, the policy's samples before the base model's.
    """
    of_base = (np.arange(len(batch.tokens)) >= batch.from_policy).astype(np.int32)
    arrays = batch.tokens, batch.where, batch.log_q, log_score, of_base
    if contexts is None:
        tokens, where, log_q, scores, strata = map(jnp.asarray, arrays)
        return Rollout(tokens, where, log_q, scores, strata=strata)
    c, n = contexts.per_step, batch.from_policy
    parts = np.arange(n), np.arange(n, len(batch.tokens))
    rows = np.concatenate([part.reshape(c, -1) for part in parts], axis=1)
    ids = None if contexts.global_z else batch.contexts[rows[:, 0]]
    tokens, where, log_q, scores, strata = (jnp.asarray(x)[rows] for x in arrays)
    return Rollout(tokens, where, log_q, scores, ids, strata)


def _make_draw_batch(sample_fn: SampleFn, score: LogProbFn, base_params: Params) -> Callable:
    """(params, key, what is asked of the policy, what of the base model) -> Batch."""

    def part(params, rng_key, ask, first, from_policy):
        row_ids = first + jnp.arange(len(ask.tokens))
        samples = sample_fn(params, rng_key, ask.tokens, ask.where, row_ids, each=ask.each)
        samples = Samples(*map(jnp.asarray, samples))  # an engine outside of JAX has NumPy's
        tokens, where = _packed(ask.tokens, ask.where, samples.tokens, samples.where, ask.each)
        ids = None if ask.contexts is None else jnp.repeat(ask.contexts, ask.each)
        log_q = samples.sequence_log_probs
        return Batch(tokens, where, samples.finished, log_q, None, None, ids, from_policy)

    def draw(params, rng_key, of_policy: _Ask, of_base: _Ask):
        n = len(of_policy.tokens) * of_policy.each
        batch = part(params, rng_key, of_policy, 0, n)
        batch = batch._replace(log_a=score(base_params, batch.tokens, batch.where))
        if of_base.each * len(of_base.tokens) == 0:
            return batch._replace(log_q=batch.log_proposal)
        # Row ids go on counting, so that no row of the base shares its key with one of the policy.
        more = part(base_params, rng_key, of_base, -(-n // of_base.each), n)
        log_proposal = score(params, more.tokens, more.where)
        more = more._replace(log_a=more.log_proposal, log_proposal=log_proposal)
        pairs = zip(batch[:-1], more[:-1], strict=True)
        joined = (a if a is None else jnp.concatenate([a, b]) for a, b in pairs)
        batch = Batch(*joined, from_policy=n)
        share = 1 - n / len(batch.tokens)
        return batch._replace(log_q=_mix(batch.log_proposal, batch.log_a, share))

    return draw


@partial(jax.jit, static_argnums=4)
def _packed(prompt, prompt_where, tokens, where, each):
    prompt, prompt_where = (jnp.repeat(x, each, axis=0) for x in (prompt, prompt_where))
    return pack(prompt, tokens, prompt_where=prompt_where, where=where)


@partial(jax.jit, static_argnums=2)
def _mix(log_proposal, log_a, base_fraction):
    # By the counts, not by the fraction asked for: what was drawn is what log q has to be of.
    return log_mixture(log_proposal, log_a, base_fraction=base_fraction)


def _widened(prompts: Prompts, width: int) -> tuple[Array, Array]:
    """Padded on the left to a common width, so that one program serves both sets."""
    padding = ((0, 0), (width - prompts.tokens.shape[1], 0))
    return jnp.asarray(np.pad(prompts.tokens, padding)), jnp.asarray(np.pad(prompts.where, padding))


def _check_numbers(samples: int, base_samples: int) -> None:
    if not 0 <= base_samples < samples:
        raise ValueError(
            f"base_samples must be at least 0 and less than samples, got {base_samples} of "
            f"{samples}: at least one sample is the policy's."
        )


def _check_contexts(contexts: Contexts, samples: int, base_samples: int) -> None:
    """Whether the samples of a step can be shared out among its prompts."""
    _check_numbers(samples, base_samples)
    n, rest = divmod(samples, contexts.per_step)
    if base_samples % contexts.per_step:
        raise ValueError(
            f"base_samples ({base_samples}) must be a multiple of the {contexts.per_step} prompts "
            f"a step: each prompt gets as many of the base model's."
        )
    if rest or n < 2:
        raise ValueError(
            f"samples ({samples}) must be a multiple of the {contexts.per_step} prompts a step, "
            f"and at least twice as many: each prompt gets as many samples, which are compared "
            f"with one another."
        )
    for name, prompts in (("align", contexts.training), ("evaluate", contexts.unseen)):
        if len(prompts.texts) < contexts.per_step:
            raise ValueError(
                f"There are {len(prompts.texts)} prompts to {name} on, fewer than the "
                f"{contexts.per_step} of a step. Give more prompts, or take fewer a step."
            )


def _shared_out(base_samples: int, samples: int, count: int) -> int:
    """As many of each prompt, and at least one where any are asked for."""
    if base_samples == 0:
        return 0
    return count * min(max(round(base_samples / count), 1), samples // count - 1)
