"""What the tests of the mathematics share: one table of divergences, and a world small enough to sum over.

A new divergence is tested by one more line of ``CASES``: its textbook generator and what theory says. The
contracts in test_divergences, test_surrogates and test_estimators run over every line.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from fjax import divergences, enumeration


class Case(NamedTuple):
    divergence: divergences.FDivergence
    f: Callable  # as in a textbook, of t, without care for rounding
    at_zero: float  # f(0)
    slope_at_infinity: float  # f'(∞)
    curvature: float | None  # f''(1)
    adjoint: Callable  # t f(1/t), textbook as well: the divergence with π and p exchanged

    @property
    def allows_zeros(self) -> bool:
        """Finite where p = 0 and π > 0."""
        return bool(np.isfinite(self.slope_at_infinity))


def _js(t):
    return 0.5 * (t * np.log(t) - (t + 1) * np.log((t + 1) / 2))


def _tv(t):
    return 0.5 * abs(t - 1)


INF, LOG_2 = np.inf, np.log(2)
CASES = [
    Case(divergences.forward_kl(), lambda t: -np.log(t), INF, 0.0, 1.0, lambda t: t * np.log(t)),
    Case(divergences.reverse_kl(), lambda t: t * np.log(t), 0.0, INF, 1.0, lambda t: -np.log(t)),
    Case(divergences.total_variation(), _tv, 0.5, 0.5, None, _tv),
    Case(divergences.jensen_shannon(), _js, LOG_2 / 2, LOG_2 / 2, 0.25, _js),
]


def name(case: Case) -> str:
    return case.divergence.name


each = pytest.mark.parametrize("case", CASES, ids=name)

TARGETS = [(case, hard) for case in CASES for hard in (False, True) if case.allows_zeros or not hard]
each_target = pytest.mark.parametrize(
    ("case", "hard"), TARGETS, ids=[f"{name(case)}-{'hard' if hard else 'soft'}" for case, hard in TARGETS]
)


@contextmanager
def refused(message: str):
    """Expects the ValueError that a user gets, without the type checks of the tests, which come first."""
    checked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", checked)


class World(NamedTuple):
    """A policy over 7 sequences, two targets and another distribution to sample from."""

    log_prob_fn: Callable
    params: jax.Array
    space: enumeration.Space
    log_p: jax.Array  # every sequence is possible
    log_p_hard: jax.Array  # three of seven are
    log_q: jax.Array

    @property
    def log_pi(self):
        return self.log_prob_fn(self.params, *self.space)

    def target(self, *, hard: bool):
        return self.log_p_hard if hard else self.log_p


def world(seed: int = 0) -> World:
    """In the precision that is set: within the fixture ``x64``, float64."""
    rng = np.random.default_rng(seed)
    space = enumeration.sequences(3, 2, eos_id=0)
    log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 2)

    def log_probs(allowed=True):
        logits = np.where(allowed, rng.normal(size=7), -np.inf)
        return jnp.asarray(logits - np.log(np.exp(logits).sum()))

    contains_2 = np.asarray(space.tokens == 2).any(axis=1)
    contains_2[-1] = False
    return World(
        log_prob_fn,
        jnp.asarray(rng.normal(size=(prefixes, 3))),
        space,
        log_probs(),
        log_probs(contains_2),
        log_probs(),
    )
