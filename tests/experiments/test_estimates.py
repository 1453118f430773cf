"""The figures of an evaluation on spaces of four outcomes, where all of them are known: exactly,
and within their errors."""

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _evaluate
from experiments._display import _verdict
from experiments._evaluate import Check, Figure, Target
from experiments._programs import Batch
from experiments._settings import Settings, reported_divergences

DIVERGENCES = reported_divergences(Settings(divergence="alpha", alpha=0.5))
TARGET = Target(
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
    """Outcomes of each context, ``[C, n]``."""
    c, n = outcomes.shape
    ids, tokens = np.repeat(np.arange(c), n), outcomes.reshape(-1, 1)
    log_pi, log_a = (np.log(p[ids, tokens[:, 0]]).astype(np.float32) for p in (pi, base))
    done = np.ones(c * n, bool)
    return Batch(
        tokens, done[:, None], done, log_pi, log_a, None, ids if contexts else None, from_policy
    )


def exactly(p: np.ndarray, times: int = 1) -> np.ndarray:
    """``[C, 16 * times]``: every outcome as often as its probability says."""
    return np.stack([np.repeat(np.arange(4), np.round(16 * times * row).astype(int)) for row in p])


def programs(pi: np.ndarray, allowed: np.ndarray, contexts: bool = True) -> SimpleNamespace:
    """What `evaluate` asks of a run; contexts are told apart by nothing but their rows, as those of
    one distribution are."""

    def decode(drawn):
        ids = np.zeros(len(drawn.tokens), int) if drawn.contexts is None else drawn.contexts
        return [
            "yes" if allowed[c, x] else "no" for c, x in zip(ids, drawn.tokens[:, 0], strict=True)
        ]

    prompts = SimpleNamespace(
        texts=[f"prompt {c}" for c in range(len(pi))], references=[""] * len(pi)
    )
    return SimpleNamespace(unseen=prompts if contexts else None, decode=decode, policy_samples=5)


def scorer(pi: np.ndarray):
    """Log π by row; the tokens alone do not say which context a row is of, so rows carry it in a
    second column."""
    return lambda params, tokens, where: np.log(pi[tokens[:, 1], tokens[:, 0]]).astype(np.float32)


def with_contexts(drawn: Batch) -> Batch:
    ids = np.zeros(len(drawn.tokens), int) if drawn.contexts is None else drawn.contexts
    tokens = np.stack([drawn.tokens[:, 0], ids], axis=1)
    return drawn._replace(tokens=tokens, where=np.ones_like(tokens, bool))


def evaluate(pi, base, allowed, mine, beside, kept, contexts=True, log_z_off_by=0.0):
    """Of outcomes: of the policy, of the base model in the same batch, and kept ones of the base
    model."""
    run = programs(pi, allowed, contexts)
    run.score = scorer(pi)
    options = {"pi": pi, "base": base, "contexts": contexts}
    drawn = batch(np.concatenate([mine, beside], axis=1), **options, from_policy=0)
    order = np.argsort(
        np.tile(np.arange(mine.shape[1] + beside.shape[1]) >= mine.shape[1], len(mine)),
        kind="stable",
    )
    drawn = _evaluate._rows(with_contexts(drawn), order)._replace(from_policy=mine.size)
    known = with_contexts(batch(kept, base, base, contexts=contexts, from_policy=kept.size))
    made = _evaluate.make_base(*_evaluate.score(run, TARGET, [known], kept.size))
    if log_z_off_by:
        made = made._replace(log_z=made.log_z._replace(value=made.log_z.value + log_z_off_by))
    scored = _evaluate.score(run, TARGET, [drawn], mine.size)
    return _evaluate.evaluate(run, None, TARGET, scored, made, DIVERGENCES)


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
            "alpha": 4 * (1 - np.sqrt(p * pi).sum(axis=1)),
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
    assert found.samples == 48  # all are on display
    assert found.contexts == 3
    assert found.check.least == pytest.approx(found.check.forward_kl, abs=1e-5)


@pytest.mark.parametrize("beside", [0, 1], ids=("policy-alone", "with-base"))
def test_all_figures_are_of_the_same_contexts_and_exact(beside):
    """From samples in exact proportion to π and a; whatever their shares, the mixture is what they
    are of."""
    kept = exactly(BASE, times=3)
    found = evaluate(POLICY, BASE, ALLOWED, exactly(POLICY), exactly(BASE)[:, : 16 * beside], kept)
    expected = truth(POLICY[:2], BASE[:2], ALLOWED[:2])
    for name, values in expected.items():
        assert found.figures[name].value == pytest.approx(values.mean(), abs=2e-5), name
        # The error is that of a mean of two contexts: their spread.
        assert found.figures[name].std_error == pytest.approx(
            np.std(values, ddof=1) / math.sqrt(2), abs=2e-5
        ), name
    rates = expected["satisfaction"]
    assert found.check.forward_kl == pytest.approx(expected["forward_kl"].mean(), abs=2e-5)
    assert found.check.least == pytest.approx(-np.log(rates).mean(), abs=2e-5)
    gaps = expected["forward_kl"] + np.log(rates)
    assert found.check.std_error == pytest.approx(np.std(gaps, ddof=1) / math.sqrt(2), abs=2e-5)


def test_a_rare_constraint_from_eight_samples_a_prompt():
    """B15: of π = a with 0.926 for TV and 2.60 for KL(p‖π), published were 0.816 and 1.78."""
    rng, c, z = np.random.default_rng(0), 144, 0.074
    base, allowed = (
        np.repeat([[z, 0.3, 0.3, 0.4 - z]], c, axis=0),
        np.repeat([[True, False, False, False]], c, axis=0),
    )

    def draw(n):
        return (rng.uniform(size=(c, n, 1)) > np.cumsum(base, axis=1)[:, None, :-1]).sum(axis=-1)

    figures = evaluate(base, base, allowed, draw(8), draw(2), draw(128)).figures
    assert figures["known"].value > 0.99
    tv, kl = figures["total_variation"], figures["forward_kl"]
    assert abs(tv.value - (1 - z)) < 4 * tv.std_error < 0.03
    bias = (1 - z) / (2 * 128 * z)  # of -log of an estimate of Z
    assert abs(kl.value - bias + math.log(z)) < 4 * kl.std_error < 0.2


def test_z_is_that_of_the_base_model_s_samples_and_not_estimated_anew():
    """B15: one p throughout a run. With a Z that is too large by a factor c, E_q[(p/q) log(p/π)] is
    (KL(p‖π) - log c)/c."""
    found = evaluate(
        POLICY, BASE, ALLOWED, exactly(POLICY), exactly(BASE), exactly(BASE), log_z_off_by=0.5
    )
    expected = truth(POLICY[:2], BASE[:2], ALLOWED[:2])
    assert found.figures["log_z"].value == pytest.approx(expected["log_z"].mean() + 0.5, abs=1e-5)
    by_hand = (expected["forward_kl"].mean() - 0.5) * math.exp(-0.5)
    assert found.figures["forward_kl"].value == pytest.approx(by_hand, abs=2e-5)


@pytest.mark.parametrize("beside", [0, 1], ids=("policy-alone", "with-base"))
def test_without_contexts_too(beside):
    arguments = exactly(POLICY[:1]), exactly(BASE[:1])[:, : 16 * beside], exactly(BASE[:1], times=2)
    found = evaluate(POLICY[:1], BASE[:1], ALLOWED[:1], *arguments, contexts=False)
    for name, values in truth(POLICY[:1], BASE[:1], ALLOWED[:1]).items():
        assert found.figures[name].value == pytest.approx(values[0], abs=2e-5), name
    rate, kl = found.figures["satisfaction"], found.figures["forward_kl"]
    assert found.check == Check(
        kl.value, -math.log(rate.value), math.hypot(kl.std_error, rate.std_error / rate.value)
    )
    assert found.log_z is None
    assert "known" not in found.figures


def test_where_no_z_is_known_the_figures_that_need_none_are_of_all_contexts():
    nothing = np.zeros_like(ALLOWED)
    found = evaluate(POLICY, BASE, nothing, exactly(POLICY), exactly(BASE), exactly(BASE))
    assert found.figures["known"].value == 0
    for name in ("log_z", "forward_kl", "total_variation", "jensen_shannon", "alpha"):
        assert math.isnan(found.figures[name].value), name
    assert found.figures["entropy"].value == pytest.approx(
        -(POLICY * np.log(POLICY)).sum(axis=1).mean(), abs=1e-5
    )
    assert "nothing to check" in _verdict(found.check)


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
        evaluate(pi, base, allowed, draw(pi, 8), draw(base, 2), draw(base, 64)) for _ in range(150)
    ]
    for name in ("forward_kl", "total_variation", "jensen_shannon", "log_z", "satisfaction"):
        values = np.array([one.figures[name].value for one in found])
        error = np.mean([one.figures[name].std_error for one in found])
        assert 0.75 < error / values.std(ddof=1) < 1.35, name
        exact = truth(pi[:1], base[:1], allowed[:1])[name][0]
        # 4 standard errors of the mean of 150, and the bias of order 1/m that an estimate of log Z
        # has, m · Z being 19.
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(150) + 0.03, name
    gaps = np.array([one.check.forward_kl - one.check.least for one in found])
    assert 0.75 < np.mean([one.check.std_error for one in found]) / gaps.std(ddof=1) < 1.35


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (Check(2.5, 2.0, 0.1), "2.500 ≥ 2.000 holds."),
        (Check(2.0, 2.0 + 1e-6, 0.0), "holds."),  # the same number twice, but for rounding
        (Check(1.690, 1.946, 0.1), "1.690 is below 1.946, within error (± 0.100)."),
        (Check(1.690, 1.946, 0.07), "within error"),  # 3.7 standard errors
        (Check(1.690, 1.946, 0.06), "it FAILS"),
        (Check(1.690, 1.946, math.inf), "within error"),
        (Check(math.nan, math.inf, math.inf), "nothing to check"),
    ],
)
def test_a_check_says_holds_only_where_it_does(check, expected):
    """B15: "1.690 ≥ 1.946 holds" was printed."""
    said = _verdict(check)
    assert expected in said
    assert ("holds" in said) == (check.least - check.forward_kl < 1e-4)


