"""How varied a set of samples is, and how near texts are to references.

Tokens or texts in, numbers out.

All of it runs on the host, since n-grams are counted, not summed; and all is between 0 and 1.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fjax._checks import as_mask
from fjax._optional import import_optional
from fjax.estimators import Estimate, estimate_mean
from fjax.types import Array, Bool, Int

__all__ = ["Rouge", "bleu", "distinct_n", "rouge", "self_bleu"]


_Mask = Bool[Array, "N T"] | Int[Array, "N T"] | np.ndarray


def distinct_n(tokens: Int[Array, "N T"] | np.ndarray, *, n: int, where: _Mask) -> float:
    """Distinct n-grams over all n-grams of all samples: 1 if nothing repeats.

    Near 0 if all samples are alike. Counted over the whole set, so it falls as the set grows:
    compare sets of equal size only. (Averaged over samples, as some define it, the figure would not
    notice that all samples are the same sentence.)

    Args:
        tokens: one sample a row.
        n: length of the n-grams.
        where: tokens that count.

    Returns:
        The ratio; NaN if no sample has n tokens.

    Raises:
        ValueError: if n is below 1, or tokens and where are not both ``[N, T]``.

    >>> tokens = np.array([[1, 2, 1, 2], [1, 2, 3, 0]])
    >>> where = np.array([[True] * 4, [True] * 3 + [False]])
    >>> distinct_n(tokens, n=2, where=where)  # 12 21 12, 12 23
    0.6

    Source: Li et al. 2016 (arXiv 1510.03055), section 5.
    """
    _check_n(n)
    grams = [gram for row in _rows(tokens, where) for gram in _grams(row, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def self_bleu(tokens: Int[Array, "N T"] | np.ndarray, *, n: int = 4, where: _Mask) -> float:
    """Mean BLEU of each sample with all the others as references: 1 if all are alike.

    Near 0 if they share nothing. Of one sample it is min(1, exp(1 - r/c)) (Π_k m_k/c_k)^(1/n), with
    c tokens, r those of the reference nearest in length, c_k k-grams, and m_k of them found in a
    reference, each counted at most as often as in the one that has it most. A sample shorter than n
    is judged by the orders that it has. Where an order has no match, m_k is ½ the first time, ¼ the
    second, and so on (NIST's smoothing, "exp" in sacrebleu), else one missing 4-gram would make the
    whole 0.

    It rises with the number of samples, since each new one is another reference: slice sets to
    equal size before comparing. The time goes with the number of tokens, not with its square.

    Args:
        tokens: one sample a row; a row without tokens is left out.
        n: longest n-grams.
        where: tokens that count.

    Returns:
        The mean; NaN if fewer than two samples have tokens.

    Raises:
        ValueError: if n is below 1, or tokens and where are not both ``[N, T]``.

    >>> tokens = np.array([[1, 2, 3, 4], [1, 2, 3, 5]])
    >>> round(self_bleu(tokens, n=2, where=np.ones((2, 4), bool)) ** 2, 6)  # 3/4 · 2/3
    0.5

    Source: Zhu et al. 2018 (Texygen, arXiv 1802.01886), section 3; smoothing: Chen and Cherry 2014,
    method 3.
    """
    _check_n(n)
    rows = [row for row in _rows(tokens, where) if row]
    if len(rows) < 2:
        return float("nan")
    # [N, n] each
    matches, totals = np.array([_clipped_matches(rows, k) for k in range(1, n + 1)]).T
    lengths = Counter(map(len, rows))
    return float(
        _smoothed_bleu(
            matches, totals, np.array([_nearest(len(row), lengths) for row in rows])
        ).mean()
    )


class Rouge(NamedTuple):
    """F-measures, means over texts with their standard errors.

    Attributes:
        rouge_1: of words.
        rouge_2: of pairs of words.
        rouge_l: of the longest common subsequence.
    """

    rouge_1: Estimate
    rouge_2: Estimate
    rouge_l: Estimate


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 of texts against one reference each, as sacrebleu has it.

    With its defaults: 13a words, smoothing "exp". min(1, exp(1 - r/c)) (Π_k m_k/c_k)^¼ with matches
    m_k, k-grams c_k and lengths c and r summed over all texts. Papers print 100 times it.

    Args:
        texts: what was written.
        references: what should have been, in the same order.

    Raises:
        ValueError: if there are no texts, or not one reference a text.
        ImportError: if sacrebleu is not installed; it comes with ``fjax[runs]``.

    >>> round(bleu(["the cat sat on the mat"], ["the cat sat on the mat ."]), 3)  # exp(1 - 7/6)
    0.846

    Source: Papineni et al. 2002; Post 2018 (arXiv 1804.08771).
    """
    _check_pairs(texts, references)
    sacrebleu = import_optional("sacrebleu", extra="runs")
    # `force` only keeps it from warning that texts look tokenised, as those of some corpora are.
    return sacrebleu.corpus_bleu(list(texts), [list(references)], force=True).score / 100


def rouge(texts: Sequence[str], references: Sequence[str]) -> Rouge:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures of texts against one reference each.

    By rouge-score, without stemming. 2 P R/(P + R), where P is the share of the text's n-grams (or
    words, for the longest common subsequence) that the reference matches, and R that of the
    reference's. Words are runs of a-z and 0-9, upper and lower case alike: what is written in other
    letters does not count.

    Args:
        texts: what was written.
        references: what should have been, in the same order.

    Raises:
        ValueError: if there are no texts, or not one reference a text.
        ImportError: if rouge-score is not installed; it comes with ``fjax[rouge]``.

    >>> result = rouge(["the cat sat", "a dog"], ["the cat ran", "a dog"])
    >>> [round(float(estimate.value), 3) for estimate in result]  # (2/3 + 1)/2, (1/2 + 1)/2
    [0.833, 0.75, 0.833]

    Source: Lin 2004.
    """
    _check_pairs(texts, references)
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = import_optional("rouge_score.rouge_scorer", extra="rouge").RougeScorer(names)
    scores = [
        scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)
    ]
    return Rouge(
        *(estimate_mean(jnp.array([score[name].fmeasure for score in scores])) for name in names)
    )


def _check_n(n: int) -> None:
    if n < 1:
        raise ValueError(f"n-grams have at least one token, got n={n}.")


def _check_pairs(texts: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(texts, str) or isinstance(references, str):
        raise ValueError(
            "texts and references are lists with one string a text, got a single string."
        )
    if not texts or len(texts) != len(references):
        raise ValueError(
            f"There must be one reference a text, got {len(texts)} texts and {len(references)} "
            f"references."
        )


def _rows(tokens: Int[Array, "N T"] | np.ndarray, where: _Mask) -> list[list[int]]:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape != np.shape(where):
        raise ValueError(
            f"tokens and where must be [N, T]; got {list(tokens.shape)} and "
            f"{list(np.shape(where))}."
        )
    counted = np.asarray(as_mask(jnp.asarray(where), jnp.asarray(tokens)))
    return [row[keep].tolist() for row, keep in zip(tokens, counted, strict=True)]


def _grams(row: list[int], n: int) -> Iterator[tuple[int, ...]]:
    return zip(*(row[i:] for i in range(n)), strict=False)


def _clipped_matches(rows: list[list[int]], n: int) -> list[tuple[int, int]]:
    """(n-grams found in another row, n-grams) of each row.

    Each gram is counted at most as often as in another row.

    The most that *others* have of a gram is the most that any row has, or the second most for the
    row that has it.
    """
    counts = [Counter(_grams(row, n)) for row in rows]
    most: dict[tuple[int, ...], int] = {}
    second: dict[tuple[int, ...], int] = {}
    for count in counts:
        for gram, c in count.items():
            highest = most.get(gram, 0)
            most[gram] = max(highest, c)
            second[gram] = max(second.get(gram, 0), min(highest, c))
    return [
        (
            sum(
                min(c, second[gram] if c == most[gram] else most[gram]) for gram, c in count.items()
            ),
            count.total(),
        )
        for count in counts
    ]


def _nearest(length: int, lengths: Counter[int]) -> int:
    """The length nearest to that of one row among the others; of two as near the shorter."""
    others = (other for other, rows in lengths.items() if other != length or rows > 1)
    return min(others, key=lambda other: (abs(other - length), other))


def _smoothed_bleu(
    matches: np.ndarray, totals: np.ndarray, reference_lengths: np.ndarray
) -> np.ndarray:
    """BLEU of each text from its counts by order, ``[N, n]``; `self_bleu` has the formula."""
    smoothed = np.where(matches == 0, 0.5 ** np.cumsum(matches == 0, axis=1), matches)
    there = totals > 0
    log_precision = np.log(smoothed / np.maximum(totals, 1)).mean(axis=1, where=there)
    log_brevity = np.minimum(0, 1 - reference_lengths / totals[:, 0])
    return np.where(matches.any(axis=1), np.exp(log_brevity + log_precision), 0.0)
