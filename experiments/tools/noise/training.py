"""Whole runs: do the mean of the parameters, a rate that falls, or an α or β that moves, pay?

Samples are drawn as in training, and the policy at the end is compared with the target by a sum.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fjax import divergences, surrogates
from fjax.divergences import FDivergence, exact_divergence
from fjax.estimators import log_mixture

from .world import (
    BASE_SAMPLES,
    SAMPLES,
    STRATA,
    Task,
    bigram_task,
    digits,
    table,
    tabular_task,
)

STEPS, SEEDS = 300, 20
RATES = (0.01, 0.03, 0.1, 0.3)
INVERSE_BETA = 5.0
ALPHAS = (0.0, 0.5)

Aim = Callable[[Task, jax.Array], tuple[FDivergence, jax.Array]]
"""(task, level) -> the divergence and the target of a step."""


class Plan(NamedTuple):
    """What a run does, as numbers.

    Attributes:
        start, end: the level in the first quarter of the steps, and in the last; it moves linearly
            from one to the other.
        falls: 1 if the rate falls linearly to 0, 0 if it stays.
        rate: Adam's, at first.
    """

    start: jax.Array
    end: jax.Array
    falls: jax.Array
    rate: jax.Array


class Final(NamedTuple):
    """Parameters: the last, and the mean of those after each step of the last half."""

    last: jax.Array
    mean: jax.Array


def of_alpha(task: Task, level: jax.Array) -> tuple[FDivergence, jax.Array]:
    """The level is α: 0 is forward KL, ½ twice the squared Hellinger distance."""
    return divergences.alpha_divergence(level), task.log_p


def of_beta(task: Task, level: jax.Array) -> tuple[FDivergence, jax.Array]:
    """The level is 1/β, and KL(π‖p) what RLHF descends for a reward of 1 for what meets the
    constraint."""
    log_score = task.log_a + level * jnp.isfinite(task.log_p)
    return divergences.reverse_kl(), jax.nn.log_softmax(log_score)


def level(plan: Plan, progress: jax.Array) -> jax.Array:
    """Of a step, by the share of the steps before it."""
    return plan.start + (plan.end - plan.start) * jnp.clip(2 * progress - 0.5, 0.0, 1.0)


def draw(rng_key: jax.Array, log_pi: jax.Array, log_a: jax.Array) -> jax.Array:
    """Rows of a batch, the policy's first."""
    parts = (SAMPLES - BASE_SAMPLES, log_pi), (BASE_SAMPLES, log_a)
    rows = [
        jax.random.choice(key, len(log_prob), (size,), p=jnp.exp(log_prob))
        for key, (size, log_prob) in zip(jax.random.split(rng_key), parts, strict=True)
    ]
    return jnp.concatenate(rows)


def batch_loss(
    task: Task, aim: Aim, params: jax.Array, rng_key: jax.Array, at: jax.Array
) -> jax.Array:
    """Of one batch at a level, with a leave-one-out baseline that is told the strata."""
    log_pi = task.log_prob_fn(params, *task.space)
    stopped = jax.lax.stop_gradient(log_pi)
    rows = draw(rng_key, stopped, task.log_a)
    log_q = log_mixture(stopped, task.log_a, base_fraction=BASE_SAMPLES / SAMPLES)
    divergence, log_p = aim(task, at)
    baseline = partial(surrogates.leave_one_out, strata=jnp.asarray(STRATA, jnp.int32))
    losses = surrogates.surrogate_loss(
        log_pi[rows], log_p[rows], log_q[rows], divergence=divergence, baseline=baseline
    )
    return losses.mean()


