"""Ways to take a step: a proposal that adapts, a batch drawn ahead, whose the samples are; and a way of one's own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fjax
from fjax import evaluation
from fjax.rollouts import to_rollout
from fjax.runs import online
from fjax.runs.steps import as_record, proposal_gain, score_batch
from tests.bigram import BASE, TARGET, collector, tuner
from tests.test_rollouts import CONTEXTS


def moved(direction: float):
    """Towards w9 or away from it."""
    return BASE + direction * np.eye(1, len(BASE), 9, dtype=np.float32)


class Of(NamedTuple):
    """How many of a batch's first rows, and of its last, the update takes for the base model's."""

    policy: jax.Array
    base: jax.Array


@pytest.mark.parametrize(
    "flags",
    [{"overlap": True}, {"proposal_every": 10}, {}],
    ids=("overlap", "adaptive", "policy"),
)
def test_every_way_of_drawing_tells_the_update_whose_the_samples_are(flags):
    """A6: the default batch has a fixed number of either, and the leave-one-out baseline is
    unbiased only if it knows."""

    def update(state, rollout):
        return state, Of(rollout.strata[:28].sum(), rollout.strata[28:].sum())

    watched = tuner()._replace(update=update)
    stepper = online(watched, collector(), TARGET, jax.random.key(0), **flags)
    _, record = stepper.step(stepper.begin(BASE), 0)
    assert (record["policy"], record["base"]) == (0, 4)
    assert (stepper.samples, stepper.base_samples, stepper.unit) == (32, 4, "sample")


def test_the_gain_is_of_all_that_was_drawn_since_the_last_look():
    """Self-normalised weights P/q of what was drawn, base samples included, by hand."""
    draws = collector()
    batches = [draws.draw(BASE, jax.random.key(i)) for i in range(2)]
    window = [score_batch(draws, TARGET, batch)[0] for batch in batches]
    weights, gains = [], []
    for batch, log_score in window:
        weights.append(np.exp(np.asarray(log_score) - np.asarray(batch.log_q)))
        log_pi = np.asarray(draws.score(moved(1.0), batch.tokens, batch.where))
        gains.append(log_pi - np.asarray(batch.log_proposal))
    by_hand = np.average(np.concatenate(gains), weights=np.concatenate(weights))
    gain = proposal_gain(draws, moved(1.0), window)
    np.testing.assert_allclose(gain.value, by_hand, rtol=1e-4)


@pytest.mark.parametrize(("direction", "renewed"), [(1.0, True), (-1.0, False)])
def test_a_proposal_is_renewed_only_by_a_policy_that_is_nearer(direction, renewed):
    """p is the base with a word. An update that moves the policy to or from the word, and nothing else."""

    def update(state, _):
        state = state._replace(step=state.step + 1, params=state.params + moved(direction) - BASE)
        return state, fjax.estimators.Estimate(*jnp.zeros(3))

    watched = tuner()._replace(update=update)
    draws = collector(samples=256, base_samples=64)
    stepper = online(watched, draws, TARGET, jax.random.key(0), proposal_every=2)
    progress, first = stepper.step(stepper.begin(BASE), 0)
    np.testing.assert_array_equal(progress.proposal, BASE)
    progress, second = stepper.step(progress, 1)
    assert "proposal_gain" not in first
    assert (second["proposal_gain"] > 0) == renewed
    np.testing.assert_array_equal(progress.proposal, progress.state.params if renewed else BASE)


def test_a_batch_drawn_ahead_is_weighted_for_the_policy_it_came_from():
    """One step back: its log q is of the parameters before, and the update corrects for those of
    now."""
    draws = collector()
    stepper = online(tuner(optax.sgd(1.0)), draws, TARGET, jax.random.key(0), overlap=True)
    progress, apart = stepper.begin(BASE), []
    for number in range(3):
        ahead = progress.ahead
        assert ahead is not None
        old = np.asarray(ahead.log_proposal)  # before the step, which may donate it
        now = draws.score(progress.state.params, ahead.tokens, ahead.where)
        apart.append(float(abs(np.asarray(now) - old).max()))
        progress, record = stepper.step(progress, number)
        assert record["finite"]
    assert apart[0] < 1e-4  # drawn from the very first policy
    assert min(apart[1:]) > 1e-3  # of the policy one step back
    assert record["importance_ess"] < 32 * 0.9999


def test_the_figures_of_a_step_are_numbers_of_the_host():
    draws, algorithm = collector(), tuner()
    batch = draws.draw(BASE, jax.random.key(0))
    drawn, means = score_batch(draws, TARGET, batch)
    _, info = jax.jit(algorithm.update)(algorithm.init(BASE), to_rollout(*drawn))
    record = as_record(info)
    assert {"log_z", "log_z_std_error", "log_z_ess", "loss", "finite"} <= record.keys()
    assert all(np.ndim(value) == 0 for value in record.values())
    texts = draws.decode(batch.tokens, batch.where)
    of_policy = ["w9" in text.split() for text in texts[:28]]
    assert means == {"satisfaction": pytest.approx(np.mean(of_policy))}


@pytest.mark.parametrize("given", [None, [{"answer": i} for i in range(4)]])
def test_a_target_is_asked_with_what_is_given_of_each_rows_prompt(given):
    """Its text where nothing else is, in steps and in evaluations."""
    contexts = CONTEXTS._replace(training=CONTEXTS.training._replace(given=given))
    contexts = contexts._replace(unseen=contexts.training)
    asked = []

    def features(prompts, texts):
        asked.append(list(prompts))
        return TARGET.features(prompts, texts)

    target, run = TARGET._replace(features=features), collector(samples=16, contexts=contexts)
    batch = run.draw(BASE, jax.random.key(0))
    score_batch(run, target, batch)
    known = given or contexts.training.texts
    assert asked[-1] == [known[i] for i in np.asarray(batch.contexts)]
    assert len({*np.asarray(batch.contexts).tolist()}) == 2
    scored, _ = evaluation.score(run, target, [jax.device_get(batch)], batch.from_policy)
    rows = [*np.asarray(batch.contexts)]
    order = sorted(rows[: batch.from_policy]) + sorted(rows[batch.from_policy :])
    assert asked[-1] == [known[i] for i in order]
    assert scored.prompts == [contexts.training.texts[i] for i in order[: batch.from_policy]]
