"""distinct-n on sets whose n-grams can be counted by hand."""

import math

import numpy as np
import pytest

from fjax.metrics import distinct_n
from tests.cases import refused


@pytest.mark.parametrize(("n", "expected"), [(1, 3 / 7), (2, 3 / 5), (3, 3 / 3), (5, math.nan)])
def test_by_hand(n, expected):
    tokens = np.array([[1, 2, 1, 2], [1, 2, 3, 0]])
    where = np.array([[True] * 4, [True] * 3 + [False]])
    np.testing.assert_allclose(distinct_n(tokens, n=n, where=where), expected)


def test_one_sentence_over_and_over_is_no_variety():
    tokens = np.tile(np.arange(8), (100, 1))
    assert distinct_n(tokens, n=2, where=np.ones_like(tokens, bool)) == 0.01


def test_refuses_empty_ngrams():
    with refused("at least one token"):
        distinct_n(np.zeros((1, 1), int), n=0, where=np.ones((1, 1), bool))