@pytest.mark.parametrize("share", [0, 2, 7])
def test_as_many_samples_of_the_policy_whatever_the_share_of_the_base(share):
    """B16: distinct-n and self-BLEU are of their number, which was that of whole batches."""

    def drawn(contexts):
        outcomes = np.arange(16).reshape(2, 8) % 4
        one = batch(outcomes, POLICY[:2], BASE[:2], from_policy=16 - 2 * share, contexts=contexts)
        order = np.argsort(np.tile(np.arange(8) >= 8 - share, 2), kind="stable")
        return [_evaluate._rows(one, order)] * 20

    of_policy, of_base = _evaluate.split(drawn(contexts=False), 17)
    assert (len(of_policy.log_pi), len(of_base.log_pi)) == (17, 20 * 2 * share)
    of_policy, of_base = _evaluate.split(drawn(contexts=True), 17)
    assert of_policy.contexts.tolist() == [0] * 9 + [1] * 9  # rounded up to as many of each
    assert len(of_base.log_pi) == 20 * 2 * share


# Distances


def records(*pairs, name="reverse_kl"):
    return {10 * i: {name: value, "total_variation": tv} for i, (value, tv) in enumerate(pairs)}


def test_distances_are_of_one_unit():
    """B17: once infinite, TV in all; a finite reverse KL beside a TV of another step says
    nothing."""
    infinite = records((math.inf, 0.60), (math.inf, 0.35), (1.4, 0.20), (0.9, 0.12), (0.6, 0.08))
    unit, known = _evaluate.distances(infinite, "reverse_kl")
    assert unit == "total_variation"
    assert known == {0: 0.60, 10: 0.35, 20: 0.20, 30: 0.12, 40: 0.08}
    unit, known = _evaluate.distances(records((1.4, 0.1), (0.9, 0.2)), "reverse_kl")
    assert (unit, known) == ("reverse_kl", {0: 1.4, 10: 0.9})


