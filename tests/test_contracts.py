"""The public contract over fjax's own divergences, and over broken ones, which it must name."""

import jax
import jax.numpy as jnp
import pytest

from fjax.divergences import FDivergence, forward_kl, from_generator, jensen_shannon, pearson_chi2
from fjax.testing import check_divergence
from tests.cases import CASES, each, refused


@each
def test_every_divergence_keeps_the_contract(case):
    check_divergence(case.divergence)


def test_a_divergence_from_a_plain_function_keeps_it_too():
    check_divergence(from_generator(lambda t: (t - 1) ** 2 / (t + 1), name="triangular"))
    check_divergence(from_generator(lambda t: -jnp.log(t)))


@pytest.mark.parametrize(
    ("f", "expected"),
    [(lambda t: t * jnp.log(t), jnp.inf), (lambda t: -jnp.log(t), 0.0), (lambda t: (jnp.sqrt(t) - 1) ** 2, 1.0)],
)
def test_the_slope_at_infinity_is_found(f, expected):
    assert float(from_generator(f).slope_at_infinity) == pytest.approx(expected)


def test_what_is_wrong_with_a_plain_function_is_said():
    with refused(r"f\(1\) must be 0.* it is 1"):
        from_generator(lambda t: t**2)
    with refused("f is not convex: f' falls from"):
        from_generator(lambda t: jnp.log(t))
    with refused("not finite at t = 2"):
        from_generator(lambda t: jnp.where(t > 2, jnp.inf, (t - 1) ** 2))
    with refused("maps one number to one number"):
        from_generator(lambda t: (t - 1) ** 2 * jnp.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": lambda log_t: -log_t + 0.1}, r"f\(1\) = 0"),
        ({"derivative": lambda log_t: -2 * jnp.exp(-log_t)}, "d generator/d log_t"),
        ({"integrand": lambda log_t: -log_t}, "integrand"),
        ({"inverse_derivative": lambda v: -1 / v + 1}, r"\(f'\)\^\{-1\}"),
        ({"conjugate": lambda v: v}, r"f\*\(f'\(t\)\)"),
        ({"intercept": lambda log_t: -log_t}, "intercept"),
        ({"generator": lambda log_t: -log_t + 0 * jnp.exp(log_t)}, "In float32 .*generator is NaN"),
    ],
)
def test_a_broken_divergence_is_named(change, message):
    with pytest.raises(AssertionError, match=message):
        check_divergence(forward_kl()._replace(**change))


def test_a_concave_function_breaks_the_contract():
    concave = FDivergence("concave", jnp.expm1, lambda s: 1 / (1 + jnp.exp(s)), lambda s: -jnp.expm1(-s))
    with pytest.raises(AssertionError):
        check_divergence(concave)


def test_the_table_has_every_named_divergence():
    """A new f is tested by one line of `tests.cases.CASES`; this fails while that line is missing."""
    from fjax import divergences

    other = {"FDivergence", "Elementwise", "dual", "exact_divergence", "from_generator", "mixture"}
    named = {name for name in divergences.__all__ if name not in other and not name.startswith("alpha_from")}
    tested = {case.divergence.name for case in CASES}
    for name in named:
        assert any(entry.startswith(name.removesuffix("_divergence")) for entry in tested), name


def test_they_are_pytrees_of_functions_and_hashable():
    """Static arguments of jit, as in ``jax.jit(loss, static_argnames="divergence")``."""
    f = jensen_shannon()
    assert hash(f) == hash(f)
    traced = jax.jit(lambda x, divergence: divergence.derivative(x), static_argnames="divergence")
    assert float(traced(jnp.zeros(()), divergence=pearson_chi2())) == 0
