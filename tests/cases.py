"""What the tests of the mathematics share: one table of divergences, and a world small enough to
sum over.

A new divergence is tested by one more line of ``CASES``: its textbook generator and what theory
says. The contracts in test_divergences, test_surrogates and test_estimators run over every line.
"""

import functools
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


def _skew(weight):
    def f(t):
        m = weight * t + 1 - weight
        return weight * t * np.log(t) - m * np.log(m)

    return f


def _alpha(a):
    if a == 0:
        return lambda t: t - 1 - np.log(t)
    if a == 1:
        return lambda t: t * np.log(t) - t + 1
    return lambda t: (t**a - 1 - a * (t - 1)) / (a * (a - 1))


def _alpha_case(a):
    at_zero, slope = (1 / a if a > 0 else INF), (1 / (1 - a) if a < 1 else INF)
    return Case(divergences.alpha_divergence(a), _alpha(a), at_zero, slope, 1.0, _alpha(1 - a))


def _skew_case(w):
    at_zero, slope = -(1 - w) * np.log(1 - w), -w * np.log(w)
    return Case(
        divergences.generalized_jensen_shannon(w),
        _skew(w),
        at_zero,
        slope,
        w * (1 - w),
        _skew(1 - w),
    )


def _pearson(t):
    return (t - 1) ** 2


def _neyman(t):
    return (t - 1) ** 2 / t


def _hellinger(t):
    return (np.sqrt(t) - 1) ** 2


def _triangular(t):
    return (t - 1) ** 2 / (t + 1)


def _jeffreys(t):
    return (t - 1) * np.log(t)


def _chi2_mix(t):
    return 0.5 * (t - 1) ** 2 + t * np.log(t)


def _chi2_mix_adjoint(t):
    return 0.5 * (t - 1) ** 2 / t - np.log(t)


def _half_and_half(t):
    return 0.5 * _hellinger(t) - 0.25 * np.log(t)


INF, LOG_2 = np.inf, np.log(2)
CASES = [
    Case(divergences.forward_kl(), lambda t: -np.log(t), INF, 0.0, 1.0, lambda t: t * np.log(t)),
    Case(divergences.reverse_kl(), lambda t: t * np.log(t), 0.0, INF, 1.0, lambda t: -np.log(t)),
    Case(divergences.total_variation(), _tv, 0.5, 0.5, None, _tv),
    Case(divergences.jensen_shannon(), _js, LOG_2 / 2, LOG_2 / 2, 0.25, _js),
    *(_skew_case(weight) for weight in (0.1, 0.8)),
    Case(divergences.jeffreys(), _jeffreys, INF, INF, 2.0, _jeffreys),
    Case(divergences.pearson_chi2(), _pearson, 1.0, INF, 2.0, _neyman),
    Case(divergences.neyman_chi2(), _neyman, INF, 1.0, 2.0, _pearson),
    Case(divergences.squared_hellinger(), _hellinger, 1.0, 1.0, 0.5, _hellinger),
    Case(divergences.triangular_discrimination(), _triangular, 1.0, 1.0, 1.0, _triangular),
    Case(divergences.chi2_mix(), _chi2_mix, 0.5, INF, 2.0, _chi2_mix_adjoint),
    *(_alpha_case(alpha) for alpha in (-0.5, 0.0, 0.3, 0.75, 1.0, 1.25, 2.5)),
    Case(divergences.dual(divergences.chi2_mix()), _chi2_mix_adjoint, INF, 0.5, 2.0, _chi2_mix),
    Case(
        divergences.mixture(
            [divergences.squared_hellinger(), divergences.forward_kl(), divergences.reverse_kl()],
            [0.5, 0.25, 0.0],
            name="half_and_half",
        ),
        _half_and_half,
        INF,
        0.5,
        0.5,
        lambda t: t * _half_and_half(1 / t),
    ),
]


def name(case: Case) -> str:
    return case.divergence.name


def each_of(cases: list[Case]):
    """One test for each of the cases that a law is about."""
    return pytest.mark.parametrize("case", cases, ids=name)


each = each_of(CASES)
# total variation has a kink at t = 1
smooth = each_of([case for case in CASES if case.curvature is not None])
with_conjugate = each_of([case for case in CASES if case.divergence.conjugate is not None])
with_inverse = each_of([case for case in CASES if case.divergence.inverse_derivative is not None])

TARGETS = [
    (case, hard) for case in CASES for hard in (False, True) if case.allows_zeros or not hard
]
each_target = pytest.mark.parametrize(
    ("case", "hard"),
    TARGETS,
    ids=[f"{name(case)}-{'hard' if hard else 'soft'}" for case, hard in TARGETS],
)

# For what is statistical, and slow: the four of the f-DPG paper. That a formula holds for every f
# is shown exactly, elsewhere.
each_target_of_the_paper = pytest.mark.parametrize(
    ("case", "hard"),
    [(case, hard) for case, hard in TARGETS if case in CASES[:4]],
    ids=[
        f"{name(case)}-{'hard' if hard else 'soft'}" for case, hard in TARGETS if case in CASES[:4]
    ],
)


@contextmanager
def refused(message: str):
    """Expects the ValueError that a user gets, without the type checks of the tests, which come
    first."""
    checked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message) as refusal:
            yield refusal
    finally:
        jaxtyping.config.update("jaxtyping_disable", checked)


SPACE = enumeration.sequences(3, 2, eos_id=0)
LOG_PROB_FN, PREFIXES = enumeration.tabular_log_prob_fn(3, 2)


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

    @property
    def scores(self):
        """∇log π of every sequence."""
        return _scores(self.params)

    def target(self, *, hard: bool):
        return self.log_p_hard if hard else self.log_p

    def exact_gradient(self, log_p, divergence: divergences.FDivergence):
        """As `enumeration.exact_gradient`; an f is compiled once for all that compare with it."""
        return _exact_gradient(self.params, log_p, divergence)


@jax.jit
def _scores(params):
    return jax.jacobian(lambda params: LOG_PROB_FN(params, *SPACE))(params)


@functools.partial(jax.jit, static_argnums=2)
def _exact_gradient(params, log_p, divergence):
    return enumeration.exact_gradient(LOG_PROB_FN, params, SPACE, log_p, divergence=divergence)


def world(seed: int = 0) -> World:
    """In the precision that is set: within the fixture ``x64``, float64."""
    rng = np.random.default_rng(seed)

    def log_probs(allowed=True):
        logits = np.where(allowed, rng.normal(size=7), -np.inf)
        return jnp.asarray(logits - np.log(np.exp(logits).sum()))

    contains_2 = (np.asarray(SPACE.tokens) == 2).any(axis=1)
    contains_2[-1] = False
    return World(
        LOG_PROB_FN,
        jnp.asarray(rng.normal(size=(PREFIXES, 3))),
        SPACE,
        log_probs(),
        log_probs(contains_2),
        log_probs(),
    )
