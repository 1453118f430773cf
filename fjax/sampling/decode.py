"""Continuations of prompts as one program: prefill, then a loop over the cache.

It ends when every row has ended.

The sampler knows no model. It is given a ``DecodeFn`` and an empty cache, and keeps to itself what
is easily got wrong: which tokens count (all up to an end-of-sequence token *and that token*), and
the log-probability of each under the distribution that it was really drawn from, after temperature
and truncation. So ``log_q`` needs no second pass.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import as_mask, float_dtype
from fjax._sharding import spread_as
from fjax.sampling.categorical import draw
from fjax.sampling.transforms import Transform, identity
from fjax.types import Array, Bool, DecodeFn, Float, Int, Params, PRNGKeyArray

__all__ = ["Samples", "sample"]


class Samples(NamedTuple):
    """Continuations without their prompts, from the first new token on.

    A row that is not finished is a prefix that was cut off at T tokens. Counted that way (finished
    sequences of at most T tokens, and unfinished prefixes of exactly T) the outcomes' probabilities
    sum to one, so that `sequence_log_probs` is a log-probability in either case; whether a prefix
    counts as a sentence is for the target to say.

    Attributes:
        tokens: the new tokens; padding after the end.
        where: True up to and including the token that ended the row.
        log_probs: of each token under the distribution it was drawn from; 0 where not counted.
        finished: whether the row drew a token that ends it.
    """

    tokens: Int[Array, "B T"]
    where: Bool[Array, "B T"]
    log_probs: Float[Array, "B T"]
    finished: Bool[Array, "B"]

    @property
    def sequence_log_probs(self) -> Float[Array, "B"]:
        """``log_q`` of each row: the sum of its tokens' log-probabilities."""
        return self.log_probs.sum(-1)

    @property
    def lengths(self) -> Int[Array, "B"]:
        """Tokens that count in each row, the end-of-sequence token included."""
        return self.where.sum(-1, dtype=jnp.int32)


class _Progress(NamedTuple):
    """What the loop carries beside the cache.

    Columns that are never reached keep their initial padding.
    """

    step: Int[Array, ""]
    last: Int[Array, "B"]
    tokens: Int[Array, "B T"]
    log_probs: Float[Array, "B T"]
    lengths: Int[Array, "B"]
    finished: Bool[Array, "B"]


