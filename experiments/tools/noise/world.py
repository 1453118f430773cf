"""The small spaces of the page, and how its numbers are shown."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax import enumeration

SAMPLES, BASE_SAMPLES = 64, 8
STRATA = np.arange(SAMPLES) >= SAMPLES - BASE_SAMPLES
VOCAB, LENGTH = 4, 3


class Task(NamedTuple):
    """A base model, and a constraint that it rarely meets, over a space listed whole.

    Attributes:
        log_prob_fn, space: the policy, a table of logits, and the S sequences.
        base: parameters of the base model.
        log_a: of each sequence under it.
        log_p: of each under the target, the base model's own sequences that meet the constraint.
        nearest: log-probabilities of each under any p -> parameters of the smallest KL(p‖π).
    """

    log_prob_fn: Callable
    space: enumeration.Space
    base: jax.Array
    log_a: jax.Array
    log_p: jax.Array
    nearest: Callable


def tabular_task(seed: int) -> Task:
    """With logits of its own after every prefix, so the policy can be the target."""
    space = enumeration.sequences(VOCAB, LENGTH, eos_id=0)
    log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(VOCAB, LENGTH)
    nearest = partial(enumeration.factorize, space=space, vocab_size=VOCAB)
    return make_task(seed, log_prob_fn, space, prefixes, nearest)


def bigram_task(seed: int, length: int = LENGTH) -> Task:
    """With logits that the last token alone decides, so the policy cannot be the target."""
    space = enumeration.sequences(VOCAB, length, eos_id=0)
    return make_task(seed, bigram_log_prob, space, VOCAB, partial(nearest_bigram, space=space))


def make_task(
    seed: int, log_prob_fn: Callable, space: enumeration.Space, rows: int, nearest: Callable
) -> Task:
    """The constraint is a token that the base rarely draws."""
    rng = np.random.default_rng(seed)
    base = jnp.asarray(rng.normal(size=(rows, VOCAB))).at[:, 1].add(-3.0)
    log_a = log_prob_fn(base, *space)
    log_score = jnp.where((space.tokens == 1).any(axis=1), log_a, -jnp.inf)
    log_p = log_score - enumeration.exact_log_z(log_score)
    return Task(log_prob_fn, space, base, log_a, log_p, nearest)


def bigram_log_prob(params: jax.Array, tokens: jax.Array, where: jax.Array) -> jax.Array:
    """Of sequences, from logits ``[V, V]`` by the token before; row 0 begins them, for nothing
    comes after the end."""
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(where, jax.nn.log_softmax(params)[before, tokens], 0.0).sum(axis=1)


def nearest_bigram(log_p: jax.Array, space: enumeration.Space) -> jax.Array:
    """The logits of the smallest KL(p‖π): those of p's expected numbers of pairs."""
    before = jnp.pad(space.tokens[:, :-1], ((0, 0), (1, 0)))
    weights = jnp.where(space.where, jnp.exp(log_p)[:, None], 0.0)
    return jnp.log(jnp.zeros((VOCAB, VOCAB)).at[before, space.tokens].add(weights))


def token_log_probs(log_prob_fn: Callable, params: jax.Array, space: enumeration.Space):
    """Log π(x_t|x_<t), ``[S, T]``, 0 after the end: the differences between prefixes."""
    columns = jnp.arange(space.tokens.shape[1])
    to = [log_prob_fn(params, space.tokens, space.where & (columns <= t)[None]) for t in columns]
    return jnp.diff(jnp.stack(to, axis=1), axis=1, prepend=jnp.zeros((len(to[0]), 1)))


def same_prefix(space: enumeration.Space) -> jax.Array:
    """Whether two sequences share the tokens before position t, and both have one there:
    ``[T, S, S]``."""
    tokens, where = (np.asarray(x) for x in space)
    prefixes = [tokens[:, :t] for t in range(tokens.shape[1])]
    alike = np.stack([(x[:, None] == x[None]).all(axis=-1) for x in prefixes])
    return jnp.asarray(alike & where.T[:, :, None] & where.T[:, None, :])


def mean_by_prefix(values: jax.Array, probabilities: jax.Array, same: jax.Array) -> jax.Array:
    """E[values at t | x_<t], ``[S, T]`` as the values are, 0 after the end."""
    total = jnp.einsum("tij,j,jt->it", same, probabilities, values)
    weight = jnp.einsum("tij,j->it", same, probabilities)
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in every)


def digits(number: float) -> str:
    """Three of them, or all before the point."""
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"
