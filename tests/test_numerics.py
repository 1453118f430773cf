"""Products in which 0 wins over inf, and means over masked entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import _numerics

INF = jnp.inf


def test_times_exp_is_zero_at_minus_infinity_with_a_finite_gradient():
    x, s = jnp.array([INF, -INF, 3.0, 2.0]), jnp.array([-INF, -INF, -INF, 0.0])
    assert _numerics.times_exp(x, s).tolist() == [0, 0, 0, 2]
    by_x, by_s = jax.grad(lambda x, s: _numerics.times_exp(x, s).sum(), argnums=(0, 1))(x, s)
    assert by_x.tolist() == [0, 0, 0, 1]
    assert by_s.tolist() == [0, 0, 0, 2]


def test_weighted_products_leave_float32_only_where_the_result_does():
    x = jnp.array([INF, 0.0, -0.0, 1e30, -1e-30, -3.0, -INF])
    log_weight = jnp.array([-INF, INF, 200.0, -100.0, 100.0, 0.0, 0.0])
    expected = [0, 0, 0, 1e30 * np.exp(-100), -1e-30 * np.exp(100), -3, -np.inf]
    np.testing.assert_allclose(_numerics.weighted(x, log_weight), expected, rtol=2e-5)


def test_mean_and_error_skip_what_is_not_counted(x64):
    x = jnp.array([1.0, 2.0, 6.0, jnp.nan, INF])
    mean, error = _numerics.mean_and_error(x, where=jnp.arange(5) < 3)
    assert float(mean) == pytest.approx(3)
    assert float(error) == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))


def test_an_infinite_mean_has_an_infinite_error():
    mean, error = _numerics.mean_and_error(jnp.array([1.0, -INF]))
    assert (float(mean), float(error)) == (-np.inf, np.inf)


def test_ess_does_not_depend_on_scale():
    log_weights = jnp.log(jnp.array([1.0, 2.0, 3.0]))
    expected = 36 / 14
    for shift in (0.0, 1e4, -1e4):
        assert float(_numerics.ess_of(log_weights + shift)) == pytest.approx(expected, rel=2e-3)
    assert float(_numerics.ess_of(jnp.full(3, -1e4))) == 3
    assert float(_numerics.ess_of(jnp.full(3, -INF))) == 0


def test_what_differs_by_rounding_only_deviates_by_nothing():
    """Regression: the mean of sixteen times 100.1 is another number in float32, and 0.13 was left
    after division by spread."""
    equal = jnp.full(16, 100.1)
    for x in (equal, jnp.nextafter(equal, INF).at[::2].set(100.1), -equal, equal * 1e36, equal * 0):
        assert not _numerics.centred(x).any()
    np.testing.assert_allclose(
        _numerics.centred(equal + jnp.arange(16) / 1024), (jnp.arange(16) - 7.5) / 1024, atol=8e-6
    )


def test_centring_skips_what_is_not_counted_and_shows_what_is_not_finite():
    x, where = jnp.array([1.0, 2.0, 6.0, jnp.nan, INF]), jnp.arange(5) < 3
    assert _numerics.centred(x, where).tolist() == [-2, -1, 3, 0, 0]
    assert not np.isfinite(_numerics.centred(x[:3].at[0].set(INF))).all()
    assert np.isnan(_numerics.centred(x[:4])).all()
