"""Log-probabilities of token sequences: the shift by one and the masks, in one place.

A language model's logits at column i predict the token of column i + 1. That shift happens here and
nowhere else. What counts is said by ``where``, which comes from lengths and never from token ids:
with a padding token that is also the end-of-sequence token (GPT-2 has no other) a mask of ids would
drop the end of every sentence, and the probabilities of finished sentences would no longer sum to
one.
"""

import jax
import jax.numpy as jnp

from fjax._checks import as_mask, float_dtype, predicted
from fjax._sharding import spread_as
from fjax.types import Array, Bool, Float, Int, LogitsFn, LogProbFn, Params

__all__ = [
    "make_log_prob_fn",
    "make_token_log_prob_fn",
    "pack",
    "sequence_log_probs",
    "token_log_probs",
    "where_from_lengths",
]


def token_log_probs(
    logits: Float[Array, "*b T V"], tokens: Int[Array, "*b T"]
) -> Float[Array, "*b T"]:
    """Log softmax(logits)[token], for logits that already stand above the token they predict.

    One entry minus a log-sum-exp, so that no second array of the logits' size is made. In float32
    at least.

    Args:
        logits: unnormalised; -inf for tokens that cannot occur.
        tokens: one id a position. An id that the vocabulary has not (a padding of -100, say) has
            log-probability NaN, and gradient 0.

    Raises:
        ValueError: if ``tokens`` has not the shape of ``logits`` without the vocabulary.

    >>> token_log_probs(jnp.zeros((1, 4)), jnp.array([2])).tolist()
    [-1.386294]
    """
    logits, tokens = _aligned(logits, tokens)
    known = (tokens >= 0) & (tokens < logits.shape[-1])
    chosen = jnp.take_along_axis(logits, jnp.where(known, tokens, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(known, chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)


def sequence_log_probs(
    logits: Float[Array, "*b T V"],
    tokens: Int[Array, "*b T"],
    *,
    where: Bool[Array, "*b T"] | Int[Array, "*b T"],
) -> Float[Array, "*b"]:
    """Log π(x) = Σ_t log π(x_t | x_<t) over the tokens that count; the shift by one is done here.

    Its gradient is the score ∇log π(x), which `fjax.surrogate_loss` weights.

    Args:
        logits: as the model returns them: column i predicts the token of column i + 1.
        tokens: prompt and completion, contiguous; padding on the right.
        where: tokens that count: the completion, up to and including its end-of-sequence token.
            Where it is False, ids may be any, and so may the logits that predict them.

    Returns:
        One log-probability a sequence, in nats. NaN where an id that counts is not in the
        vocabulary, or where a traced ``where`` counts column 0, which nothing predicts.

    Raises:
        ValueError: if shapes differ, or a ``where`` that is not traced counts column 0.

    >>> logits, tokens = jnp.zeros((3, 4)), jnp.array([0, 1, 2])
    >>> sequence_log_probs(logits, tokens, where=jnp.array([False, True, True])).tolist()
    -2.772588
    """
    logits, tokens = _aligned(logits, tokens)
    where = predicted(as_mask(where, tokens))
    return _sum(_counted(logits[..., :-1, :], tokens[..., 1:], where[..., 1:]), where, start=1)


def make_log_prob_fn(logits_fn: LogitsFn, *, start: int = 1, transform=None) -> LogProbFn:
    """Log π(x) of a model, as the function of ``(params, tokens, where)`` that `fjax.fdpg` takes.

    Args:
        logits_fn: the teacher-forced model.
        start: first column that may count: the length of the shortest prompt. Earlier ones do not
            go through the head.
        transform: what the sampler did to its logits (`fjax.sampling.top_p`, …), to give the
            log-probability under what was really sampled from; None for the model itself.

    Returns:
        ``log_prob_fn(params, tokens [B, T], where [B, T]) -> [B]``. Tokens are contiguous, padded
        on the right with any id (`pack`). NaN for a row that counts a column before ``start``, or
        whose prompt or completion has an id that the vocabulary has not; ``log_prob_fn`` raises
        ValueError for shapes that differ, and for the former unless ``where`` is traced.

    Raises:
        ValueError: if ``start`` is below 1: column 0 has no prediction.

    >>> def uniform(params, tokens, where=None, *, start=0):
    ...     return jnp.zeros((*tokens[:, start:].shape, 4))
    >>> tokens, where = jnp.array([[0, 1, 2]]), jnp.array([[False, True, True]])
    >>> make_log_prob_fn(uniform)(None, tokens, where).tolist()
    [-2.772588]
    """
    token_fn = _make_counted_fn(logits_fn, start, transform)

    def log_prob_fn(
        params: Params, tokens: Int[Array, "B T"], where: Bool[Array, "B T"] | Int[Array, "B T"]
    ) -> Float[Array, "B"]:
        found, where = token_fn(params, tokens, where)
        return _sum(found, where, start=start)

    return log_prob_fn


def make_token_log_prob_fn(logits_fn: LogitsFn, *, start: int = 1):
    """Log π(x_t | x_<t) of each token, 0 where not counted: what `make_log_prob_fn` sums.

    Args:
        logits_fn: the teacher-forced model.
        start: first column that may count: the length of the shortest prompt.

    Returns:
        ``token_log_prob_fn(params, tokens [B, T], where [B, T]) -> [B, T]``, in line with
        ``tokens``; NaN at a counted column before ``start``, and as in `make_log_prob_fn`.

    Raises:
        ValueError: if ``start`` is below 1: column 0 has no prediction.

    >>> def uniform(params, tokens, where=None, *, start=0):
    ...     return jnp.zeros((*tokens[:, start:].shape, 4))
    >>> tokens, where = jnp.array([[0, 1, 2]]), jnp.array([[False, True, True]])
    >>> make_token_log_prob_fn(uniform)(None, tokens, where).tolist()
    [[0.0, -1.386294, -1.386294]]
    """
    token_fn = _make_counted_fn(logits_fn, start, None)

    def token_log_prob_fn(
        params: Params, tokens: Int[Array, "B T"], where: Bool[Array, "B T"] | Int[Array, "B T"]
    ) -> Float[Array, "B T"]:
        found, where = token_fn(params, tokens, where)
        return jnp.concatenate(
            [jnp.where(where[:, :start], jnp.nan, 0.0).astype(found.dtype), found], axis=1
        )

    return token_log_prob_fn


def where_from_lengths(lengths: Int[Array, "*b"], columns: int) -> Bool[Array, "*b T"]:
    """True in the first ``lengths`` of ``columns`` columns.

    >>> where_from_lengths(jnp.array([1, 3]), 3).tolist()
    [[True, False, False], [True, True, True]]
    """
    return (
        jnp.arange(columns).reshape((1,) * jnp.ndim(lengths) + (-1,))
        < jnp.asarray(lengths)[..., None]
    )


def pack(
    prompt: Int[Array, "B P"],
    completion: Int[Array, "B T"],
    *,
    prompt_where: Bool[Array, "B P"] | Int[Array, "B P"] | None = None,
    where: Bool[Array, "B T"] | Int[Array, "B T"],
) -> tuple[Int[Array, "B U"], Bool[Array, "B U"]]:
    """Prompts and their completions as contiguous rows, all padding on the right; U = P + T.

    What samples a model wants its prompts flush with the first new token; what scores them wants no
    gap and no mask of attention: a causal model never sees what stands on the right.

    Args:
        prompt: padded on either side, or in between.
        completion: as `fjax.sample` returns it.
        prompt_where: real tokens of the prompt; all by default.
        where: tokens of the completion that count.

    Returns:
        The tokens, and True where they are of the completion and count.

    Raises:
        ValueError: if shapes do not belong together.

    >>> tokens, where = pack(
    ...     jnp.array([[9, 5]]), jnp.array([[1, 0]]),
    ...     prompt_where=jnp.array([[False, True]]), where=jnp.ones((1, 2), bool),
    ... )
    >>> tokens.tolist(), where.tolist()
    ([[5, 1, 0, 9]], [[False, True, True, False]])
    """
    prompt, completion = jnp.asarray(prompt), jnp.asarray(completion)
    if prompt.ndim != 2 or completion.ndim != 2 or len(prompt) != len(completion):
        raise ValueError(
            f"prompt and completion must be [B, P] and [B, T], with as many rows; got "
            f"{list(prompt.shape)} and {list(completion.shape)}."
        )
    prompt_where = as_mask(prompt_where, prompt, name="prompt_where")
    return spread_as(prompt, _pack, prompt, completion, prompt_where, as_mask(where, completion))


def _pack(prompt, completion, prompt_where, where):
    tokens = jnp.concatenate([prompt, completion], axis=1)
    counted = jnp.concatenate([jnp.zeros_like(prompt, bool), where], axis=1)
    if prompt_where is None:
        return tokens, counted
    padding = jnp.concatenate([~prompt_where, jnp.zeros_like(where)], axis=1)
    # What is real comes first, in its order.
    _, tokens, counted = jax.lax.sort(
        (padding, tokens, counted), dimension=1, is_stable=True, num_keys=1
    )
    return tokens, counted


def _aligned(logits, tokens):
    """In float32 at least and int32 at least, one token to each distribution."""
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    if logits.ndim == 0 or logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits must have the shape of tokens and one axis more, the vocabulary; got logits "
            f"of shape {list(logits.shape)} and tokens of shape {list(tokens.shape)}."
        )
    return logits.astype(float_dtype(logits)), tokens.astype(
        jnp.promote_types(tokens.dtype, jnp.int32)
    )


def _counted(logits, tokens, where, transform=None):
    """Log-probability of each token, 0 where not counted, whatever stands there."""
    logits = _without_gradient_elsewhere(logits, where)
    if transform is not None:
        logits = transform(logits)
    return jnp.where(where, token_log_probs(logits, jnp.where(where, tokens, 0)), 0.0)


@jax.custom_jvp
def _without_gradient_elsewhere(logits, where):
    """The logits, without a gradient where they are not counted.

    The usual double `where`, but without its pass over the vocabulary where there are no gradients.
    """
    return logits


@_without_gradient_elsewhere.defjvp
def _(primals, tangents):
    logits, where = primals
    # of what is masked, 0 · NaN arrives here
    return logits, jnp.where(where[..., None], tangents[0], 0.0)


def _make_counted_fn(logits_fn, start, transform):
    """(params, tokens, where) -> log-probabilities from ``start`` on, and where."""
    if start < 1:
        raise ValueError(
            f"start must be at least 1, since nothing predicts the token of column 0; got {start}."
        )

    def token_fn(params, tokens, where):
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2:
            raise ValueError(
                f"tokens must be [B, T], got {list(tokens.shape)}; one sequence is tokens[None]."
            )
        where = predicted(as_mask(where, tokens), start=start)
        # Behind the last token that counts, ids may be any: nothing that counts sees them, and the
        # model gets what it has.
        tokens = jnp.where(
            jax.lax.cummax(where.astype(jnp.int32), axis=1, reverse=True) > 0, tokens, 0
        )
        # Float32 before the transform, as the sampler has it.
        logits, later = _aligned(
            logits_fn(params, tokens[:, :-1], start=start - 1), tokens[:, start:]
        )
        return _counted(logits, later, where[:, start:], transform), where

    return token_fn


def _sum(log_probs, where, *, start):
    # A counted token without a prediction has no log-probability; to leave it out in silence would
    # be a wrong number.
    return jnp.where(where[..., :start].any(-1), jnp.nan, log_probs.sum(-1))
