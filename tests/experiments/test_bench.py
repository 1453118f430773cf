"""The benchmark times the same thing in every row: its alternatives draw from one distribution and
keep the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tools import bench
from fjax.sampling import categorical, top_p

from .commands import TINY, run


@pytest.mark.parametrize("way", [categorical.draw, bench.gumbel, bench.running_sum])
def test_all_ways_of_drawing_are_of_one_distribution(way):
    logits = jnp.array([0.0, 1.0, -1.0, 2.0])
    tokens, log_probs = jax.jit(jax.vmap(way, (0, None)))(
        jax.random.split(jax.random.key(0), 4000), logits
    )
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits)[tokens], atol=1e-5)
    expected = jax.nn.softmax(logits)
    error = np.sqrt(expected * (1 - expected) / 4000)
    assert (abs(np.bincount(tokens, minlength=4) / 4000 - expected) < 4 * error).all()


def test_both_ways_of_top_p_keep_the_same_tokens():
    logits = jax.random.normal(jax.random.key(0), (8, 50))
    np.testing.assert_array_equal(bench.by_sort(logits, 0.9), top_p(0.9)(logits))


@pytest.mark.command
def test_the_command(monkeypatch, capsys):
    small = (
        "--rows",
        2,
        "--vocabulary",
        50,
        "--rounds",
        1,
        "--model",
        TINY,
        "--samples",
        4,
        "--max-new-tokens",
        3,
    )
    assert run(monkeypatch, bench.main, *small) == 0
    printed = capsys.readouterr().out
    for row in ("blocks (fjax)", "top-p 0.9 by a sort", "whole step", "update"):
        assert row in printed
    assert run(monkeypatch, bench.main, "--rounds", 0) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err