def sample(
    decode_fn: DecodeFn,
    params: Params,
    rng_key: PRNGKeyArray,
    prompt: Int[Array, "B P"],
    cache: Any,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    transform: Transform = identity,
    samples_per_prompt: int = 1,
    row_ids: Int[Array, "B"] | None = None,
    pad_id: int | None = None,
    where: Bool[Array, "B P"] | Int[Array, "B P"] | None = None,
) -> Samples:
    """Draws continuations ``x_t ~ softmax(transform(logits(x_<t)))`` up to an ``eos_id``.

    Each row ends with the first token that is one of them.

    Callers jit: ``jax.jit(partial(sample, decode_fn, max_new_tokens=40, eos_id=0))``. One program
    then holds the prefill and the loop, which ends as soon as all rows have. Making the cache
    inside the jitted function, or donating it, saves one copy of it.

    Row i draws its token of step t with ``fold_in(fold_in(rng_key, row id), t)``, so that a batch
    may be split over calls or devices without changing a sample, as long as each row keeps its id.
    (That holds for JAX's default, threefry keys; ``rbg`` keys under `jax.vmap` do depend on the
    batch.)

    Args:
        decode_fn: ``(params, tokens, cache, where) -> (logits of the last column, cache)``.
        params: of the model.
        rng_key: of this batch.
        prompt: at least one column, padded anywhere, with any id; ``decode_fn`` is given it padded
            on the left, with ``eos_id``. A model that starts from nothing is prompted with its EOS.
        cache: empty, for B rows and at least P + max_new_tokens columns. Its arrays have the batch
            on axis 0, scalars aside; if it has a field ``where`` of ``[B, columns]``, its size is
            checked.
        max_new_tokens: T, static.
        eos_id: the token that ends a row, or several that do (``model.eos_ids``), static. Where one
            is needed for padding, it is the first.
        transform: of the logits, static: `temperature`, `top_k`, `top_p`, `greedy` or a `chain` of
            them.
        samples_per_prompt: n continuations of every prompt from one prefill; those of prompt c are
            rows c·n … c·n + n - 1, and equal what n copies of the prompt would give.
        row_ids: of the prompts, 0 … B - 1 by default. Continuation i of a prompt has the id
            ``row_id · n + i``.
        pad_id: fills the columns after the end; ``eos_id`` by default. Any int32: the model never
            reads it.
        where: True at the real tokens of the prompt; all of them by default.

    Returns:
        `Samples` of B · n rows. Log-probabilities are NaN where the logits are no distribution, and
        for the first token of a prompt without a real one.

    Raises:
        ValueError: at trace time, for an empty prompt, a cache of another batch or too few columns,
            an ``eos_id`` outside the vocabulary or none at all, or shapes that do not belong
            together.

    A model that counts upwards, and ends at 3:

    >>> def count_up(params, tokens, cache, where=None):
    ...     return 50.0 * jax.nn.one_hot(tokens[:, -1] + 1, 6), cache
    >>> from functools import partial
    >>> draw_four = jax.jit(partial(sample, count_up, max_new_tokens=4, eos_id=3))
    >>> samples = draw_four(None, jax.random.key(0), jnp.array([[0], [1]]), None)
    >>> samples.tokens.tolist(), samples.lengths.tolist()
    ([[1, 2, 3, 3], [2, 3, 3, 3]], [3, 2])
    """
    ends = _ends(eos_id)
    prompt, pad_id = jnp.asarray(prompt), int(ends[0] if pad_id is None else pad_id)
    _check_arguments(prompt, cache, max_new_tokens, samples_per_prompt, row_ids, pad_id)
    logits, cache = _prefill(decode_fn, params, prompt, cache, as_mask(where, prompt), ends[0])
    if not all(0 <= end < logits.shape[-1] for end in ends):
        raise ValueError(
            f"eos_id must be one of the {logits.shape[-1]} tokens of the vocabulary, got {eos_id}."
        )
    ids = jnp.arange(len(prompt), dtype=jnp.int32) if row_ids is None else jnp.asarray(row_ids)
    logits, cache, row_keys = spread_as(
        prompt, partial(_copy_rows, n=samples_per_prompt), logits, cache, rng_key, ids
    )
    advance = _make_step(transform, ends, pad_id, row_keys)

    def is_unfinished(carry):
        progress, _ = carry
        return (progress.step < max_new_tokens) & ~progress.finished.all()

    def decode_one(carry):
        progress, cache = carry
        logits, cache = decode_fn(params, progress.last[:, None], cache)
        return advance(progress, logits), cache

    # The first token comes from the prefill's logits, so the loop decodes first and the last token
    # is never decoded.
    progress = advance(_no_progress(logits, max_new_tokens, pad_id), logits)
    progress, _ = jax.lax.while_loop(is_unfinished, decode_one, (progress, cache))
    counted = jnp.arange(max_new_tokens)[None, :] < progress.lengths[:, None]
    return Samples(progress.tokens, counted, progress.log_probs, progress.finished)


def _prefill(
    decode_fn: DecodeFn,
    params: Params,
    prompt: Int[Array, "B P"],
    cache: Any,
    where: Bool[Array, "B P"] | None,
    pad_id: int,
) -> tuple[Float[Array, "B V"], Any]:
    """What follows each prompt, wherever its padding is; NaN after nothing real."""
    if where is None:
        return decode_fn(params, prompt, cache, None)
    prompt, real = spread_as(prompt, _pad_left, prompt, where, pad_id)
    logits, cache = decode_fn(params, prompt, cache, real)
    return jnp.where(real.any(1)[:, None], logits, jnp.nan), cache


