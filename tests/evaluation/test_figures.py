"""The figures of an evaluation on spaces of four outcomes, where all of them are known: exactly,
and within their errors."""

import math

import numpy as np
import pytest

from fjax import evaluation
from fjax.divergences import by_name
from fjax.estimators import Estimate
from fjax.evaluation import Evaluation, TextTarget
from fjax.rollouts import Batch, Collector, Contexts, Prompts
from fjax.runs.distance import Check, check_bound

DIVERGENCES = {
    name: by_name(name)
    for name in ("forward_kl", "reverse_kl", "total_variation", "jensen_shannon", "alpha=0.5")
}
NO_METRICS = dict.fromkeys(evaluation.METRICS, lambda mine: None)
"""Of texts, which say nothing here."""
TARGET = TextTarget(
    lambda prompts, texts: {
        "satisfaction": np.array([text == "yes" for text in texts], np.float32)
    },
    lambda log_a, features: np.where(features["satisfaction"] > 0, log_a, -np.inf),
    headline="satisfaction",
    bound="satisfaction",
)
# In sixteenths; of the third context nothing is allowed, and its Z is unknown.
BASE = np.array([[1, 3, 4, 8], [2, 2, 8, 4], [4, 4, 4, 4]]) / 16
POLICY = np.array([[4, 8, 2, 2], [2, 10, 3, 1], [1, 5, 5, 5]]) / 16
ALLOWED = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)


def batch(
    outcomes: np.ndarray,
    pi: np.ndarray,
    base: np.ndarray,
    *,
    from_policy: int,
    contexts: bool = True,
) -> Batch:
    """Outcomes of each context, ``[C, n]``; the tokens alone do not say which context a row is of,
    so rows carry it in a second column."""
    c, n = outcomes.shape
    ids, outcomes = np.repeat(np.arange(c), n), outcomes.ravel()
    log_pi, log_a = (np.log(p[ids, outcomes]).astype(np.float32) for p in (pi, base))
    tokens, done = np.stack([outcomes, ids], axis=1), np.ones(c * n, bool)
    where = np.ones_like(tokens, bool)
    return Batch(tokens, where, done, log_pi, log_a, None, ids if contexts else None, from_policy)


def rows(drawn: Batch, order: np.ndarray) -> Batch:
    return Batch(*(None if x is None else x[order] for x in drawn[:-1]), drawn.from_policy)


def exactly(p: np.ndarray, times: int = 1) -> np.ndarray:
    """``[C, 16 * times]``: every outcome as often as its probability says."""
    return np.stack([np.repeat(np.arange(4), np.round(16 * times * row).astype(int)) for row in p])


def collector(pi: np.ndarray, allowed: np.ndarray, contexts: bool = True) -> Collector:
    """What `evaluate` asks of one; contexts are told apart by nothing but their rows, as those of
    one distribution are."""

    def decode(tokens, where):
        return ["yes" if allowed[c, x] else "no" for x, c in tokens]

    def score(params, tokens, where):
        return np.log(pi[np.asarray(tokens)[:, 1], np.asarray(tokens)[:, 0]]).astype(np.float32)

    unused = np.zeros((len(pi), 1), int)
    texts = [f"prompt {c}" for c in range(len(pi))]
    prompts = Prompts(texts, unused, unused == 0, [""] * len(pi))
    given = Contexts(prompts, prompts, per_step=len(pi)) if contexts else None
    return Collector(None, None, score, decode, 5, 5, given)


def evaluate(
    pi, base, allowed, mine, beside, kept, contexts=True, log_z_off_by=0.0, metrics=None
) -> Evaluation:
    """Of outcomes: of the policy, of the base model in the same batch, and kept ones of the base
    model."""
    run = collector(pi, allowed, contexts)
    options = {"pi": pi, "base": base, "contexts": contexts}
    drawn = batch(np.concatenate([mine, beside], axis=1), **options, from_policy=mine.size)
    of_base = np.tile(np.arange(mine.shape[1] + beside.shape[1]) >= mine.shape[1], len(mine))
    drawn = rows(drawn, np.argsort(of_base, kind="stable"))
    known = batch(kept, base, base, contexts=contexts, from_policy=kept.size)
    made = evaluation.make_base(*evaluation.score(run, TARGET, [known], kept.size))
    if log_z_off_by:
        made = made._replace(log_z=made.log_z._replace(value=made.log_z.value + log_z_off_by))
    scored = evaluation.score(run, TARGET, [drawn], mine.size)
    options = {"divergences": DIVERGENCES, "metrics": metrics}
    return evaluation.measure(run, None, TARGET, scored, made, **options)