def train(task: Task, aim: Aim, plan: Plan, rng_key: jax.Array, *, steps: int = STEPS) -> Final:
    """From the base model, by Adam."""
    adam = optax.scale_by_adam(b2=0.98)
    gradient_fn = jax.grad(partial(batch_loss, task, aim))

    def step(state, count):
        params, moments, mean = state
        key, progress = jax.random.fold_in(rng_key, count), count / steps
        gradient = gradient_fn(params, key, level(plan, progress))
        update, moments = adam.update(gradient, moments)
        params = params - plan.rate * (1 - plan.falls * progress) * update
        mean = mean + jnp.where(count >= steps // 2, params / (steps - steps // 2), 0.0)
        return (params, moments, mean), None

    before = task.base, adam.init(task.base), jnp.zeros_like(task.base)
    (last, _, mean), _ = jax.lax.scan(step, before, jnp.arange(steps))
    return Final(last, mean)


def train_all(
    task: Task, aim: Aim, levels: Sequence[tuple[float, float]], falls: Sequence[int], seed: int
) -> Final:
    """Every way to move the level with every schedule, rate and seed: ``[L, F, R, N, ...]``."""
    grid = np.meshgrid(np.arange(len(levels)), falls, RATES, indexing="ij")
    way, fall, rate = (jnp.asarray(x).ravel() for x in grid)
    starts_and_ends = jnp.asarray(levels)[way]
    plans = Plan(starts_and_ends[:, 0], starts_and_ends[:, 1], fall, rate)
    one = partial(train, task, aim)
    every = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    found = jax.jit(every)(plans, jax.random.split(jax.random.key(seed), SEEDS))
    return jax.tree.map(lambda x: x.reshape(*grid[0].shape, *x.shape[1:]), found)


def figures(task: Task, params: jax.Array, log_p: jax.Array, divergence: FDivergence) -> np.ndarray:
    """D_f(π‖p) of all that were trained."""

    def of(params):
        log_pi = task.log_prob_fn(params, *task.space)
        return exact_divergence(log_pi, log_p, divergence=divergence)

    several = params.reshape(-1, *params.shape[-2:])
    return np.asarray(jax.vmap(of)(several)).reshape(params.shape[:-2])


def cell(found: np.ndarray) -> str:
    """Mean ± standard error over the seeds, the last axis, at the best rate."""
    rates = found.reshape(-1, found.shape[-1])
    best = rates[rates.mean(axis=1).argmin()]
    return f"{digits(best.mean())} ± {best.std(ddof=1) / np.sqrt(len(best)):.2g}"


def least(task: Task, divergence: FDivergence, steps: int = 1000) -> float:
    """What no policy goes below: the end of a descent of the sum."""
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, steps))

    def value(params):
        log_pi = task.log_prob_fn(params, *task.space)
        return exact_divergence(log_pi, task.log_p, divergence=divergence)

    def step(state, _):
        params, moments = state
        update, moments = optimizer.update(jax.grad(value)(params), moments)
        return (params + update, moments), None

    params = jnp.maximum(task.nearest(task.log_p), -30.0)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return float(value(params))


def columns(task: Task, seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """Of each D_α, above the least: what it is where α is its own, at both ends of both schedules;
    and the last parameters' by how α moves, at the better schedule."""
    levels = [*((alpha, alpha) for alpha in ALPHAS), ALPHAS]
    final = train_all(task, of_alpha, levels, (0, 1), seed)
    averaged, moved = [], []
    for own, divergence in enumerate(map(divergences.alpha_divergence, ALPHAS)):
        base = least(task, divergence)
        last, mean = (figures(task, x, task.log_p, divergence) - base for x in final)
        averaged.append([cell(x[own, falls]) for falls in (0, 1) for x in (last, mean)])
        moved.append([cell(of_way) for of_way in last])
    return averaged, moved


def tables_of_alpha(seed: int) -> tuple[str, str]:
    """Markdown: of means and falling rates, and of an α that moves."""
    found = [columns(task, seed) for task in (tabular_task(seed), bigram_task(seed))]
    schedules = ("constant rate", "rate falls to 0")
    ends = [f"{rate}, {x}" for rate in schedules for x in ("last", "mean of the last half")]
    ways = ["α = 0", "α = ½", "α from 0 to ½"]
    header = [
        "",
        *(f"{kind}, {d}" for kind in ("table", "bigrams") for d in ("KL(p‖π)", "D_½(π‖p)")),
    ]
    averaged, moved = ([*first, *second] for first, second in zip(*found, strict=True))
    return (
        table(header, list(zip(ends, *averaged, strict=True))),
        table(header, list(zip(ways, *moved, strict=True))),
    )


def table_of_beta(seed: int) -> str:
    """Markdown: KL(π‖p) at a constant rate, by rate."""
    task, first = tabular_task(seed), INVERSE_BETA / 10
    levels = [(INVERSE_BETA, INVERSE_BETA), (first, INVERSE_BETA)]
    last = train_all(task, of_beta, levels, (0,), seed).last
    divergence, log_p = of_beta(task, jnp.asarray(INVERSE_BETA))
    found = figures(task, last, log_p, divergence)[:, 0]
    ways = [f"1/β = {INVERSE_BETA:g}", f"1/β from {first:g} to {INVERSE_BETA:g}"]
    lines = [[name, *map(cell, rates)] for name, rates in zip(ways, found, strict=True)]
    return table(["", *(f"rate {rate:g}" for rate in RATES)], lines)
