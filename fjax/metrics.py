"""How varied a set of samples is. Token arrays in, numbers out; on the host, since n-grams are counted, not summed."""

from collections.abc import Iterator

import numpy as np

from fjax._typing import Array, Bool, Int

__all__ = ["distinct_n"]


def distinct_n(tokens: Int[Array, "N T"] | np.ndarray, *, n: int, where: Bool[Array, "N T"] | np.ndarray) -> float:
    """Distinct n-grams over all n-grams of all samples: 1 if nothing repeats, near 0 if all samples are alike.

    Counted over the whole set, so it falls as the set grows: compare sets of one size only. (Averaged over samples, as
    some define it, the figure would not notice that all samples are the same sentence.)

    Args:
        tokens: one sample a row.
        n: length of the n-grams.
        where: tokens that count.

    Returns:
        The ratio; NaN if no sample has n tokens.

    Raises:
        ValueError: if n is below 1.

    >>> tokens = np.array([[1, 2, 1, 2], [1, 2, 3, 0]])
    >>> distinct_n(tokens, n=2, where=np.array([[True] * 4, [True] * 3 + [False]]))        # 12 21 12, 12 23
    0.6

    Source: Li et al. 2016 (arXiv 1510.03055), section 5.
    """
    if n < 1:
        raise ValueError(f"n-grams have at least one token, got n={n}.")
    grams = [gram for row, keep in zip(np.asarray(tokens), np.asarray(where), strict=True) for gram in _grams(row[keep], n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def _grams(row: np.ndarray, n: int) -> Iterator[tuple[int, ...]]:
    values = row.tolist()
    return zip(*(values[i:] for i in range(n)), strict=False)
