"""What stands at every door: shapes, dtypes, masks; as a user meets it, without the nets of this
suite."""

import jax
import jax.numpy as jnp
import pytest

from fjax import _checks

pytestmark = pytest.mark.usefixtures("bare")


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((), ()), ((3,), (3, 1)), ((3,), ())])
def test_one_number_a_sample_or_an_error_that_names_vmap(shapes):
    with pytest.raises(
        ValueError, match=r"log_pi and log_p must be one number a sample.*jax\.vmap"
    ):
        _checks.one_axis(log_pi=jnp.zeros(shapes[0]), log_p=jnp.zeros(shapes[1]))


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((3,), (1,))])
def test_equal_lengths(shapes):
    with pytest.raises(ValueError, match=r"must have one shape; got \[3\] and"):
        _checks.one_axis(log_pi=jnp.zeros(shapes[0]), log_p=jnp.zeros(shapes[1]))


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        ("bool", "float32"),
        ("int8", "float32"),
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
    ],
)
def test_everything_but_float64_is_computed_in_float32(given, computed):
    x, none, y = _checks.one_axis(x=jnp.ones(2, given), none=None, y=jnp.ones(2, jnp.float16))
    assert (x.dtype, none, y.dtype) == (computed, None, computed)


def test_the_widest_dtype_wins_and_float64_stays(x64):
    x, y = _checks.same_shape(x=jnp.ones((2, 2), jnp.float64), y=jnp.ones((2, 2), jnp.int64))
    assert x.dtype == y.dtype == jnp.float64
    assert _checks.float_dtype(jnp.ones(1, jnp.int64)) == jnp.float32


@pytest.mark.parametrize("transform", [jax.jit, lambda f: jax.vmap(f, in_axes=(0, None))])
def test_the_shape_that_a_function_really_works_on_is_what_counts(transform):
    summed = transform(lambda x, y: sum(part.sum() for part in _checks.one_axis(x=x, y=y)))
    x = jnp.ones((2, 3)) if transform is not jax.jit else jnp.ones(3)
    assert (summed(x, jnp.ones(3)) == 6).all()


def test_masks_of_integers_count_and_others_are_refused():
    assert _checks.as_mask(jnp.array([2, 0, 1]), jnp.zeros(3)).tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"must be booleans.*got float32"):
        _checks.as_mask(jnp.ones(3), jnp.zeros(3))
    with pytest.raises(
        ValueError, match=r"must have the shape of what it masks, \[3\]; got \[3, 1\]"
    ):
        _checks.as_mask(jnp.ones((3, 1), bool), jnp.zeros(3))


@pytest.mark.parametrize("value", [0.0, -1, float("nan"), float("inf"), jnp.zeros(())])
def test_an_option_is_positive_and_finite_or_an_error(value):
    with pytest.raises(ValueError, match="beta must be positive"):
        _checks.positive(beta=value)


def test_of_a_traced_option_only_the_shape_is_checked():
    def scaled(beta):
        _checks.positive(beta=beta)
        return 2 * beta

    assert float(jax.jit(scaled)(0.5)) == 1
    assert float(jax.grad(scaled)(0.5)) == 2
    with pytest.raises(ValueError, match=r"beta must be one number, got shape \[3\].*jax\.vmap"):
        jax.jit(scaled)(jnp.ones(3))
