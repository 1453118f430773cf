"""Samples of the target itself: that they are of p and nothing else, and figures that rest on them,
on a space of four outcomes where all is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import evaluation
from fjax.divergences import exact_divergence
from fjax.estimators import Estimate
from fjax.evaluation import Exact, TextTarget, draw_exact, figures_of_target
from fjax.rejection import log_acceptance
from fjax.rollouts import Collector

from .test_figures import ALLOWED, BASE, DIVERGENCES, NO_METRICS, POLICY, TARGET, exactly
from .test_figures import batch as batch_of
from .test_figures import collector as collector_of

A, PI, ALLOW = BASE[:1], POLICY[:1], ALLOWED[:1]
HARD = TARGET._replace(log_bound=0.0)
REWARDS = {"no": -0.5, "yes": 1.0}
TILT = TextTarget(
    lambda prompts, texts: {"reward": np.array([REWARDS[text] for text in texts], np.float32)},
    lambda log_a, features: log_a + features["reward"],
    headline="reward",
    log_bound=1.0,
)


def p_of(target: TextTarget) -> tuple[np.ndarray, float]:
    """(p, log Z) by summing over the four outcomes."""
    texts = ["yes" if allowed else "no" for allowed in ALLOW[0]]
    with np.errstate(divide="ignore"):
        score = np.exp(target.log_score(np.log(A[0]), target.features([""] * 4, texts)))
    return score / score.sum(), math.log(score.sum())


def drawing(a: np.ndarray = A, rows: int = 64) -> Collector:
    """A collector that draws outcomes of the base model, a quarter of each batch as its share."""

    def draw_unseen(index, params, rng_key):
        log_a = jnp.log(jnp.asarray(a[0]))
        outcomes = np.asarray(jax.random.categorical(rng_key, log_a, shape=(1, rows)))
        return batch_of(outcomes, a, a, contexts=False, from_policy=rows * 3 // 4)

    made = collector_of(a, ALLOW, contexts=False)
    return made._replace(draw_unseen=draw_unseen, samples=rows, policy_samples=rows * 3 // 4)


def draw(target=HARD, samples=2000, max_draws=10**6, seed=0, collector=None) -> Exact:
    collector, rng_key = collector or drawing(), jax.random.key(seed)
    return draw_exact(collector, None, target, rng_key, samples, max_draws=max_draws)


@pytest.mark.parametrize("target", [HARD, TILT], ids=["constraint", "tilt"])
def test_what_is_accepted_is_of_p_by_enumeration(target, x64):
    """Σ a(x)·P(accept | x) is p up to its sum, which is the rate Z/max P/a."""
    p, log_z = p_of(target)
    with np.errstate(divide="ignore"):
        log_score = jnp.asarray(np.log(p) + log_z)
    log_a = jnp.asarray(np.log(A[0]))
    taken = A[0] * np.exp(log_acceptance(log_score, log_a, log_beta=target.log_bound))
    assert taken.sum() == pytest.approx(math.exp(log_z - target.log_bound), rel=1e-12)
    np.testing.assert_allclose(taken / taken.sum(), p, rtol=1e-12)


@pytest.mark.parametrize("target", [HARD, TILT], ids=["constraint", "tilt"])
def test_draws_are_of_p_and_know_its_z(target):
    """Each outcome as often as p says, and log Z, to 4 standard errors."""
    p, log_z = p_of(target)
    exact = draw(target)
    n = len(exact.scored.texts)
    assert 2000 <= n < 2000 + 64
    assert exact.drawn % 64 == 0
    rates = np.bincount(exact.scored.tokens[:, 0], minlength=4) / n
    assert (abs(rates - p) <= 4 * np.sqrt(p * (1 - p) / n)).all()
    assert abs(exact.log_z.value - log_z) < 4 * exact.log_z.std_error < 0.3
    np.testing.assert_allclose(exact.scored.log_a, np.log(A[0][exact.scored.tokens[:, 0]]), 1e-6)
    share = exact.log_z_shares
    with np.errstate(divide="ignore"):
        weight = (p / A[0])[exact.scored.tokens[:, 0]] * math.exp(log_z - exact.log_z.value)
    np.testing.assert_allclose(share, weight / exact.drawn, rtol=1e-5)


def test_the_same_key_draws_the_same_and_another_does_not():
    once, again, other = draw(TILT, 50), draw(TILT, 50), draw(TILT, 50, seed=1)
    assert once.scored.texts == again.scored.texts
    assert once.log_z == again.log_z
    assert once.log_z != other.log_z


def test_more_are_the_first_ones_and_others():
    few, many = draw(TILT, 50).scored.tokens, draw(TILT, 500).scored.tokens
    np.testing.assert_array_equal(many[: len(few)], few)


def test_what_is_rare_is_given_up_after_as_many_draws_as_were_allowed():
    """1 in 16: five batches of 64 bring about 20, not 2000; progress says how many."""
    told = []
    rare = np.array([[1, 0, 7, 8]]) / 16
    exact = draw_exact(
        drawing(rare), None, HARD, jax.random.key(0), 2000, max_draws=5 * 64 + 63,
        progress=lambda total: told.append(total) or told.append,
    )  # fmt: skip
    assert exact.drawn == 5 * 64
    assert 5 < len(exact.scored.texts) < 40
    assert told[0] == 2000
    assert told[-1] == len(exact.scored.texts)
    assert exact.log_z.value == pytest.approx(math.log(told[-1] / exact.drawn), abs=1e-5)


def test_where_nothing_is_accepted_there_is_nothing():
    exact = draw(collector=drawing(np.array([[0, 0, 8, 8]]) / 16), max_draws=1)
    assert (exact.scored.texts, exact.drawn) == ([], 64)  # a batch at least
    assert exact.log_z.value == -math.inf
    assert figures_of_target(exact) == {"log_z": exact.log_z}
    mine = scored(exactly(PI))
    with pytest.raises(ValueError, match="no sample of p: none of 64 draws"):
        measure(mine, exact)


def test_figures_of_the_target_itself():
    exact = exact_of(HARD)
    figures, (p, log_z) = figures_of_target(exact), p_of(HARD)
    assert figures["satisfaction"].value == 1
    assert figures["length"].value == 2  # tokens of an outcome
    assert figures["log_z"].value == log_z
    assert figures["kl_to_base"].value == pytest.approx(-log_z, abs=1e-6)
    some = p[p > 0]
    assert figures["entropy"].value == pytest.approx(-np.sum(some * np.log(some)), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": TARGET}, "largest log P/a that a text can have, got log_bound=None"),
        ({"target": HARD._replace(log_bound=math.inf)}, "got log_bound=inf"),
        ({"target": TILT._replace(log_bound=0.9)}, "log P/a is 1 for the text 'yes'"),
        ({"samples": 0}, "at least 1, got samples=0"),
        ({"max_draws": 0}, "max_draws=0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        draw(**change)


def scored(outcomes, pi=PI, target=HARD):
    """Samples of the policy, and none of the base model beside them."""
    drawn = batch_of(outcomes, pi, A, contexts=False, from_policy=outcomes.size)
    return evaluation.score(collector_of(pi, ALLOW, contexts=False), target, [drawn], outcomes.size)


def exact_of(target, times: int = 60, std_error: float = 0.0) -> Exact:
    """Samples in exact proportion to p, and its true log Z; drawn in vast numbers."""
    p, log_z = p_of(target)
    counts = np.round(times * p).astype(int)
    assert np.allclose(counts, times * p)
    outcomes = np.repeat(np.arange(4), counts)[None]
    rows, _ = scored(outcomes, A, target)
    return Exact(rows, Estimate(log_z, std_error, 1.0), 10**9)


def measure(mine, exact, base=None, target=HARD, pi=PI):
    run = collector_of(pi, ALLOW, contexts=False)
    options = {"divergences": DIVERGENCES, "metrics": NO_METRICS}
    return evaluation.measure(run, None, target, mine, base, exact=exact, **options)


def test_every_figure_is_the_true_one_where_samples_are_in_proportion():
    """From half p, half π, whatever their numbers: 160 of π and 60 of p."""
    exact, (p, log_z) = exact_of(HARD), p_of(HARD)
    found = measure(scored(exactly(PI, times=10)), exact)
    with np.errstate(divide="ignore"):
        logs = jnp.log(jnp.asarray(PI[0])), jnp.log(jnp.asarray(p))
    for name, divergence in DIVERGENCES.items():
        expected = float(exact_divergence(*logs, divergence=divergence))
        assert found.figures[name].value == pytest.approx(expected, abs=1e-5), name
    assert found.figures["log_z"] == Estimate(pytest.approx(log_z), 0.0, 1.0)
    assert found.figures["exact_samples"].value == 60
    assert found.figures["satisfaction"].value == pytest.approx(12 / 16)
    assert found.figures["forward_kl"].ess == 60
    assert next(iter(found.figures)) == "exact_samples"
    assert found.by_context["forward_kl"].value.shape == (1,)


def test_a_policy_that_says_one_hit_alone_is_not_taken_for_the_target():
    """It satisfies the constraint always, and its own samples, with few of the base model, say that
    it is near; samples of p do not."""
    hit = np.array([[0.998, 0.001, 0.0005, 0.0005]])
    mine = scored(np.zeros((1, 64), int), hit)
    few = evaluation.make_base(*scored(np.array([[2, 3, 3, 2]]), A))
    run = collector_of(hit, ALLOW, contexts=False)
    options = {"divergences": DIVERGENCES, "metrics": NO_METRICS}
    fooled = evaluation.measure(run, None, HARD, mine, few, **options).figures["forward_kl"]
    found = measure(mine, exact_of(HARD), few, pi=hit).figures["forward_kl"]
    true = 0.25 * math.log(0.25 / 0.998) + 0.75 * math.log(0.75 / 0.001)
    assert found.value == pytest.approx(true, abs=1e-4)
    assert abs(fooled.value - true) > 4


def test_errors_have_that_of_log_z_in_them():
    """With samples of p in proportion, KL(p‖π) has the error of its terms and that of log Z."""
    mine = scored(exactly(PI))
    without, with_it = (
        measure(mine, exact_of(HARD, std_error=error)).figures for error in (0.0, 0.3)
    )
    for name in ("forward_kl", "jensen_shannon", "total_variation"):
        assert with_it[name].std_error > without[name].std_error, name
    expected = math.hypot(without["forward_kl"].std_error, 0.3)
    assert with_it["forward_kl"].std_error == pytest.approx(expected, rel=1e-5)


def test_samples_of_the_base_model_are_not_scored_where_there_are_some_of_p():
    """They are kept for win rates; what the policy says of them is not asked."""
    asked = []
    run = collector_of(PI, ALLOW, contexts=False)

    def score(params, tokens, where):
        asked.append(len(tokens))
        return run.score(params, tokens, where)

    base = evaluation.make_base(*scored(exactly(A), A))
    run_counted = run._replace(score=score)
    options = {"divergences": DIVERGENCES, "metrics": NO_METRICS, "exact": exact_of(HARD)}
    mine = scored(exactly(PI))
    evaluation.measure(run_counted, None, HARD, mine, base, **options)
    assert sum(asked) == 60  # of p alone, in parts of 5


def test_with_contexts_samples_of_one_p_say_nothing():
    run, drawn = (
        collector_of(POLICY, ALLOWED),
        batch_of(exactly(POLICY), POLICY, BASE, from_policy=48),
    )
    mine = evaluation.score(run, TARGET, [drawn], 48)
    with pytest.raises(ValueError, match="policy's are of 3 contexts, those of p of 1"):
        evaluation.measure(run, None, TARGET, mine, exact=exact_of(HARD), divergences=DIVERGENCES)
