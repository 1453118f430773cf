"""Writes docs/noise.md, what each means against noise is worth:
python -m experiments gradient_noise --help.

Wherever the weights of a sample do not depend on the others, the variance of the gradient is summed
over every sequence of a small space, in float64. Else it is that of many batches, drawn there.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax import divergences, enumeration, surrogates
from fjax.estimators import estimate_log_z, log_mixture
from fjax.runs.folder import write_text

from ..common.arguments import check_numbers, check_output
from ..common.command import run

SAMPLES, BASE_SAMPLES, BATCHES = 64, 8, 10_000
STRATA = np.arange(SAMPLES) >= SAMPLES - BASE_SAMPLES
DECAY = 0.99
DIVERGENCES = (divergences.forward_kl(), divergences.jensen_shannon())


@dataclass(frozen=True)
class Config:
    """Variance of the gradient per sample drawn, with each baseline, control variate and
    estimate of Z.

    Examples:

        python -m experiments gradient_noise
        python -m experiments gradient_noise --output docs/noise.md
    """

    output: Path | None = None
    """The page is written here; without it, printed."""
    seed: int = 0
    """Seed of the base model, and of the batches that are drawn."""

    def __post_init__(self):
        check_numbers(self)


class World(NamedTuple):
    """A policy between its base model and a rare constraint, over a space listed whole.

    Attributes:
        log_pi, log_a, log_p, log_q: of each of the S sequences: policy, base model, target, and the
            mixture that samples are drawn from.
        scores: ∇log π of each, ``[S, P]``.
    """

    log_pi: jax.Array
    log_a: jax.Array
    log_p: jax.Array
    log_q: jax.Array
    scores: jax.Array


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
    """The policy is (1 - way) a + way p; the constraint is a token that the base rarely draws."""
    rng = np.random.default_rng(seed)
    space = enumeration.sequences(4, 3, eos_id=0)
    log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(4, 3)
    base = jnp.asarray(rng.normal(size=(prefixes, 4))).at[:, 1].add(-3.0)
    log_a = log_prob_fn(base, *space)
    log_score = jnp.where((space.tokens == 1).any(axis=1), log_a, -jnp.inf)
    log_p = log_score - enumeration.exact_log_z(log_score)
    mixed = log_mixture(log_a, log_p, base_fraction=way)
    params = enumeration.factorize(mixed, space, vocab_size=4)
    scores = jax.jacobian(log_prob_fn)(params, *space).reshape(len(log_a), -1)
    log_pi = log_prob_fn(params, *space)
    log_q = log_mixture(log_pi, log_a, base_fraction=BASE_SAMPLES / SAMPLES)
    return World(log_pi, log_a, log_p, log_q, scores)


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
    }


def rows(world: World, divergence: divergences.FDivergence, seed: int) -> dict[str, Noise]:
    """Name -> noise, in the order of the table."""
    parts = make_parts(world, divergence)
    return summed(world, parts) | of_batches(world, divergence, parts, seed)


def cell(found: Noise) -> str:
    """Two digits, and a bias that is not 0 beside."""
    shown = f"{found.variance:.3g}" if found.variance < 100 else f"{found.variance:.0f}"
    return f"{shown}, bias {100 * found.bias:.0f} %" if found.bias else shown


def table(seed: int) -> str:
    """Markdown."""
    columns = [
        (f"{divergence.name}, {place}", rows(make_world(seed, way), divergence, seed))
        for place, way in (("π = a", 0.0), ("π half the way", 0.5))
        for divergence in DIVERGENCES
    ]
    header = ["", *(name for name, _ in columns)]
    lines = [[name, *(cell(found[name]) for _, found in columns)] for name in columns[0][1]]
    every = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in every)


def page(config: Config) -> str:
    """The whole document."""
    with jax.enable_x64(True):
        world = make_world(config.seed, 0.0)
        rate = float(jnp.exp(world.log_a)[jnp.isfinite(world.log_p)].sum())
        made = table(config.seed)
    return PAGE.format(
        space=len(world.log_a), rate=100 * rate, table=made, samples=SAMPLES,
        base=BASE_SAMPLES, batches=BATCHES, seed=config.seed,
    )  # fmt: skip


def gradient_noise(config: Config) -> int:
    """Prints or writes the page."""
    check_output(config.output, "--output")
    text = page(config)
    if config.output is None:
        print(text, end="")
    else:
        write_text(config.output, text)
        print(f"Written to {config.output}.")
    return 0


PAGE = """# How noisy is the gradient?

How many samples does it take until the standard error of the gradient is as long as the gradient
itself? That is N tr Cov[ĝ]/‖∇D‖², the variance per sample drawn. Here it is over all {space}
sequences of a small space: a target a·b whose constraint the base model meets {rate:.1f} % of the
time, {samples} samples a batch of which {base} are of the base model, a tabular policy that is the
base model or half the way to the target (seed {seed}, float64).

{table}

Rows are with fixed numbers of both parts and the true Z unless they say otherwise. A bias is that
of the mean, in percent of the gradient; rows without one have none. Leave-one-out, self-normalised
and estimated Z are measured on {batches:,} batches (variances to about 2 %, biases to about a
percent where the variance is 100); all others are sums, and exact.

What it says, for seed 0:

- **Being nearer to the target is what helps**: half the way a sample tells nearly ten times as much
  as at the base model. Whatever the baseline, what is rare is a sample with P > 0.
- **Some baseline is needed, and any will do.** Half the way, forward KL has 2.4 times the variance
  without. Leave-one-out, the running mean and the self-normalised one are all within a few percent
  of the E[f'] that they estimate, and that one of the best number there is.
- **Fixed numbers of both parts, and control variates of the mixture, are worth nothing here**:
  π/q - 1 and a/q - 1 are one control variate, and B, which is multiplied by π/q, has done its work.
- **A Z of the same batch need not be cross-fitted.** Half the way it costs 5 to 14 % in variance,
  and at the base model it takes some away, as its error and the gradient's go together. Its bias,
  up to 9 % in so small batches, a running estimate does not have. Cross-fitted it costs more, and
  half a batch often has no hit: then there is no Z, and no gradient.

At the base model every f has the same direction for a constraint, for π/p is Z or infinite there:
centred, the columns are one.

    python -m experiments gradient_noise --output docs/noise.md

makes this page.
"""


main = partial(run, Config, gradient_noise, name="gradient_noise")

if __name__ == "__main__":
    sys.exit(main())