def bound_of(found: Evaluation) -> Check:
    check = check_bound(found, "satisfaction")
    assert check is not None
    return check


def truth(pi, base, allowed):
    """Name -> the figure of each context, by summing over all four outcomes."""
    z = (base * allowed).sum(axis=1)
    p = base * allowed / z[:, None]
    m = (p + pi) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "satisfaction": (pi * allowed).sum(axis=1),
            "log_z": np.log(z),
            "forward_kl": np.nansum(p * np.log(p / pi), axis=1),
            "total_variation": abs(p - pi).sum(axis=1) / 2,
            "jensen_shannon": (
                np.nansum(p * np.log(p / m), axis=1) + (pi * np.log(pi / m)).sum(axis=1)
            )
            / 2,
            "alpha=0.5": 4 * (1 - np.sqrt(p * pi).sum(axis=1)),
            "kl_to_base": (pi * np.log(pi / base)).sum(axis=1),
            "entropy": -(pi * np.log(pi)).sum(axis=1),
        }


def test_the_base_model_is_as_far_from_the_target_as_the_constraint_is_rare():
    """B15: for π = a TV is 1 - satisfaction and KL(p‖π) is -log Z_c, on the contexts that are
    known; the third is dropped."""
    found = evaluate(BASE, BASE, ALLOWED, exactly(BASE), exactly(BASE), exactly(BASE, times=2))
    figures = {name: figure.value for name, figure in found.figures.items()}
    assert figures["known"] == pytest.approx(2 / 3)
    assert figures["satisfaction"] == pytest.approx((4 / 16 + 2 / 16) / 2, abs=1e-6)
    assert figures["total_variation"] == pytest.approx(1 - figures["satisfaction"], abs=1e-6)
    assert figures["forward_kl"] == pytest.approx(
        -(math.log(4 / 16) + math.log(2 / 16)) / 2, abs=1e-5
    )
    assert figures["log_z"] == pytest.approx(-figures["forward_kl"], abs=1e-5)
    assert figures["reverse_kl"] == math.inf
    np.testing.assert_allclose(found.log_z, [np.log(4 / 16), np.log(2 / 16), -np.inf], atol=1e-6)
    assert len(found.samples.texts) == 48  # all are on display
    assert found.samples.num_contexts == 3
    assert bound_of(found).least == pytest.approx(bound_of(found).forward_kl, abs=1e-5)


@pytest.mark.parametrize("beside", [0, 1], ids=("policy-alone", "with-base"))
def test_all_figures_are_of_the_same_contexts_and_exact(beside):
    """From samples in exact proportion to π and a; whatever their shares, the mixture is what they
    are of."""
    kept = exactly(BASE, times=3 - beside)
    found = evaluate(POLICY, BASE, ALLOWED, exactly(POLICY), exactly(BASE)[:, : 16 * beside], kept)
    expected = truth(POLICY[:2], BASE[:2], ALLOWED[:2])
    for name, values in expected.items():
        assert found.figures[name].value == pytest.approx(values.mean(), abs=2e-5), name
        # The error is that of a mean of two contexts: their spread.
        assert found.figures[name].std_error == pytest.approx(
            np.std(values, ddof=1) / math.sqrt(2), abs=2e-5
        ), name
    rates = expected["satisfaction"]
    assert bound_of(found).forward_kl == pytest.approx(expected["forward_kl"].mean(), abs=2e-5)
    assert bound_of(found).least == pytest.approx(-np.log(rates).mean(), abs=2e-5)
    gaps = expected["forward_kl"] + np.log(rates)
    assert bound_of(found).std_error == pytest.approx(np.std(gaps, ddof=1) / math.sqrt(2), abs=2e-5)


