"""Tiny sequence spaces listed whole, to test against and to teach with.

Z, divergences and gradients are then sums, and exact. The space is that of the sampler: every
sequence that ends with ``eos_id`` within T tokens, and every unfinished prefix of exactly T tokens.
Any autoregressive policy sums to one over it, and an expectation over it is a sum. So an unbiased
gradient is not argued for but seen: `expected_gradient` of the loss equals `exact_gradient` of the
divergence.

>>> from fjax import forward_kl, leave_one_out
>>> space = sequences(3, 2, eos_id=0)
>>> log_prob_fn, prefixes = tabular_log_prob_fn(3, 2)
>>> params = 0.1 * jnp.arange(3.0 * prefixes).reshape(prefixes, 3) % 0.7          # some policy
>>> log_a, contains_1 = log_prob_fn(params, *space), (space.tokens == 1).any(1)
>>> log_score = jnp.where(contains_1, log_a, -jnp.inf)
>>> log_p = log_score - exact_log_z(log_score)
>>> exact = exact_gradient(log_prob_fn, params, space, log_p, divergence=forward_kl())
>>> expected = expected_surrogate_gradient(
...     log_prob_fn, params, space, log_p,
...     divergence=forward_kl(), baseline=leave_one_out, samples=2,
... )
>>> bool(jnp.allclose(exact, expected, atol=1e-6))
True
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import as_mask, float_dtype, one_axis
from fjax.divergences import FDivergence, exact_divergence
from fjax.surrogates import Baseline, surrogate_loss
from fjax.types import Array, Bool, Float, Int, LogProbFn, Params

__all__ = [
    "Space",
    "exact_gradient",
    "exact_log_z",
    "expected_gradient",
    "expected_surrogate_gradient",
    "factorize",
    "sequences",
    "tabular_log_prob_fn",
]


_MOST_ROWS = 10**6

Loss = Callable[[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"] | None], Float[Array, "n"]]
"""(log_pi, log_p, log_q or None) of n samples -> one loss a sample."""


class Space(NamedTuple):
    """All sequences of a space, one a row.

    Attributes:
        tokens: ``[S, T]``, the prompt first if there is one, ``eos_id`` after the end of a
            sequence.
        where: True after the prompt, up to and including the token that ends the sequence.
    """

    tokens: Int[Array, "S T"]
    where: Bool[Array, "S T"]


def sequences(
    vocab_size: int, max_tokens: int, *, eos_id: int, prompt: Sequence[int] = ()
) -> Space:
    """Lists the space of sequences over ``vocab_size`` tokens, at most ``max_tokens`` long.

    It has 1 + (V-1) + … + (V-1)^(T-1) finished sequences and (V-1)^T unfinished ones.

    Args:
        vocab_size: V.
        max_tokens: T, the prompt not counted.
        eos_id: the token that ends a sequence and counts as part of it. Also the padding after it,
            on purpose: whoever takes masks from token ids gets wrong probabilities here.
        prompt: tokens before every sequence, not counted. A language model needs at least one to
            predict the first.

    Returns:
        The space, in the order of length, then of token ids.

    Raises:
        ValueError: if ``eos_id`` is no token, or the space has more than a million members.

    >>> space = sequences(2, 2, eos_id=0)                       # [0], [1 0], [1 1]
    >>> space.tokens.tolist(), space.where.sum(1).tolist()
    ([[0, 0], [1, 0], [1, 1]], [1, 2, 2])

    Source: the space of Go et al. 2023, cut off at T tokens as a sampler does.
    """
    if not 0 <= eos_id < vocab_size:
        raise ValueError(f"eos_id is one of the {vocab_size} tokens, got {eos_id}.")
    _refuse_large(
        vocab_size * (vocab_size - 1) ** max_tokens, f"{vocab_size} tokens and length {max_tokens}"
    )
    others = [token for token in range(vocab_size) if token != eos_id]
    prefixes = (prefix for length in range(max_tokens) for prefix in product(others, repeat=length))
    rows = [*((*prefix, eos_id) for prefix in prefixes), *product(others, repeat=max_tokens)]
    tokens = np.array(
        [[*prompt, *row, *[eos_id] * (max_tokens - len(row))] for row in rows], np.int32
    )
    ends = len(prompt) + np.array([len(row) for row in rows])[:, None]
    column = np.arange(tokens.shape[1])
    return Space(jnp.asarray(tokens), jnp.asarray((column >= len(prompt)) & (column < ends)))


def tabular_log_prob_fn(vocab_size: int, max_tokens: int) -> tuple[LogProbFn, int]:
    """A policy with free next-token logits after every prefix, and the number of prefixes.

    Its parameters are logits ``[prefixes, V]``: row 0 for the empty prefix, then base-V numbers of
    one digit, of two, … It can represent every distribution over the space, so D_f(π‖p) = 0 is
    attainable.

    Args:
        vocab_size: V.
        max_tokens: T. Sequences have exactly T columns, without a prompt.

    Returns:
        ``log_prob_fn(params, tokens, where)`` and the number of rows of ``params``.

    >>> log_prob_fn, prefixes = tabular_log_prob_fn(2, 2)
    >>> space = sequences(2, 2, eos_id=0)
    >>> log_pi = log_prob_fn(jnp.zeros((prefixes, 2)), space.tokens, space.where)
    >>> round(float(jnp.exp(log_pi).sum()), 6)
    1.0

    Source: chain rule of probability.
    """
    first_row = _first_rows(vocab_size, max_tokens)

    def log_prob_fn(
        params: Params, tokens: Int[Array, "B T"], where: Bool[Array, "B T"]
    ) -> Float[Array, "B"]:
        if np.ndim(tokens) != 2 or tokens.shape[1] != max_tokens:
            raise ValueError(
                f"The table is for {max_tokens} tokens, got tokens of shape "
                f"{list(np.shape(tokens))}."
            )
        if np.shape(params) != (first_row[-1], vocab_size):
            raise ValueError(
                f"The table is [{first_row[-1]}, {vocab_size}], got params "
                f"{list(np.shape(params))}."
            )
        where = jnp.asarray(as_mask(where, tokens))
        tokens = jnp.where(where, tokens, 0)  # what is not counted may be no token at all
        table = jax.nn.log_softmax(jnp.asarray(params, float_dtype(params)))
        prefix, total = (
            jnp.zeros(tokens.shape[0], tokens.dtype),
            jnp.zeros(tokens.shape[0], table.dtype),
        )
        for position in range(max_tokens):
            step = table[first_row[position] + prefix, tokens[:, position]]
            total = total + jnp.where(where[:, position], step, 0.0)
            prefix = prefix * vocab_size + tokens[:, position]
        return total

    return log_prob_fn, first_row[-1]


def factorize(log_p: Float[Array, "S"], space: Space, *, vocab_size: int) -> Float[Array, "P V"]:
    """The exact autoregressive form of a target: parameters whose policy *is* p.

    They are those of `tabular_log_prob_fn`. p(x_t | x_<t) = e^{V(x_≤t) - V(x_<t)} with the soft
    value V(prefix) = log Σ p(x) over the sequences that begin with it: a backward recursion, which
    a model can only approximate. So D_f(π‖p) = 0 for every f.

    Args:
        log_p: the target over the space, normalised or not; -inf is allowed.
        space: from `sequences`, without a prompt.
        vocab_size: V.

    Returns:
        Logits ``[prefixes, V]``; zeros after a prefix that p never has.

    >>> log_prob_fn, _ = tabular_log_prob_fn(3, 2)
    >>> space = sequences(3, 2, eos_id=0)
    >>> log_p = jax.nn.log_softmax(jnp.arange(7.0))
    >>> params = factorize(log_p, space, vocab_size=3)
    >>> bool(jnp.allclose(log_prob_fn(params, *space), log_p, atol=1e-5))
    True

    Source: Korbak et al. 2022 (arXiv 2205.11275), appendix; soft values as in Levine 2018.
    """
    (log_p,) = _over(space, log_p=log_p)
    first_row = _first_rows(vocab_size, space.tokens.shape[1])
    values = jnp.full((first_row[-1], vocab_size), -jnp.inf, log_p.dtype)
    prefix = jnp.zeros(space.tokens.shape[0], space.tokens.dtype)
    for position in range(space.tokens.shape[1]):
        token = space.tokens[:, position]
        share = jnp.where(space.where[:, position], log_p, -jnp.inf)
        values = _scatter_log_sum(values, first_row[position] + prefix, token, share)
        prefix = prefix * vocab_size + token
    return jnp.where(jnp.isneginf(values).all(axis=1, keepdims=True), 0.0, values)


def _scatter_log_sum(values, rows, columns, log_terms):
    """Sets each entry to the log of the sum of its terms, in units of the largest."""
    top = jax.lax.stop_gradient(values.at[rows, columns].max(log_terms))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    total = jnp.zeros_like(values).at[rows, columns].add(jnp.exp(log_terms - top[rows, columns]))
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + top, values)


def _first_rows(vocab_size, max_tokens):
    """Where in the table the prefixes of each length begin, and its number of rows."""
    return [sum(vocab_size**i for i in range(length)) for length in range(max_tokens + 1)]


def exact_log_z(log_score: Float[Array, "S"]) -> Float[Array, ""]:
    """The normaliser log Z = log Σ P(x) over the whole space; ``log_score`` minus it is ``log_p``.

    >>> round(float(exact_log_z(jnp.log(jnp.array([0.25, 0.25])))), 6)
    -0.693147

    Source: definition; Go et al. 2023, section 2.
    """
    (log_score,) = one_axis(log_score=log_score)
    return jax.nn.logsumexp(log_score)


def exact_gradient(
    log_prob_fn: LogProbFn,
    params: Params,
    space: Space,
    log_p: Float[Array, "S"],
    *,
    divergence: FDivergence,
) -> Params:
    """∇D_f(π‖p) by differentiating the sum over the space.

    Args:
        log_prob_fn: the policy.
        params: where the gradient is taken.
        space: from `sequences`.
        log_p: normalised target over the space; -inf is allowed where f'(∞) is finite.
        divergence: which f.

    >>> from fjax import forward_kl
    >>> log_prob_fn, prefixes = tabular_log_prob_fn(2, 1)
    >>> log_p = jnp.log(jnp.array([0.9, 0.1]))
    >>> space = sequences(2, 1, eos_id=0)
    >>> given = log_prob_fn, jnp.zeros((1, 2)), space, log_p
    >>> gradient = exact_gradient(*given, divergence=forward_kl())
    >>> gradient.round(4).tolist()
    [[-0.4, 0.4]]

    Source: Go et al. 2023, equation 1.
    """
    (log_p,) = _over(space, log_p=log_p)

    def value(params):
        return exact_divergence(log_prob_fn(params, *space), log_p, divergence=divergence)

    return jax.grad(value)(params)


def expected_gradient(
    loss: Loss,
    log_prob_fn: LogProbFn,
    params: Params,
    space: Space,
    log_p: Float[Array, "S"],
    log_q: Float[Array, "S"] | None = None,
    *,
    samples: int = 1,
) -> Params:
    """E[∇ mean loss(x_1..x_n)] over all n-tuples of samples: what a loss does on average.

    Nothing is drawn; each tuple is weighted with its probability Π q(x_i). Use it on a loss of your
    own.

    Args:
        loss: (log_pi, log_p, log_q or None) of n samples to n losses; it may look at all n, as
            leave-one-out does.
        log_prob_fn: the policy, the only thing differentiated; where the samples come from is held
            fixed.
        params: where the gradient is taken.
        space: from `sequences`.
        log_p: normalised target over the space, handed to the loss.
        log_q: sampling distribution over the space; None means on-policy, and the loss is given
            None.
        samples: n. There are S^n tuples.

    Raises:
        ValueError: if there are more than a million tuples, an array has not one number a member of
            the space, or the loss not one a sample.

    >>> log_prob_fn, prefixes = tabular_log_prob_fn(2, 1)
    >>> space = sequences(2, 1, eos_id=0)
    >>> score = lambda log_pi, log_p, log_q: log_pi  # E_π[∇ log π] = 0
    >>> given = log_prob_fn, jnp.array([[0.0, 0.5]]), space, jnp.zeros(2)
    >>> expected_gradient(score, *given).round(4).tolist()
    [[0.0, 0.0]]

    Source: Go et al. 2023, theorem 1, read backwards.
    """
    log_p, log_q = _over(space, log_p=log_p, log_q=log_q)
    size = space.tokens.shape[0]
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    _refuse_large(size**samples, f"{samples}-tuples of {size} sequences")
    log_sampled = jax.lax.stop_gradient(log_prob_fn(params, *space)) if log_q is None else log_q
    tuples = jnp.indices((size,) * samples).reshape(samples, -1).T
    probability = jnp.exp(log_sampled[tuples].sum(axis=1))
    # What is never drawn must not matter, even where its loss is infinite: something that is drawn
    # stands in for it.
    tuples = jnp.where(jnp.isneginf(log_sampled)[tuples], jnp.argmax(log_sampled), tuples)

    def value(params):
        log_pi = log_prob_fn(params, *space)

        def of_tuple(rows):
            losses = loss(log_pi[rows], log_p[rows], None if log_q is None else log_q[rows])
            if losses.shape != rows.shape:
                raise ValueError(
                    f"The loss gives one number a sample, {samples} here; got shape "
                    f"{list(losses.shape)}."
                )
            return losses.mean()

        return jnp.sum(probability * jax.vmap(of_tuple)(tuples))

    return jax.grad(value)(params)


def expected_surrogate_gradient(
    log_prob_fn: LogProbFn,
    params: Params,
    space: Space,
    log_p: Float[Array, "S"],
    log_q: Float[Array, "S"] | None = None,
    *,
    divergence: FDivergence,
    baseline: float | Baseline = 0.0,
    clip: tuple[float, float] | None = None,
    samples: int = 1,
) -> Params:
    """`expected_gradient` of `fjax.surrogate_loss`: equals `exact_gradient` unless clipped.

    Args:
        log_prob_fn: the policy.
        params: where the gradient is taken.
        space: from `sequences`.
        log_p: normalised target over the space; -inf is allowed where f'(∞) is finite.
        log_q: sampling distribution over the space; None means on-policy.
        divergence: which f.
        baseline: a number, or a function such as `fjax.leave_one_out`, which needs ``samples`` ≥ 2.
        clip: bounds of f', see `fjax.score_weights`.
        samples: n, how many samples the loss sees together.

    >>> from fjax import forward_kl
    >>> log_prob_fn, prefixes = tabular_log_prob_fn(2, 1)
    >>> log_p, space = jnp.log(jnp.array([0.9, 0.1])), sequences(2, 1, eos_id=0)
    >>> gradient = expected_surrogate_gradient(
    ...     log_prob_fn, jnp.zeros((1, 2)), space, log_p, divergence=forward_kl()
    ... )
    >>> gradient.round(4).tolist()
    [[-0.4, 0.4]]

    Source: Go et al. 2023, theorem 1.
    """

    def loss(log_pi, log_p, log_q):
        return surrogate_loss(
            log_pi, log_p, log_q, divergence=divergence, baseline=baseline, clip=clip
        )

    return expected_gradient(loss, log_prob_fn, params, space, log_p, log_q, samples=samples)


def _over(space, **arrays):
    """Arrays with one number a member of the space, at the door."""
    kept = one_axis(**arrays)
    for name, x in zip(arrays, kept, strict=True):
        if x is not None and x.shape != space.tokens.shape[:1]:
            raise ValueError(
                f"The space has {space.tokens.shape[0]} members, but {name} the shape "
                f"{list(x.shape)}."
            )
    return kept


def _refuse_large(rows, what):
    if rows > _MOST_ROWS:
        raise ValueError(f"{what} make more than {_MOST_ROWS} rows, which is too many to list.")
