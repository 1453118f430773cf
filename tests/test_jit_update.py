"""The compiled update: what it closes over, what it is compiled for, and its donated state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import sharding
from fjax.sharding import jit_update

MATRIX = jnp.arange(12.0).reshape(3, 4)


def update(state, rows):
    """Closes over the matrix twice, the second time in a program of its own."""
    inner = jax.jit(lambda x: x @ MATRIX)
    return {"w": state["w"] + rows @ MATRIX}, inner(rows).sum()


@pytest.fixture
def called(monkeypatch):
    """What the programs of `jit_update` are called with."""
    calls, jit_for = [], sharding.jit_for

    class Program:
        def __init__(self, *args):
            self.program = jit_for(*args)
            self.trace = self.program.trace

        def __call__(self, *args):
            calls.append(args)
            return self.program(*args)

    monkeypatch.setattr(sharding, "jit_for", Program)
    return calls


@pytest.mark.parametrize(("large", "arguments"), [(48, 3), (49, 2)])
def test_large_arrays_that_an_update_closes_over_are_arguments(
    large, arguments, called, monkeypatch
):
    monkeypatch.setattr(sharding, "LARGE", large)
    compiled = jit_update(update)
    for n in (2, 5, 2):  # another shape is another program
        state, rows = {"w": jnp.ones((n, 4))}, jnp.full((n, 3), float(n))
        expected = jax.tree.map(np.asarray, update(state, rows))
        found = compiled(state, rows)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert state["w"].is_deleted()
        assert len(called[-1]) == arguments
    if arguments == 3:
        _, (matrix,), _ = called[-1]
        assert matrix is MATRIX
