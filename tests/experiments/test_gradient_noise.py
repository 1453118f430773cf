"""The table of the gradient's noise: its sums against batches that are drawn, and its page."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tools import gradient_noise
from experiments.tools.noise import baselines
from experiments.tools.noise.baselines import BATCHES, DIVERGENCES
from experiments.tools.noise.world import SAMPLES, STRATA, mean_by_prefix, tabular_task
from fjax import enumeration
from fjax.estimators import log_mixture

PAGE = Path(__file__).parents[2] / "docs" / "noise.md"
SHARE = np.mean(STRATA)


@pytest.fixture
def halfway(x64):
    return baselines.make_world(0, 0.5)


def test_sums_are_what_batches_measure(halfway):
    """The variance of a number for B with fixed numbers of both parts, over 10,000 batches: within
    five standard errors, √(2/10,000) each if the gradient had one entry."""
    parts = baselines.make_parts(halfway, DIVERGENCES[1])
    log_drawn = jnp.where(STRATA[:, None], halfway.log_a[None], halfway.log_pi[None])
    g = parts.gradients - 0.3 * parts.pulls
    rows = jax.random.categorical(jax.random.key(1), log_drawn, shape=(BATCHES, SAMPLES))
    found = sum(np.asarray(g)[column] for column in np.asarray(rows).T) / SAMPLES
    square = float(jnp.sum(parts.exact**2))
    measured = SAMPLES * found.var(axis=0, ddof=1).sum() / square
    summed = baselines.of_constant(halfway, parts, 0.3).variance
    assert measured == pytest.approx(summed, rel=5 * np.sqrt(2 / BATCHES))


def test_both_parts_together_have_the_exact_gradient_and_the_best_baseline_is(halfway):
    parts = baselines.make_parts(halfway, DIVERGENCES[0])
    of_pi, of_a = (np.exp(x) @ parts.gradients for x in (halfway.log_pi, halfway.log_a))
    np.testing.assert_allclose((1 - SHARE) * of_pi + SHARE * of_a, parts.exact, atol=1e-12)
    variances = [
        baselines.of_constant(halfway, parts, parts.best + step).variance
        for step in (-0.01, 0.0, 0.01)
    ]
    assert variances[1] < min(variances[0], variances[2])
    assert baselines.of_control_variate(halfway, parts, parts.best).variance <= variances[1]


def of_prefixes(world, rng_key) -> jax.Array:
    """A number for each prefix, at random."""
    pi = jnp.exp(world.log_pi)
    return mean_by_prefix(jax.random.normal(rng_key, world.same.shape[1::-1]), pi, world.same)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda f: f.name)
def test_a_baseline_of_the_prefix_is_unbiased_whatever_it_says(divergence, on_policy, halfway):
    """Off-policy too, where the ratio is of the whole sequence. One that sees the token is not."""
    world = halfway._replace(log_q=halfway.log_pi) if on_policy else halfway
    task = tabular_task(0)
    params = task.nearest(log_mixture(task.log_a, task.log_p, base_fraction=0.5))
    exact = enumeration.exact_gradient(
        task.log_prob_fn, params, task.space, task.log_p, divergence=divergence
    ).ravel()
    parts = baselines.make_parts(world, divergence)
    q, shape = jnp.exp(world.log_q), world.same.shape[1::-1]
    for seed in range(3):
        known = of_prefixes(world, jax.random.key(seed))
        found = q @ baselines.prefix_gradients(world, parts, known)
        np.testing.assert_allclose(found, exact, atol=1e-10)
    seen = jax.random.normal(jax.random.key(0), shape)
    assert np.abs(q @ baselines.prefix_gradients(world, parts, seen) - exact).max() > 1e-2


def test_the_baselines_of_prefixes_are_a_mean_and_the_least(halfway):
    """The mean after one prefix, by hand; and no step from the other lowers the variance."""
    parts = baselines.make_parts(halfway, DIVERGENCES[0])
    tokens = np.asarray(tabular_task(0).space.tokens)
    after = (tokens[:, 0] == 2) & (tokens[:, 1] == 3)
    pi, slopes = np.exp(halfway.log_pi), -np.exp(halfway.log_p - halfway.log_pi)
    mean = baselines.expected_by_prefix(halfway, parts)
    np.testing.assert_allclose(mean[after, 2], pi[after] @ slopes[after] / pi[after].sum())

    best = baselines.best_by_prefix(halfway, parts)
    least = baselines.of_prefix(halfway, parts, best).variance
    assert least < baselines.of_prefix(halfway, parts, mean).variance
    for seed in range(5):
        step = 1e-2 * of_prefixes(halfway, jax.random.key(seed))
        assert least < baselines.of_prefix(halfway, parts, best + step).variance


def test_the_page_has_what_is_summed(halfway):
    """What is drawn takes half a minute, and is not repeated here."""
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    found = {row[0]: row[3] for row in table[2:] if len(row) == len(table[0])}
    parts = baselines.make_parts(halfway, DIVERGENCES[0])
    summed = baselines.summed(halfway, parts)
    assert table[0][3] == "forward_kl, π half the way"
    assert {name: found[name] for name in summed} == {
        name: baselines.cell(noise) for name, noise in summed.items()
    }


def test_the_words_are_those_of_the_command(monkeypatch):
    """Around the tables that the page has."""
    text = PAGE.read_text(encoding="utf-8")
    first, second, *others, last = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    made = {
        "table_of_baselines": first.strip(),
        "table_of_penalties": second.strip(),
        "tables_of_alpha": tuple(x.strip() for x in others),
        "table_of_beta": last.strip(),
    }
    for name, tables in made.items():
        monkeypatch.setattr(gradient_noise, name, lambda seed, tables=tables: tables)
    assert gradient_noise.page(gradient_noise.Config()) == text
