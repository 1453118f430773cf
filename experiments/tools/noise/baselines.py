"""What a baseline, a control variate and an estimate of Z do to the variance of the gradient.

Wherever the weights of a sample do not depend on the others, the variance is summed over every
sequence of a small space. Else it is that of many batches, drawn there.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax import divergences, surrogates
from fjax.estimators import estimate_log_z, log_mixture

from .world import (
    BASE_SAMPLES,
    SAMPLES,
    STRATA,
    digits,
    mean_by_prefix,
    same_prefix,
    table,
    tabular_task,
    token_log_probs,
)

BATCHES = 10_000
DECAY = 0.99
DIVERGENCES = (divergences.forward_kl(), divergences.jensen_shannon())


class World(NamedTuple):
    """A policy between its base model and a rare constraint, over a space listed whole.

    Attributes:
        log_pi, log_a, log_p, log_q: of each of the S sequences: policy, base model, target, and the
            mixture that samples are drawn from.
        scores: ∇log π of each, ``[S, P]``.
        token_scores: of each of its tokens, given those before, ``[S, T, P]``.
        same: whether two have the same prefix, see `same_prefix`.
    """

    log_pi: jax.Array
    log_a: jax.Array
    log_p: jax.Array
    log_q: jax.Array
    scores: jax.Array
    token_scores: jax.Array
    same: jax.Array


class Noise(NamedTuple):
    """Of a gradient estimate: N times its variance, and its bias, both in units of the true one.

    Attributes:
        variance: N tr Cov[ĝ]/‖∇D‖²: how many samples it takes until the standard error is as long
            as the gradient.
        bias: ‖E[ĝ] - ∇D‖/‖∇D‖; 0 where it is proved to be.
    """

    variance: float
    bias: float


def make_world(seed: int, way: float) -> World:
    """The policy is (1 - way) a + way p."""
    task = tabular_task(seed)
    mixed = log_mixture(task.log_a, task.log_p, base_fraction=way)
    params = task.nearest(mixed)
    scores = jax.jacfwd(partial(token_log_probs, task.log_prob_fn))(params, task.space)
    scores = scores.reshape(*task.space.tokens.shape, -1)
    log_pi = task.log_prob_fn(params, *task.space)
    log_q = log_mixture(log_pi, task.log_a, base_fraction=BASE_SAMPLES / SAMPLES)
    given = log_pi, task.log_a, task.log_p, log_q, scores.sum(axis=1), scores
    return World(*given, same_prefix(task.space))


def components(world: World, fixed: bool) -> list[tuple[float, jax.Array]]:
    """(share, probabilities) of what samples are drawn from: both parts, or their mixture."""
    if not fixed:
        return [(1.0, jnp.exp(world.log_q))]
    share = BASE_SAMPLES / SAMPLES
    return [(1 - share, jnp.exp(world.log_pi)), (share, jnp.exp(world.log_a))]


def covariance(world: World, x: jax.Array, y: jax.Array, *, fixed: bool) -> jax.Array:
    """N times that of the means of x and y over a batch, by parameter; x and y are ``[S, P]``."""

    def of(probabilities):
        of_x, of_y = (z - (probabilities @ z)[None] for z in (x, y))
        return probabilities @ (of_x * of_y)

    parts = [share * of(probabilities) for share, probabilities in components(world, fixed)]
    return jnp.stack(parts).sum(axis=0)


class Parts(NamedTuple):
    """One f at one policy, as (w - ρB)∇log π of each sequence.

    Attributes:
        weights: w = (π/q) f'.
        gradients: w ∇log π.
        pulls: ρ ∇log π, what B multiplies.
        expected: E_π[f'].
        best: the B of the smallest variance, with fixed numbers of both parts.
        exact: ∇D_f(π‖p).
    """

    weights: jax.Array
    gradients: jax.Array
    pulls: jax.Array
    expected: jax.Array
    best: jax.Array
    exact: jax.Array


def make_parts(world: World, divergence: divergences.FDivergence) -> Parts:
    """Everything that the rows of the table have in common."""
    weights = surrogates.score_weights(
        world.log_pi, world.log_p, world.log_q, divergence=divergence
    )
    gradients = weights[:, None] * world.scores
    pulls = jnp.exp(world.log_pi - world.log_q)[:, None] * world.scores
    q = jnp.exp(world.log_q)
    best = (
        covariance(world, gradients, pulls, fixed=True).sum()
        / covariance(world, pulls, pulls, fixed=True).sum()
    )
    return Parts(weights, gradients, pulls, q @ weights, best, q @ gradients)


def noise(parts: Parts, variance: jax.Array, mean: jax.Array | None = None) -> Noise:
    """In units of the true gradient."""
    square = jnp.sum(parts.exact**2)
    bias = 0.0 if mean is None else jnp.linalg.norm(mean - parts.exact) / jnp.sqrt(square)
    return Noise(float(variance / square), float(bias))


def of_constant(world: World, parts: Parts, baseline, *, fixed: bool = True) -> Noise:
    """A number for B, summed."""
    g = parts.gradients - baseline * parts.pulls
    return noise(parts, covariance(world, g, g, fixed=fixed).sum())


def of_running_mean(world: World, parts: Parts) -> Noise:
    """B from earlier batches of the same policy, independent of this one; summed.

    ĝ = A - B·C with E[C] = 0: tr Cov is that for B's mean, and Var[B] tr Cov[C] more.
    """
    weights = parts.weights[:, None]
    variance = covariance(world, weights, weights, fixed=True).sum() / SAMPLES
    variance *= (1 - DECAY) / (1 + DECAY)
    pull = covariance(world, parts.pulls, parts.pulls, fixed=True).sum()
    before = of_constant(world, parts, parts.expected)
    return before._replace(variance=before.variance + noise(parts, variance * pull).variance)


def of_control_variate(world: World, parts: Parts, baseline) -> Noise:
    """Less what π/q - 1 explains of each entry, by its best coefficient; summed.

    Both parts' ratios are one control variate: (1 - ε)(π/q - 1) = -ε(a/q - 1).
    """
    g = parts.gradients - baseline * parts.pulls
    ratio = jnp.broadcast_to(jnp.expm1(world.log_pi - world.log_q)[:, None], g.shape)
    own, shared, of_ratio = (
        covariance(world, x, y, fixed=True) for x, y in ((g, g), (g, ratio), (ratio, ratio))
    )
    explained = jnp.where(of_ratio > 0, shared**2 / jnp.where(of_ratio > 0, of_ratio, 1.0), 0.0)
    return noise(parts, jnp.sum(own - explained))


def prefix_gradients(world: World, parts: Parts, baseline: jax.Array) -> jax.Array:
    """Of each sequence, with a B of its own for every token, ``[S, T]``.

    Unbiased whatever it says of the tokens before: E_q[(π/q) B_t(x_<t) ∇log π(x_t|x_<t)] =
    E_π[B_t(x_<t) · 0], for the ratio is that of the whole sequence.
    """
    ratio = jnp.exp(world.log_pi - world.log_q)[:, None]
    return parts.gradients - ratio * jnp.einsum("st,stp->sp", baseline, world.token_scores)


def of_prefix(world: World, parts: Parts, baseline: jax.Array) -> Noise:
    """A B of each prefix, summed."""
    g = prefix_gradients(world, parts, baseline)
    return noise(parts, covariance(world, g, g, fixed=True).sum())


def expected_by_prefix(world: World, parts: Parts) -> jax.Array:
    """E_π[f' | x_<t]: all that a critic can learn from the states of the model before token t."""
    pi = jnp.exp(world.log_pi)
    slopes = parts.weights * jnp.exp(world.log_q - world.log_pi)  # f'
    slopes = jnp.broadcast_to(slopes[:, None], world.token_scores.shape[:2])
    return mean_by_prefix(slopes, pi, world.same)


def best_by_prefix(world: World, parts: Parts) -> jax.Array:
    """The one number a prefix that make the variance smallest, ``[S, T]``: what no critic beats."""
    columns = np.eye(len(world.same))
    of_prefixes = [np.unique(np.asarray(same), axis=0) for same in world.same]
    members = jnp.asarray(
        [np.outer(row, columns[t]) for t, found in enumerate(of_prefixes) for row in found]
    )  # [K, S, T]; the empty set has no pull, and least squares gives it 0
    ratio = jnp.exp(world.log_pi - world.log_q)
    pulls = jnp.einsum("kst,stp,s->ksp", members, world.token_scores, ratio)

    def shared(x, y):
        return covariance(world, x, y, fixed=True).sum()

    of_pulls = jax.vmap(jax.vmap(shared, (None, 0)), (0, None))(pulls, pulls)
    own = jax.vmap(partial(shared, parts.gradients))(pulls)
    return jnp.einsum("k,kst->st", jnp.linalg.lstsq(of_pulls, own)[0], members)


def batch_gradients(
    divergence: divergences.FDivergence, expected: jax.Array
) -> dict[str, Callable]:
    """What has to be drawn: (log_pi, log_p, log_q) of a batch -> weights of ∇log π."""

    def centred(log_pi, log_p, log_q, baseline):
        weights = surrogates.score_weights(log_pi, log_p, log_q, divergence=divergence)
        return surrogates.centred_weights(weights, log_pi, log_q, baseline=baseline)

    def of_baseline(make):
        return lambda log_pi, log_p, log_q: centred(log_pi, log_p, log_q, make(log_pi, log_q))

    def with_z(halves):
        def weigh(log_pi, log_p, log_q):
            of_part = [estimate_log_z(log_p, log_q, where=where).value for where in halves]
            log_z = jnp.where(halves[0], of_part[-1], of_part[0])
            known = ~jnp.isneginf(log_z)  # without a hit there is no Z, and the gradient is 0
            log_p = log_p - jnp.where(known, log_z, 0.0)
            return jnp.where(known, centred(log_pi, log_p, log_q, expected), 0.0)

        return weigh

    everyone, first = np.ones(SAMPLES, bool), np.arange(SAMPLES) % 2 == 0
    strata = partial(surrogates.leave_one_out, strata=jnp.asarray(STRATA, jnp.int32))
    return {
        "leave-one-out, strata not told": of_baseline(lambda *_: surrogates.leave_one_out),
        "leave-one-out, strata told": of_baseline(lambda *_: strata),
        "self-normalised": of_baseline(surrogates.self_normalized),
        "E[f'], Z of the batch": with_z([jnp.asarray(everyone)]),
        "E[f'], Z of the other half": with_z([jnp.asarray(first), jnp.asarray(~first)]),
    }


def of_batches(world: World, divergence, parts: Parts, seed: int) -> dict[str, Noise]:
    """From batches with fixed numbers of both parts."""
    weigh = batch_gradients(divergence, parts.expected)
    log_drawn = jnp.where(STRATA[:, None], world.log_a[None], world.log_pi[None])

    def of_batch(rng_key):
        rows = jax.random.categorical(rng_key, log_drawn)
        given = tuple(x[rows] for x in (world.log_pi, world.log_p, world.log_q))
        return jnp.stack([f(*given) @ world.scores[rows] / SAMPLES for f in weigh.values()])

    keys = jax.random.split(jax.random.key(seed), BATCHES)
    found = jax.jit(lambda keys: jax.lax.map(of_batch, keys, batch_size=500))(keys)
    means, variances = found.mean(axis=0), SAMPLES * found.var(axis=0, ddof=1).sum(axis=-1)
    return {
        name: noise(parts, variance, None if name == "leave-one-out, strata told" else mean)
        for name, mean, variance in zip(weigh, means, variances, strict=True)
    }


def summed(world: World, parts: Parts) -> dict[str, Noise]:
    """Name -> noise, of all that needs no sample."""
    return {
        "B = 0, numbers of both parts by chance": of_constant(world, parts, 0.0, fixed=False),
        "B = E[f'], by chance": of_constant(world, parts, parts.expected, fixed=False),
        "B = 0": of_constant(world, parts, 0.0),
        "B = E[f']": of_constant(world, parts, parts.expected),
        "B of the smallest variance": of_constant(world, parts, parts.best),
        f"running mean, {DECAY} kept a batch": of_running_mean(world, parts),
        "B = E[f'], less what π/q - 1 explains": of_control_variate(world, parts, parts.expected),
        "best B, less what π/q - 1 explains": of_control_variate(world, parts, parts.best),
        "B of each prefix, E[f'] after it": of_prefix(
            world, parts, expected_by_prefix(world, parts)
        ),
        "B of each prefix, of the smallest variance": of_prefix(
            world, parts, best_by_prefix(world, parts)
        ),
    }


def rows(world: World, divergence: divergences.FDivergence, seed: int) -> dict[str, Noise]:
    """Name -> noise, in the order of the table."""
    parts = make_parts(world, divergence)
    return summed(world, parts) | of_batches(world, divergence, parts, seed)


def cell(found: Noise) -> str:
    """A variance, and a bias that is not 0 beside."""
    shown = digits(found.variance)
    return f"{shown}, bias {100 * found.bias:.0f} %" if found.bias else shown


def table_of_baselines(seed: int) -> str:
    """Markdown."""
    columns = [
        (f"{divergence.name}, {place}", rows(make_world(seed, way), divergence, seed))
        for place, way in (("π = a", 0.0), ("π half the way", 0.5))
        for divergence in DIVERGENCES
    ]
    lines = [[name, *(cell(found[name]) for _, found in columns)] for name in columns[0][1]]
    return table(["", *(name for name, _ in columns)], lines)
