"""Metrics on sets whose n-grams can be counted by hand, and beside the libraries that other papers
use."""

import math
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from fjax.metrics import bleu, distinct_n, rouge, self_bleu
from tests.cases import refused


@pytest.mark.parametrize(("n", "expected"), [(1, 3 / 7), (2, 3 / 5), (3, 3 / 3), (5, math.nan)])
def test_by_hand(n, expected):
    tokens = np.array([[1, 2, 1, 2], [1, 2, 3, 0]])
    where = np.array([[True] * 4, [True] * 3 + [False]])
    np.testing.assert_allclose(distinct_n(tokens, n=n, where=where), expected)


def test_one_sentence_over_and_over_is_no_variety():
    tokens = np.tile(np.arange(8), (100, 1))
    where = np.ones_like(tokens, bool)
    assert distinct_n(tokens, n=2, where=where) == 0.01
    assert self_bleu(tokens, where=where) == pytest.approx(1)


def test_refuses_empty_ngrams():
    for metric in (distinct_n, self_bleu):
        with refused("at least one token"):
            metric(np.zeros((1, 1), int), n=0, where=np.ones((1, 1), bool))


def random_set(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of 1 to 12 tokens of 2 to 9 kinds, with gaps: repeated n-grams, missing orders and
    all lengths."""
    rng = np.random.default_rng(seed)
    rows, kinds = rng.integers(2, 9), rng.integers(2, 10)
    where = rng.random((rows, 12)) < rng.random((rows, 1))
    where[:, 0] = True
    return rng.integers(0, kinds, (rows, 12)), where


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_self_bleu_is_the_mean_of_sacrebleus_sentence_bleu(n):
    from sacrebleu.metrics import BLEU

    judge = BLEU(tokenize="none", smooth_method="exp", effective_order=True, max_ngram_order=n)
    for seed in range(60):
        tokens, where = random_set(seed)
        texts = [" ".join(map(str, row[keep])) for row, keep in zip(tokens, where, strict=True)]
        scores = [
            judge.sentence_score(text, texts[:i] + texts[i + 1 :]).score / 100
            for i, text in enumerate(texts)
        ]
        assert self_bleu(tokens, n=n, where=where) == pytest.approx(np.mean(scores), abs=1e-6), seed


def test_self_bleu_leaves_empty_samples_out_and_needs_two():
    tokens = np.array([[1, 2, 3], [1, 2, 4], [9, 9, 9]])
    where = np.array([[True] * 3, [True] * 3, [False] * 3])
    assert self_bleu(tokens, where=where) == self_bleu(tokens[:2], where=where[:2])
    assert math.isnan(self_bleu(tokens[1:], where=where[1:]))


@pytest.mark.parametrize("metric", [distinct_n, self_bleu])
def test_masks_of_integers_are_masks_and_shapes_are_checked(metric, bare):
    """Regression: integers picked rows by number, so that one 2-gram of [1, 2, 3] was counted
    twice: ½ in place of 1."""
    tokens, where = random_set(0)
    expected = metric(tokens, n=2, where=where)
    for mask in (
        where.astype(int),
        3 * where.astype(np.uint8),
        where.tolist(),
        jnp.asarray(where),
        jnp.asarray(where, int),
    ):
        assert metric(tokens, n=2, where=mask) == expected
        assert metric(tokens.tolist(), n=2, where=mask) == expected
    assert distinct_n([[1, 2, 3]], n=2, where=[[1, 1, 1]]) == 1
    for wrong in (where[0], where[:1], where[:, :1], where[..., None]):
        with pytest.raises(ValueError, match=r"tokens and where must be \[N, T\]"):
            metric(tokens, n=2, where=wrong)
    with pytest.raises(ValueError, match=r"tokens and where must be \[N, T\]"):
        metric(tokens[0], n=2, where=where[0])
    with pytest.raises(ValueError, match="must be booleans"):
        metric(tokens, n=2, where=where.astype(float))


def test_self_bleu_of_a_whole_evaluation_is_quick():
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.01, (500, 40)), 4000)
    where = np.arange(40) < rng.integers(10, 41, (500, 1))
    begun = time.process_time()
    assert 0 < self_bleu(tokens, where=where) < 1
    assert time.process_time() - begun < 2


TEXTS = ["a great , great film .", "the plot is thin", "it is dull", ""]
REFERENCES = ["a great film .", "the plot is paper thin", "never dull", "a film"]


def test_bleu_is_between_0_and_1_and_exact_where_it_can_be_counted(caplog):
    assert bleu(REFERENCES, REFERENCES) == pytest.approx(1)
    # Of 13 words 9 match, of 10 pairs 5, of 7 triples 2, of 4 quadruples none; 13 words for 13.
    expected = (9 / 13 * 5 / 10 * 2 / 7 * (1 / 2) / 4) ** 0.25
    assert bleu(TEXTS, REFERENCES) == pytest.approx(expected)
    bleu(["one ."] * 200, ["one ."] * 200)
    assert not caplog.records


def test_rouge_by_hand_with_standard_errors():
    result = rouge(TEXTS, REFERENCES)
    f_1 = [2 * 3 / (4 + 3), 2 * 4 / (4 + 5), 2 * 1 / (3 + 2), 0]
    f_2 = [2 * 2 / (3 + 2), 2 * 2 / (3 + 4), 0, 0]
    for estimate, expected in zip(result, (f_1, f_2, f_1), strict=True):
        assert float(estimate.value) == pytest.approx(np.mean(expected))
        assert float(estimate.std_error) == pytest.approx(np.std(expected, ddof=1) / 2)


@pytest.mark.parametrize("metric", [bleu, rouge])
def test_texts_and_references_go_in_pairs(metric):
    with refused("got 2 texts and 1 references"):
        metric(["a", "b"], ["a"])
    with refused("got 0 texts"):
        metric([], [])
    with refused("got a single string"):
        metric("a", "b")


@pytest.mark.parametrize(
    ("metric", "package", "extra"),
    [(bleu, "sacrebleu", "runs"), (rouge, "rouge_score.rouge_scorer", "rouge")],
)
def test_what_is_not_installed_is_named(monkeypatch, metric, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}.*pip install 'fjax\[{extra}\]'"):
        metric(["a"], ["a"])
