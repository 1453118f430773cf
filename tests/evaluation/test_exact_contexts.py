"""Samples of the p of each context: that they are of it, and figures that rest on them, on three
spaces of four outcomes where all is known."""

import jax
import numpy as np
import pytest

from fjax import evaluation
from fjax.estimators import Estimate
from fjax.evaluation import Exact, draw_exact, figures_of_target
from fjax.runs import RunError
from fjax.runs.exact import read_exact, write_exact

from .test_exact import HARD
from .test_figures import (
    ALLOWED,
    BASE,
    DIVERGENCES,
    NO_METRICS,
    POLICY,
    batch,
    collector,
    exactly,
    rows,
    truth,
)

KNOWN = [0, 1]  # of the third context nothing is allowed


def drawing(each=64):
    """A collector that draws of each context's base model, a quarter of each as the base's share."""
    made = collector(BASE, ALLOWED)

    def draw_unseen(index, params, rng_key):
        assert index == 0  # all are continued by one batch
        keys = jax.random.split(rng_key, 3)
        outcomes = np.stack(
            [
                jax.random.categorical(k, np.log(p), shape=(each,))
                for k, p in zip(keys, BASE, strict=True)
            ]
        )
        drawn = batch(outcomes, BASE, BASE, from_policy=3 * each * 3 // 4)
        of_base = np.tile(np.arange(each) >= each * 3 // 4, 3)
        return rows(drawn, np.argsort(of_base, kind="stable"))

    return made._replace(
        draw_unseen=draw_unseen, samples=3 * each, policy_samples=3 * each * 3 // 4
    )


@pytest.fixture(scope="module")
def drawn() -> Exact:
    return draw_exact(drawing(), None, HARD, jax.random.key(0), 3 * 200, max_draws=192 * 60)


def p_of() -> np.ndarray:
    p = BASE * ALLOWED
    return p[KNOWN] / p[KNOWN].sum(axis=1, keepdims=True)


def in_proportion(times=3) -> Exact:
    """Samples in exact proportion to the p of each, and its true log Z."""
    outcomes = exactly(p_of(), times)
    ids = np.repeat(KNOWN, outcomes.shape[1])
    run = collector(BASE, ALLOWED)
    whole = batch(outcomes, BASE[KNOWN], BASE[KNOWN], from_policy=outcomes.size)
    scored, _ = evaluation.score(run, HARD, [whole], outcomes.size)
    assert scored.contexts.tolist() == ids.tolist()
    with np.errstate(divide="ignore"):
        log_z = np.log((BASE * ALLOWED).sum(axis=1))
    return Exact(scored, Estimate(log_z, np.zeros(3), np.full(3, 1e6)), 10**6)


def test_as_many_of_each_are_of_its_p(drawn):
    """To 4 standard errors; of the third there are none, whatever is drawn, and its Z is unknown."""
    assert drawn.scored.contexts.tolist() == [0] * 200 + [1] * 200
    assert drawn.drawn == 192 * 60  # all that were allowed, for the third
    for row, p in zip(drawn.scored.table(drawn.scored.tokens[:, 0]), p_of(), strict=True):
        rates = np.bincount(row, minlength=4) / 200
        assert (abs(rates - p) <= 4 * np.sqrt(p * (1 - p) / 200)).all()
    log_z = np.log((BASE * ALLOWED).sum(axis=1)[KNOWN])
    found, error = (np.asarray(x) for x in drawn.log_z[:2])
    assert np.isneginf(found[2])
    assert (abs(found[KNOWN] - log_z) < 4 * error[KNOWN]).all()
    assert (error[KNOWN] < 0.1).all()


def test_a_context_with_too_few_is_as_one_with_none():
    """Of 64 draws the first brings some 16, the second some 8, fewer than the 12 that each needs."""
    exact = draw_exact(drawing(), None, HARD, jax.random.key(0), 3 * 12, max_draws=192)
    assert exact.scored.contexts.tolist() == [0] * 12
    assert np.isfinite(exact.log_z.value).tolist() == [True, False, False]


def test_batches_continue_contexts_in_turn():
    """The first alone, then the second; each Z is of its own draws."""

    def draw_unseen(index, params, rng_key):
        outcomes = np.asarray(jax.random.categorical(rng_key, np.log(BASE[index]), shape=(1, 64)))
        drawn = batch(outcomes, BASE[index : index + 1], BASE[index : index + 1], from_policy=64)
        ids = np.full(64, index)
        tokens = np.stack([drawn.tokens[:, 0], ids], axis=1)
        return drawn._replace(tokens=tokens, contexts=ids)

    made = collector(BASE[:2], ALLOWED[:2])
    one = made.contexts._replace(per_step=1)
    made = made._replace(draw_unseen=draw_unseen, contexts=one, samples=64, policy_samples=64)
    exact = draw_exact(made, None, HARD, jax.random.key(0), 200, max_draws=10**5)
    assert exact.scored.contexts.tolist() == [0] * 100 + [1] * 100
    found, error = (np.asarray(x) for x in exact.log_z[:2])
    assert (abs(found - np.log([4 / 16, 2 / 16])) < 4 * error).all()
    assert abs(found[0] - found[1]) > 4 * error.max()


def test_draws_end_when_each_has_enough():
    """Of the first two; the first has 1 in 4, the second 1 in 8."""
    of_two = drawing()
    whole = HARD._replace(
        features=lambda prompts, texts: {
            "satisfaction": np.array([text == "yes" or prompt == "prompt 2" for prompt, text in
                                      zip(prompts, texts, strict=True)], np.float32)
        }
    )  # fmt: skip
    told = []
    few = draw_exact(
        of_two, None, whole, jax.random.key(0), 60, max_draws=10**6,
        progress=lambda total: told.append(total) or told.append,
    )  # fmt: skip
    assert few.scored.contexts.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert 192 <= few.drawn <= 192 * 6
    assert told[0] == told[-1] == 60
    one = draw_exact(of_two, None, whole, jax.random.key(0), 1, max_draws=10**6)
    assert len(one.scored.texts) == 6  # two of each at least


def test_every_figure_is_the_mean_of_true_ones():
    """Over the contexts that have samples; the error is from the spread between them."""
    run = collector(POLICY, ALLOWED)
    mine = batch(exactly(POLICY), POLICY, BASE, from_policy=48)
    scored = evaluation.score(run, HARD, [mine], 48)
    options = {"exact": in_proportion(), "divergences": DIVERGENCES, "metrics": NO_METRICS}
    found = evaluation.measure(run, None, HARD, scored, **options)
    true = truth(POLICY[KNOWN], BASE[KNOWN], ALLOWED[KNOWN])
    for name, each in true.items():
        assert found.figures[name].value == pytest.approx(each.mean(), abs=1e-5), name
    spread = abs(np.diff(true["jensen_shannon"]))[0] / 2
    assert found.figures["jensen_shannon"].std_error == pytest.approx(spread, abs=1e-5)
    assert found.figures["known"].value == pytest.approx(2 / 3)
    assert found.figures["exact_samples"].value == 96
    np.testing.assert_allclose(found.log_z, in_proportion().log_z.value, atol=1e-6)


def test_figures_of_the_targets_themselves():
    figures, p = figures_of_target(in_proportion()), p_of()
    assert figures["satisfaction"].value == 1
    z = (BASE * ALLOWED).sum(axis=1)[KNOWN]
    assert figures["log_z"].value == pytest.approx(np.log(z).mean(), abs=1e-6)
    assert figures["kl_to_base"].value == pytest.approx(-np.log(z).mean(), abs=1e-5)
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=1)
    assert figures["entropy"].value == pytest.approx(entropy.mean(), abs=1e-5)


def test_what_is_kept_is_what_was_drawn(drawn, tmp_path):
    path = tmp_path / "kept.npz"
    write_exact(path, drawn, target="t")
    found = read_exact(path, drawing(), HARD, target="t")
    assert found.scored.prompts == ["prompt 0"] * 200 + ["prompt 1"] * 200
    assert found.scored.texts == drawn.scored.texts
    np.testing.assert_array_equal(found.scored.contexts, drawn.scored.contexts)
    np.testing.assert_allclose(found.log_z, drawn.log_z)
    with pytest.raises(RunError, match="of a target with other prompts"):
        read_exact(path, drawing()._replace(contexts=None), HARD, target="t")