def test_a_rare_constraint_from_eight_samples_a_prompt():
    """B15: of π = a with 0.926 for TV and 2.60 for KL(p‖π), published were 0.816 and 1.78."""
    rng, c, z = np.random.default_rng(0), 144, 0.074
    base, allowed = (
        np.repeat([[z, 0.3, 0.3, 0.4 - z]], c, axis=0),
        np.repeat([[True, False, False, False]], c, axis=0),
    )

    def draw(n):
        return (rng.uniform(size=(c, n, 1)) > np.cumsum(base, axis=1)[:, None, :-1]).sum(axis=-1)

    figures = evaluate(base, base, allowed, draw(8), draw(2), draw(128), metrics=NO_METRICS).figures
    assert figures["known"].value > 0.99
    tv, kl = figures["total_variation"], figures["forward_kl"]
    assert abs(tv.value - (1 - z)) < 4 * tv.std_error < 0.03
    bias = (1 - z) / (2 * 128 * z)  # of -log of an estimate of Z
    assert abs(kl.value - bias + math.log(z)) < 4 * kl.std_error < 0.2


def test_z_is_that_of_the_base_model_s_samples_and_not_estimated_anew():
    """B15: one p throughout a run. With a Z that is too large by a factor c, E_q[(p/q) log(p/π)] is
    (KL(p‖π) - log c)/c."""
    found = evaluate(
        POLICY,
        BASE,
        ALLOWED,
        exactly(POLICY),
        exactly(BASE),
        exactly(BASE, times=2),
        log_z_off_by=0.5,
    )
    expected = truth(POLICY[:2], BASE[:2], ALLOWED[:2])
    assert found.figures["log_z"].value == pytest.approx(expected["log_z"].mean() + 0.5, abs=1e-5)
    by_hand = (expected["forward_kl"].mean() - 0.5) * math.exp(-0.5)
    assert found.figures["forward_kl"].value == pytest.approx(by_hand, abs=2e-5)


@pytest.mark.parametrize("beside", [0, 1], ids=("policy-alone", "with-base"))
def test_without_contexts_too(beside):
    arguments = (
        exactly(POLICY[:1]),
        exactly(BASE[:1])[:, : 16 * beside],
        exactly(BASE[:1], times=2 - beside),
    )
    found = evaluate(POLICY[:1], BASE[:1], ALLOWED[:1], *arguments, contexts=False)
    for name, values in truth(POLICY[:1], BASE[:1], ALLOWED[:1]).items():
        assert found.figures[name].value == pytest.approx(values[0], abs=2e-5), name
    rate, kl = found.figures["satisfaction"], found.figures["forward_kl"]
    assert bound_of(found) == Check(
        kl.value, -math.log(rate.value), math.hypot(kl.std_error, rate.std_error / rate.value)
    )
    assert found.log_z is None
    assert "known" not in found.figures


def test_where_no_z_is_known_the_figures_that_need_none_are_of_all_contexts():
    pi, base, nothing = POLICY[:2], BASE[:2], np.zeros_like(ALLOWED[:2])
    found = evaluate(pi, base, nothing, exactly(pi), exactly(base), exactly(base, times=2))
    assert found.figures["known"].value == 0
    for name in ("log_z", "forward_kl", "total_variation", "jensen_shannon", "alpha=0.5"):
        assert math.isnan(found.figures[name].value), name
    assert found.figures["entropy"].value == pytest.approx(
        -(pi * np.log(pi)).sum(axis=1).mean(), abs=1e-5
    )
    assert math.isnan(bound_of(found).forward_kl)
    assert math.isinf(bound_of(found).least)