def test_what_is_unknown_is_no_distance():
    unknown = records((math.nan, math.nan), (0.4, 0.3), (math.nan, math.nan))
    assert _evaluate.distances(unknown, "reverse_kl") == ("reverse_kl", {10: 0.4})
    assert _evaluate.distances({}, "reverse_kl") == ("reverse_kl", {})


def test_a_ratio_of_means_has_the_error_of_the_delta_method():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        bottom = (rng.uniform(size=(1, 200)) < 0.4).astype(float)
        found.append(_evaluate._ratio(bottom * (rng.uniform(size=(1, 200)) < 0.3), bottom))
    values, errors = np.array([(f.value, f.std_error) for f in found]).T
    assert abs(values.mean() - 0.3) < 4 * values.std() / 20  # 4 standard errors
    # 400 repetitions know a standard deviation to 3.5 %
    assert 0.9 < errors.mean() / values.std(ddof=1) < 1.12
    assert math.isnan(_evaluate._ratio(np.zeros((1, 3)), np.zeros((1, 3))).value)


def test_a_win_rate_counts_ties_half():
    mine, other = np.array([[3.0, 1.0]]), np.array([[1.0, 2.0]])
    assert _evaluate._win_rate(mine, other).value == (1 + 1 + 0.5 + 0) / 4
    several = _evaluate._win_rate(np.array([[3.0], [0.0]]), np.array([[1.0], [2.0]]))
    assert several == Figure(0.5, 0.5, 2.0)
    assert jnp.isfinite(_evaluate._win_rate(mine, other).std_error)
