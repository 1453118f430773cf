"""The table of the gradient's noise: its sums against batches that are drawn, and its page."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tools import gradient_noise
from experiments.tools.gradient_noise import BATCHES, DIVERGENCES, SAMPLES, STRATA

PAGE = Path(__file__).parents[2] / "docs" / "noise.md"
SHARE = np.mean(STRATA)


@pytest.fixture
def halfway(x64):
    return gradient_noise.make_world(0, 0.5)


def test_sums_are_what_batches_measure(halfway):
    """The variance of a number for B with fixed numbers of both parts, over 10,000 batches: within
    five standard errors, √(2/10,000) each if the gradient had one entry."""
    parts = gradient_noise.make_parts(halfway, DIVERGENCES[1])
    log_drawn = jnp.where(STRATA[:, None], halfway.log_a[None], halfway.log_pi[None])
    g = parts.gradients - 0.3 * parts.pulls
    rows = jax.random.categorical(jax.random.key(1), log_drawn, shape=(BATCHES, SAMPLES))
    found = sum(np.asarray(g)[column] for column in np.asarray(rows).T) / SAMPLES
    square = float(jnp.sum(parts.exact**2))
    measured = SAMPLES * found.var(axis=0, ddof=1).sum() / square
    summed = gradient_noise.of_constant(halfway, parts, 0.3).variance
    assert measured == pytest.approx(summed, rel=5 * np.sqrt(2 / BATCHES))


def test_both_parts_together_have_the_exact_gradient_and_the_best_baseline_is(halfway):
    parts = gradient_noise.make_parts(halfway, DIVERGENCES[0])
    of_pi, of_a = (np.exp(x) @ parts.gradients for x in (halfway.log_pi, halfway.log_a))
    np.testing.assert_allclose((1 - SHARE) * of_pi + SHARE * of_a, parts.exact, atol=1e-12)
    variances = [
        gradient_noise.of_constant(halfway, parts, parts.best + step).variance
        for step in (-0.01, 0.0, 0.01)
    ]
    assert variances[1] < min(variances[0], variances[2])
    assert gradient_noise.of_control_variate(halfway, parts, parts.best).variance <= variances[1]


def test_the_page_has_what_is_summed(halfway):
    """What is drawn takes half a minute, and is not repeated here."""
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    found = {row[0]: row[3] for row in table[2:]}
    parts = gradient_noise.make_parts(halfway, DIVERGENCES[0])
    summed = gradient_noise.summed(halfway, parts)
    assert table[0][3] == "forward_kl, π half the way"
    assert {name: found[name] for name in summed} == {
        name: gradient_noise.cell(noise) for name, noise in summed.items()
    }
