"""The public contract over fjax's own divergences, and over broken ones, which it must name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax.divergences import (
    FDivergence,
    alpha_divergence,
    dual,
    exact_divergence,
    forward_kl,
    from_generator,
    generalized_jensen_shannon,
    jensen_shannon,
    mixture,
    pearson_chi2,
    reverse_kl,
)
from fjax.estimators import estimate_divergence, estimate_divergence_from_score
from fjax.surrogates import pseudo_rewards, score_weights, surrogate_loss
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
    [
        (lambda t: t * jnp.log(t), jnp.inf),
        (lambda t: -jnp.log(t), 0.0),
        (lambda t: (jnp.sqrt(t) - 1) ** 2, 1.0),
    ],
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
    concave = FDivergence(
        "concave", jnp.expm1, lambda s: 1 / (1 + jnp.exp(s)), lambda s: -jnp.expm1(-s)
    )
    with pytest.raises(AssertionError):
        check_divergence(concave)


def test_the_table_has_every_named_divergence():
    """A new f is tested by one line of `tests.cases.CASES`; this fails while that line is
    missing."""
    from fjax import divergences

    other = {"FDivergence", "Elementwise", "dual", "exact_divergence", "from_generator", "mixture"}
    other |= {"by_name", "names"}
    named = {
        name
        for name in divergences.__all__
        if name not in other and not name.startswith("alpha_from")
    }
    tested = {case.divergence.name for case in CASES}
    for name in named:
        assert any(entry.startswith(name.removesuffix("_divergence")) for entry in tested), name


def test_they_are_pytrees_of_functions_and_hashable():
    """Static arguments of jit, as in ``jax.jit(loss, static_argnames="divergence")``."""
    f = jensen_shannon()
    assert hash(f) == hash(f)
    traced = jax.jit(lambda x, divergence: divergence.derivative(x), static_argnames="divergence")
    assert float(traced(jnp.zeros(()), divergence=pearson_chi2())) == 0


def plain(t):
    return (t - 1) ** 2


@pytest.mark.parametrize("make", [
    jensen_shannon, pearson_chi2, lambda: generalized_jensen_shannon(0.3), lambda: alpha_divergence(0.5),
    lambda: alpha_divergence(alpha=jnp.array(0.5)), lambda: dual(alpha_divergence(0.25)),
    lambda: mixture([forward_kl(), jensen_shannon()], [1, 2.0], name="both"), lambda: from_generator(plain, name="squares"),
])  # fmt: skip
def test_made_equally_they_are_equal_and_traced_once(make):
    """Regression: `jensen_shannon() != jensen_shannon()`, so that each call of a jitted function
    traced anew."""
    traces = []

    def derivative(x, divergence):
        traces.append(x)
        return divergence.derivative(x)

    compiled = jax.jit(derivative, static_argnames="divergence")
    for _ in range(3):
        compiled(jnp.zeros(()), divergence=make())
    assert len(traces) == 1
    assert make() == make()
    assert alpha_divergence(0.5) != alpha_divergence(0.25)


@pytest.mark.parametrize(
    "make", [jensen_shannon, lambda: alpha_divergence(0.5), lambda: dual(alpha_divergence(0.25))]
)
def test_their_functions_are_traced_once_for_a_shape(make):
    """Whatever they are part of: losses, updates and evaluations use each several times."""
    f = make()
    for function in (f.generator, f.derivative, f.integrand):
        calls = [jax.make_jaxpr(lambda x, f=function: f(2 * x))(jnp.zeros(3)) for _ in range(2)]
        first, second = (call.eqns[-1].params["jaxpr"] for call in calls)
        assert first is second


TRACED = {
    "alpha_divergence": (alpha_divergence, (-0.5, 0.0, 0.3, 0.5, 1.0, 1.25, 2.5)),
    "generalized_jensen_shannon": (generalized_jensen_shannon, (0.1, 0.5, 0.8)),
    "mixture": (lambda w: mixture([forward_kl(), reverse_kl()], [w, 1.0]), (0.0, 0.3)),
}


@pytest.mark.parametrize("kind", TRACED)
def test_an_annealed_option_gives_the_numbers_of_a_known_one(kind):
    """Values and slopes of every function, at both infinities too, by `jax.jit` and `jax.vmap` over
    the option."""
    make, options = TRACED[kind]
    log_t = jnp.array(
        [
            -jnp.inf,
            -1e4,
            -100.0,
            -30.0,
            -3.0,
            -0.9,
            -0.1,
            0.0,
            0.1,
            0.9,
            3.0,
            30.0,
            100.0,
            1e4,
            jnp.inf,
        ]
    )

    def numbers(divergence):
        functions = [f for f in divergence[1:] if f is not None]
        return jnp.stack([jnp.stack([f(log_t), jax.vmap(jax.grad(f))(log_t)]) for f in functions])

    known = jnp.stack([numbers(make(option)) for option in options])
    traced = jax.jit(lambda option: numbers(make(option)))
    np.testing.assert_allclose(
        jnp.stack([traced(option) for option in options]), known, rtol=3e-5, atol=1e-6
    )
    at_once = jax.jit(jax.vmap(lambda option: numbers(make(option))))(jnp.array(options))
    np.testing.assert_allclose(at_once, known, rtol=3e-5, atol=1e-6)


def test_a_clip_may_be_annealed():
    log_pi, log_p = jnp.array([[-1.0, -9.0], [-3.0, -1.0]])
    weights = jax.jit(
        lambda most: score_weights(log_pi, log_p, divergence=forward_kl(), clip=(-most, most))
    )
    for most in (0.1, 5.0):
        expected = score_weights(log_pi, log_p, divergence=forward_kl(), clip=(-most, most))
        np.testing.assert_array_equal(weights(most), expected)


@pytest.mark.parametrize("given", ["int8", "bool", "float16", "bfloat16"])
def test_their_functions_compute_in_float32(given):
    log_t = jnp.array([0, 1, 1]).astype(given)
    for case in CASES:
        for function in [f for f in case.divergence[1:] if f is not None]:
            value = function(log_t)
            assert value.dtype == jnp.float32
            np.testing.assert_array_equal(value, function(jnp.array([0.0, 1.0, 1.0])))


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("call", [
    lambda f: score_weights(jnp.zeros(2), jnp.zeros(2), divergence=f),
    lambda f: pseudo_rewards(jnp.zeros(2), jnp.zeros(2), divergence=f),
    lambda f: surrogate_loss(jnp.zeros(2), jnp.zeros(2), divergence=f),
    lambda f: estimate_divergence(jnp.zeros(2), jnp.zeros(2), divergence=f),
    lambda f: estimate_divergence_from_score(jnp.zeros(2), jnp.zeros(2), divergence=f),
    lambda f: exact_divergence(jnp.zeros(2), jnp.zeros(2), divergence=f),
    dual, lambda f: mixture([f], [1.0]), check_divergence,
])  # fmt: skip
def test_a_divergence_that_was_not_called_is_said_to_be_none(call):
    with pytest.raises(
        ValueError,
        match=r"jensen_shannon is a function that makes one: divergence=jensen_shannon\(\)",
    ):
        call(jensen_shannon)
    with pytest.raises(ValueError, match="got 'jensen_shannon'"):
        call("jensen_shannon")