def _make_step(
    transform: Transform, ends: tuple[int, ...], pad_id: int, row_keys: Array
) -> Callable[[_Progress, Float[Array, "B V"]], _Progress]:
    """Draws one token a row from the logits and notes it down, unless the row has ended."""

    def advance(progress: _Progress, logits: Float[Array, "B V"]) -> _Progress:
        return spread_as(
            logits, note_down, progress, transform(logits.astype(float_dtype(logits))), row_keys
        )

    def note_down(progress, logits, row_keys):
        step, finished = progress.step, progress.finished
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        drawn, log_probs = jax.vmap(draw)(keys, logits)
        return _Progress(
            step=step + 1,
            last=drawn,  # also where the row has ended: the model need not know the padding
            tokens=progress.tokens.at[:, step].set(jnp.where(finished, pad_id, drawn)),
            log_probs=progress.log_probs.at[:, step].set(jnp.where(finished, 0.0, log_probs)),
            lengths=progress.lengths + ~finished,
            finished=finished | reduce(operator.or_, (drawn == end for end in ends)),
        )

    return advance


def _ends(eos_id: int | Sequence[int]) -> tuple[int, ...]:
    ids = np.atleast_1d(eos_id)
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"eos_id must be a token id or a sequence of them, got {eos_id!r}.")
    return tuple(ids.tolist())


def _no_progress(logits: Float[Array, "B V"], max_new_tokens: int, pad_id: int) -> _Progress:
    rows = logits.shape[0]
    return _Progress(
        step=jnp.int32(0),
        last=jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, max_new_tokens), pad_id, jnp.int32),
        log_probs=jnp.zeros((rows, max_new_tokens), float_dtype(logits)),
        lengths=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
    )


def _pad_left(
    prompt: Int[Array, "B P"], where: Bool[Array, "B P"], pad_id: int
) -> tuple[Int[Array, "B P"], Bool[Array, "B P"]]:
    """The real tokens on the right, in their order, whichever side the padding was on.

    So what comes next stands beside them.
    """
    where, prompt = jax.lax.sort((where, prompt), dimension=1, is_stable=True, num_keys=1)
    return jnp.where(where, prompt, pad_id), where


def _copy_rows(
    logits: Float[Array, "B V"], cache: Any, rng_key: PRNGKeyArray, ids: Int[Array, "B"], *, n: int
) -> tuple:
    """Each row n times, and a key for every copy."""
    if n > 1:
        logits, cache = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, n, axis=0) if jnp.ndim(leaf) else leaf, (logits, cache)
        )
        ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))  # id · n must not overflow
        ids = (ids[:, None] * n + jnp.arange(n, dtype=ids.dtype)[None, :]).ravel()
    return logits, cache, jax.vmap(jax.random.fold_in, (None, 0))(rng_key, ids)


def _check_arguments(prompt, cache, max_new_tokens, samples_per_prompt, row_ids, pad_id):
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"The prompt must be [B, P] with at least one column, got shape {prompt.shape}; "
            "a model that starts from nothing is prompted with its end-of-sequence token."
        )
    if max_new_tokens < 1 or samples_per_prompt < 1:
        raise ValueError(
            "max_new_tokens and samples_per_prompt must be at least 1, "
            f"got max_new_tokens={max_new_tokens} and samples_per_prompt={samples_per_prompt}."
        )
    rows, columns = prompt.shape
    if row_ids is not None and jnp.shape(row_ids) != (rows,):
        raise ValueError(
            f"row_ids must have shape {(rows,)} for this prompt, got {jnp.shape(row_ids)}."
        )
    if not -(2**31) <= pad_id < 2**31:
        raise ValueError(f"pad_id must be an int32, as the tokens are; got {pad_id}.")
    batches = {leaf.shape[0] for leaf in jax.tree.leaves(cache) if jnp.ndim(leaf)}
    if batches - {rows}:
        raise ValueError(f"The cache is for {sorted(batches)} rows, but the prompt has {rows}.")
    capacity = getattr(cache, "where", None)
    if capacity is not None and capacity.shape[1] < columns + max_new_tokens:
        raise ValueError(
            f"The cache has {capacity.shape[1]} columns, but a prompt of {columns} and "
            f"{max_new_tokens} new tokens need {columns + max_new_tokens}."
        )