def test_standard_errors_know_of_the_error_of_each_z():
    """Thirty contexts of one distribution differ by chance alone, so repetition shows what the
    error has to be: neither a third less nor half more (150 repetitions know a standard deviation
    to 6 %)."""
    rng, c = np.random.default_rng(0), 30
    base, pi = (
        np.repeat([[0.15, 0.15, 0.3, 0.4]], c, axis=0),
        np.repeat([[0.6, 0.2, 0.1, 0.1]], c, axis=0),
    )
    allowed = np.repeat([[True, True, False, False]], c, axis=0)

    def draw(p, n):
        return (rng.uniform(size=(c, n, 1)) > np.cumsum(p, axis=1)[:, None, :-1]).sum(axis=-1)

    found = [
        evaluate(pi, base, allowed, draw(pi, 8), draw(base, 2), draw(base, 64), metrics=NO_METRICS)
        for _ in range(150)
    ]
    for name in ("forward_kl", "total_variation", "jensen_shannon", "log_z", "satisfaction"):
        values = np.array([one.figures[name].value for one in found])
        error = np.mean([one.figures[name].std_error for one in found])
        assert 0.75 < error / values.std(ddof=1) < 1.35, name
        exact = truth(pi[:1], base[:1], allowed[:1])[name][0]
        # 4 standard errors of the mean of 150, and the bias of order 1/m that an estimate of log Z
        # has, m · Z being 19.
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(150) + 0.03, name
    gaps = np.array([bound_of(one).forward_kl - bound_of(one).least for one in found])
    assert 0.75 < np.mean([bound_of(one).std_error for one in found]) / gaps.std(ddof=1) < 1.35


@pytest.mark.parametrize("share", [0, 2, 7])
def test_as_many_samples_of_the_policy_whatever_the_share_of_the_base(share):
    """B16: distinct-n and self-BLEU are of their number, which was that of whole batches."""

    def scored(contexts):
        outcomes = np.arange(16).reshape(2, 8) % 4
        one = batch(outcomes, POLICY[:2], BASE[:2], from_policy=16 - 2 * share, contexts=contexts)
        of_base = np.tile(np.arange(8) >= 8 - share, 2)
        drawn = [rows(one, np.argsort(of_base, kind="stable"))] * 20
        return evaluation.score(collector(POLICY[:2], ALLOWED[:2], contexts), TARGET, drawn, 17)

    of_policy, of_base = scored(contexts=False)
    assert (len(of_policy.texts), len(of_base.texts)) == (17, 20 * 2 * share)
    of_policy, of_base = scored(contexts=True)
    assert of_policy.contexts.tolist() == [0] * 9 + [1] * 9  # rounded up to as many of each
    assert len(of_base.texts) == 20 * 2 * share


def test_a_metric_of_one_s_own_and_one_in_place_of_another():
    """With contexts, of the samples of those whose Z is known."""
    seen = []

    def longest(mine):
        seen.append(mine)
        return Estimate(float(max(map(len, mine.texts))), 0.0, float(len(mine.texts)))

    metrics = {"longest": longest, "perplexity": lambda mine: None, "length": longest}
    drawn = exactly(POLICY), exactly(BASE), exactly(BASE, times=2)
    found = evaluate(POLICY, BASE, ALLOWED, *drawn, metrics=metrics).figures
    assert found["longest"] == found["length"] == Estimate(3.0, 0.0, 32.0)
    assert seen[0].num_contexts == 2
    assert "perplexity" not in found  # None: it does not apply
    assert list(found)[-1] == "longest"  # after those that are always there
    without = evaluate(POLICY, BASE, ALLOWED, *drawn).figures
    others = without.keys() - {"perplexity", "length"}
    assert found.keys() == others | {"longest", "length"}
    assert all(repr(found[name]) == repr(without[name]) for name in others)


def test_evaluate_gives_the_figures_of_measure():
    run = collector(POLICY[:1], ALLOWED[:1], contexts=False)
    outcomes = np.concatenate([exactly(POLICY[:1]), exactly(BASE[:1], times=2)], axis=1)
    drawn = batch(outcomes, POLICY[:1], BASE[:1], contexts=False, from_policy=16)
    given = run, None, TARGET, evaluation.score(run, TARGET, [drawn], 16)
    found = evaluation.evaluate(*given, divergences=DIVERGENCES)
    assert repr(found) == repr(evaluation.measure(*given, divergences=DIVERGENCES).figures)
    assert found["satisfaction"].value == pytest.approx(12 / 16)
