"""Log-probabilities of token sequences: the shift by one and the masks, in one place.

A language model's logits at column i predict the token of column i + 1. That shift happens here and nowhere else. What
counts is said by ``where``, which comes from lengths and never from token ids: with a padding token that is also the
end-of-sequence token (GPT-2 has no other) a mask of ids would drop the end of every sentence, and the probabilities of
finished sentences would no longer sum to one.
"""

import jax
import jax.numpy as jnp

from fjax._typing import Array, Bool, Float, Int, LogitsFn, LogProbFn, Params

__all__ = ["make_log_prob_fn", "make_token_log_prob_fn", "pack", "sequence_log_probs", "token_log_probs", "where_from_lengths"]


def token_log_probs(logits: Float[Array, "*b T V"], tokens: Int[Array, "*b T"]) -> Float[Array, "*b T"]:
    """Log softmax(logits)[token], for logits that already stand above the token they predict.

    One entry minus a log-sum-exp, so that no second array of the logits' size is made. In float32 at least.

    Args:
        logits: unnormalised; -inf for tokens that cannot occur.
        tokens: one id a position.

    >>> token_log_probs(jnp.zeros((1, 4)), jnp.array([2])).tolist()
    [-1.386294]
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def sequence_log_probs(
    logits: Float[Array, "*b T V"], tokens: Int[Array, "*b T"], *, where: Bool[Array, "*b T"]
) -> Float[Array, "*b"]:
    """Log π(x) = Σ_t log π(x_t | x_<t) over the tokens that count; the shift by one is done here.

    Its gradient is the score ∇log π(x), which `fjax.surrogate_loss` weights.

    Args:
        logits: as the model returns them: column i predicts the token of column i + 1.
        tokens: prompt and completion, contiguous; padding on the right.
        where: tokens that count: the completion, up to and including its end-of-sequence token.

    Returns:
        One log-probability a sequence, in nats. NaN where ``where`` counts column 0, which nothing predicts.

    >>> logits, tokens = jnp.zeros((3, 4)), jnp.array([0, 1, 2])
    >>> sequence_log_probs(logits, tokens, where=jnp.array([False, True, True])).tolist()
    -2.772588
    """
    return _masked_sum(token_log_probs(logits[..., :-1, :], tokens[..., 1:]), where, start=1)


def make_log_prob_fn(logits_fn: LogitsFn, *, start: int = 1, transform=None) -> LogProbFn:
    """Log π(x) of a model, as the function of ``(params, tokens, where)`` that `fjax.fdpg` takes.

    Args:
        logits_fn: the teacher-forced model.
        start: first column that may count: the length of the shortest prompt. Earlier ones do not go through the head.
        transform: what the sampler did to its logits (`fjax.sampling.top_p`, …), to give the log-probability under
            what was really sampled from; None for the model itself.

    Returns:
        ``log_prob_fn(params, tokens [B, T], where [B, T]) -> [B]``; NaN for a row that counts a column before ``start``.

    Raises:
        ValueError: if ``start`` is below 1: column 0 has no prediction.

    >>> uniform = lambda params, tokens, where=None, *, start=0: jnp.zeros((*tokens[:, start:].shape, 4))
    >>> tokens, where = jnp.array([[0, 1, 2]]), jnp.array([[False, True, True]])
    >>> make_log_prob_fn(uniform)(None, tokens, where).tolist()
    [-2.772588]
    """
    if start < 1:
        raise ValueError(f"start must be at least 1, since nothing predicts the token of column 0; got {start}.")

    def log_prob_fn(params: Params, tokens: Int[Array, "B T"], where: Bool[Array, "B T"]) -> Float[Array, "B"]:
        logits = logits_fn(params, tokens[:, :-1], start=start - 1)
        if transform is not None:
            logits = transform(logits)
        return _masked_sum(token_log_probs(logits, tokens[:, start:]), where, start=start)

    return log_prob_fn


def make_token_log_prob_fn(logits_fn: LogitsFn, *, start: int = 1):
    """Log π(x_t | x_<t) of each token, 0 where not counted: what `make_log_prob_fn` sums.

    Args:
        logits_fn: the teacher-forced model.
        start: first column that may count: the length of the shortest prompt.

    Returns:
        ``token_log_prob_fn(params, tokens [B, T], where [B, T]) -> [B, T]``, in line with ``tokens``.

    Raises:
        ValueError: if ``start`` is below 1: column 0 has no prediction.

    >>> uniform = lambda params, tokens, where=None, *, start=0: jnp.zeros((*tokens[:, start:].shape, 4))
    >>> tokens, where = jnp.array([[0, 1, 2]]), jnp.array([[False, True, True]])
    >>> make_token_log_prob_fn(uniform)(None, tokens, where).tolist()
    [[0.0, -1.386294, -1.386294]]
    """
    if start < 1:
        raise ValueError(f"start must be at least 1, since nothing predicts the token of column 0; got {start}.")

    def token_log_prob_fn(params: Params, tokens: Int[Array, "B T"], where: Bool[Array, "B T"]) -> Float[Array, "B T"]:
        logits = logits_fn(params, tokens[:, :-1], start=start - 1)
        found = token_log_probs(logits, tokens[:, start:])
        return jnp.pad(jnp.where(where[:, start:], found, 0.0), ((0, 0), (start, 0)))

    return token_log_prob_fn


def where_from_lengths(lengths: Int[Array, "*b"], columns: int) -> Bool[Array, "*b T"]:
    """True in the first ``lengths`` of so many columns.

    >>> where_from_lengths(jnp.array([1, 3]), 3).tolist()
    [[True, False, False], [True, True, True]]
    """
    return jnp.arange(columns).reshape((1,) * lengths.ndim + (-1,)) < lengths[..., None]


def pack(
    prompt: Int[Array, "B P"],
    completion: Int[Array, "B T"],
    *,
    prompt_where: Bool[Array, "B P"] | None = None,
    where: Bool[Array, "B T"],
) -> tuple[Int[Array, "B U"], Bool[Array, "B U"]]:
    """Left-padded prompts and their completions as contiguous rows, padded on the right; U = P + T.

    What samples a model wants its prompts flush with the first new token; what scores them wants no gap and no mask of
    attention: a causal model never sees what stands on the right.

    Args:
        prompt: left-padded.
        completion: as `fjax.sample` returns it.
        prompt_where: real tokens of the prompt; all by default.
        where: tokens of the completion that count.

    Returns:
        The tokens, and True where they are of the completion and count.

    >>> tokens, where = pack(
    ...     jnp.array([[9, 5]]), jnp.array([[1, 0]]), prompt_where=jnp.array([[False, True]]), where=jnp.ones((1, 2), bool)
    ... )
    >>> tokens.tolist(), where.tolist()
    ([[5, 1, 0, 9]], [[False, True, True, False]])
    """
    tokens = jnp.concatenate([prompt, completion.astype(prompt.dtype)], axis=1)
    counted = jnp.concatenate([jnp.zeros(prompt.shape, bool), where], axis=1)
    if prompt_where is None:
        return tokens, counted
    gap = prompt.shape[1] - prompt_where.sum(axis=1, keepdims=True)
    columns = (jnp.arange(tokens.shape[1])[None, :] + gap) % tokens.shape[1]
    return jnp.take_along_axis(tokens, columns, axis=1), jnp.take_along_axis(counted, columns, axis=1)


def _masked_sum(log_probs, where, *, start):
    total = jnp.sum(log_probs, axis=-1, where=where[..., start:])
    # A counted token without a prediction has no log-probability; to leave it out in silence would be a wrong number.
    return jnp.where(where[..., :start].any(-1), jnp.nan, total)
