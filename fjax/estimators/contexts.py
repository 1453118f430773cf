"""What is reported of an evaluation, over one context or several.

On the host, in float64, as plain numbers.

Of one context the samples are independent, and errors come from their spread. Of several the
contexts are: a figure is the mean over contexts of each one's own, and its error comes from the
spread between them, which holds whatever went into each.
"""

import math
from typing import Any

import jax
import numpy as np

from fjax._checks import is_concrete
from fjax.types import Array, Bool, Float, Int

from .means import Estimate

_Values = np.ndarray | Float[Array, "*c n"] | Int[Array, "*c n"] | Bool[Array, "*c n"]


def estimate_mean_over_contexts(values: _Values) -> Estimate:
    """The mean over contexts of E_c[values], each estimated by a plain mean.

    Args:
        values: one number a sample, ``[n]``, or of C contexts with n samples each, ``[C, n]``.

    Returns:
        Value and standard error as floats; the error is of the n samples, or of the C means, and
        NaN where there is one of them only. ``ess`` is the number of samples.

    Raises:
        ValueError: for another shape, no samples, or within `jax.jit`.

    >>> estimate_mean_over_contexts(np.array([[1.0, 3.0], [5.0, 7.0]]))
    Estimate(value=4.0, std_error=2.0, ess=4.0)

    Source: Owen 2013, section 2.3; cluster sampling, Cochran 1977, chapter 9.
    """
    (values,) = _on_host(values=values)
    return _mean(values)


def estimate_ratio(numerators: _Values, denominators: _Values) -> Estimate:
    """E[u]/E[v] as a ratio of means, such as nats a token or the share of one word among two.

    R = ū/v̄, whose standard error is that of the mean of u - R v, divided by v̄ (delta method). The
    bias is of order 1/n.

    Args:
        numerators: u, ``[n]``, or of several contexts ``[C, n]``.
        denominators: v, of the same samples.

    Returns:
        Floats; all NaN where every v is 0. ``ess`` is the number of samples.

    Raises:
        ValueError: if the shapes differ or are not these, without samples, or within `jax.jit`.

    >>> ratio = estimate_ratio(np.array([1.0, 0.0, 1.0]), np.array([1.0, 1.0, 2.0]))
    >>> ratio.value, round(ratio.std_error, 4)
    (0.5, 0.2165)

    Source: Owen 2013, section 2.7.
    """
    top, bottom = _on_host(numerators=numerators, denominators=denominators)
    if top.shape != bottom.shape:
        raise ValueError(
            f"numerators and denominators must be of the same samples; got {[*top.shape]} and "
            f"{[*bottom.shape]}."
        )
    if not bottom.any():
        return _estimate(math.nan, math.nan, math.nan)
    scale = float(bottom.mean(dtype=float))
    value = float(top.mean(dtype=float) / bottom.mean(dtype=float))
    return _estimate(value, _mean(top - value * bottom).std_error / abs(scale), float(top.size))


def estimate_win_rate(values: _Values, base_values: _Values) -> Estimate:
    """How often a sample beats one of the base model for the same context, a tie counting half.

    P(r(x) > r(y)) + ½ P(r(x) = r(y)) over all pairs, x of the policy and y of the base model, a
    U-statistic. The standard error of one context is √(s²/n + s'²/m), from the spread of each
    sample's own rate on either side; of several contexts it is from the spread between them.

    Args:
        values: r of the policy's samples, ``[n]``, or of several contexts ``[C, n]``.
        base_values: r of the base model's, ``[m]`` or ``[C, m]``.

    Returns:
        Floats; ``ess`` is n of one context, and the number of pairs of several.

    Raises:
        ValueError: for another number of contexts, other shapes, no samples, or within `jax.jit`.

    >>> estimate_win_rate(np.array([1.0, 2.0]), np.array([1.0, 0.0])).value
    0.875

    Source: Mann and Whitney 1947; Hoeffding 1948 for the error.
    """
    mine, other = _on_host(values=values, base_values=base_values)
    if len(mine) != len(other):
        raise ValueError(
            f"values and base_values must be of the same contexts; got {len(mine)} and "
            f"{len(other)}."
        )
    wins = (mine[:, :, None] > other[:, None]) + 0.5 * (mine[:, :, None] == other[:, None])
    if len(wins) > 1:
        return _mean(wins.reshape(len(wins), -1))
    error = math.hypot(_error_of_mean(wins[0].mean(axis=1)), _error_of_mean(wins[0].mean(axis=0)))
    return _estimate(float(wins.mean()), error, float(mine.size))


def over_contexts(estimates: Estimate) -> Estimate:
    """One figure from those of each context, ``[C]``: the mean over the known ones.

    Unknown are NaN and -inf, as a log Z without a sample that counts. One that is infinite makes
    the mean so.

    Args:
        estimates: value, std_error and ess of shape ``[C]``, as `jax.vmap` gives them.

    Returns:
        Floats. Of one context its estimate as it is. Of several, an error from the spread between
        them, and the sum of all ``ess``; NaN with an infinite error and no effective samples if
        none is known.

    Raises:
        ValueError: unless there is one number a context; or within `jax.jit`.

    >>> values, ess = np.array([1.0, 3.0, np.nan]), np.array([5.0, 5.0, 0.0])
    >>> over_contexts(Estimate(values, np.zeros(3), ess))
    Estimate(value=2.0, std_error=1.0, ess=10.0)

    Source: cluster sampling, Cochran 1977, chapter 9.
    """
    value, std_error, ess = (np.asarray(_known("estimates", x), float) for x in estimates)
    if value.ndim != 1 or not value.shape == std_error.shape == ess.shape or not value.size:
        raise ValueError(
            f"estimates must have one value, std_error and ess a context, each of shape [C]; got "
            f"{[*value.shape]}, {[*std_error.shape]} and {[*ess.shape]}."
        )
    if len(value) == 1:
        return _estimate(float(value[0]), float(std_error[0]), float(ess[0]))
    known = value[~np.isnan(value) & ~np.isneginf(value)]
    if len(known) == 0:
        return _estimate(math.nan, math.inf, 0.0)
    if np.isinf(known).any():
        return _estimate(math.inf, math.inf, float(ess.sum()))
    return _estimate(float(known.mean()), _error_of_mean(known), float(ess.sum()))


def _mean(values: np.ndarray) -> Estimate:
    units = np.asarray(values, float)
    units = units[0] if len(units) == 1 else units.mean(axis=1)
    return _estimate(float(units.mean()), _error_of_mean(units), float(values.size))


def _error_of_mean(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _estimate(value: Any, std_error: Any, ess: Any) -> Estimate:
    """Of floats, where a scalar array is as good."""
    return Estimate(value, std_error, ess)


def _on_host(**arrays: Any) -> list[np.ndarray]:
    """``[C, n]`` each, in the dtype that they have."""
    found = [np.asarray(_known(name, x)) for name, x in arrays.items()]
    for name, x in zip(arrays, found, strict=True):
        if x.ndim not in (1, 2) or not x.size:
            raise ValueError(
                f"{name} must be one number a sample, [n], or of several contexts as many each, "
                f"[C, n], and not empty; got {[*x.shape]}."
            )
    return [x.reshape(-1, x.shape[-1]) for x in found]


def _known(name: str, x: Any) -> Any:
    if not is_concrete(x):
        raise ValueError(
            f"{name} is traced, but this is computed on the host: call it outside jit."
        )
    return jax.device_get(x)
