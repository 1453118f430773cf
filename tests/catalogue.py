"""Random distributions for the catalogue of laws, and every divergence on a whole batch of them at
once."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from fjax.divergences import FDivergence, exact_divergence

SIZE, BATCH = 8, 48


def float64(test):
    """Runs a test in double precision; a fixture would be shared by all examples of hypothesis."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return test(*args, **kwargs)

    return wrapped


def examples(n: int = 8):
    """Few examples, for each is a batch."""
    return hypothesis.settings(max_examples=n)


seeds = st.integers(0, 2**32 - 1)
"""Of a batch: sizes 2 to 8, Dirichlet of concentration 10^U(-2, 2), a fifth with zeros, a tenth
nearly equal."""


def distributions(seed: int, count: int, *, zeros: bool = True) -> list[np.ndarray]:
    """``count`` arrays ``[BATCH, SIZE]`` of probabilities on common spaces; what a space lacks has
    no mass in any."""
    rng = np.random.default_rng(seed)
    results = np.zeros((count, BATCH, SIZE))
    for row in range(BATCH):
        size = rng.integers(2, SIZE + 1)
        drawn = rng.dirichlet(np.full(size, 10.0 ** rng.uniform(-2, 2)), count) + 1e-300
        kind = rng.uniform()
        if zeros and kind < 0.2:
            kept = rng.uniform(size=(count, size)) < 0.6
            kept[np.arange(count), rng.integers(size, size=count)] = True
            drawn = np.where(kept, drawn, 0)
        elif kind > 0.9:
            drawn = drawn[:1] * (1 + 1e-4 * rng.uniform(-1, 1, size=drawn.shape))
        results[:, row, :size] = drawn / drawn.sum(axis=1, keepdims=True)
    return list(results)


@functools.cache
def _batched(divergence: FDivergence):
    return jax.jit(jax.vmap(functools.partial(exact_divergence, divergence=divergence)))


def of(divergence: FDivergence, pi: np.ndarray, p: np.ndarray) -> np.ndarray:
    """D_f(π‖p) of each pair of rows."""
    with np.errstate(divide="ignore"):
        return np.asarray(_batched(divergence)(jnp.log(pi), jnp.log(p)))


def at_most(smaller: np.ndarray, larger: np.ndarray, slack: float = 1e-9) -> None:
    """Asserts ≤ up to rounding; two infinities are fine."""
    larger = np.broadcast_to(larger, np.shape(smaller))
    with np.errstate(invalid="ignore"):
        broken = ~((smaller <= larger) | (smaller - larger <= slack * np.maximum(1, abs(larger))))
    assert not broken.any(), (np.asarray(smaller)[broken][:3], larger[broken][:3])


def equal(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-9) -> None:
    """Asserts equality, relative where values are above 1."""
    at_most(a, b, tolerance)
    at_most(b, a, tolerance)


def random_f(index: int, cases: list):
    """One of the cases, for laws that take two."""
    return cases[index % len(cases)].divergence
