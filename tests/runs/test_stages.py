"""Stages on a replay: what each draws from and learns from, how it ends, and that it goes on bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fjax
from fjax import replay
from fjax.estimators import known_log_z
from fjax.runs import RunError, align, read_metrics
from fjax.runs.rows import collapse
from fjax.runs.stages import Stage, staged
from tests import bigram

FORWARD, SHANNON = fjax.forward_kl(), fjax.jensen_shannon()


@functools.cache  # what is the same function is not traced again by the next run
def make_tuner(divergence, rate=0.05):
    return fjax.fdpg(
        bigram.LOG_PROB_FN,
        optax.adam(rate),
        divergence=divergence,
        baseline=fjax.surrogates.self_normalized,
        log_z=known_log_z(),
    )


def make_stepper(*stages, rate=0.05, **options):
    given = {"minibatch_size": 16, "updates_per_step": 2, "held_out": 0.25} | options
    draws, key = bigram.collector(), jax.random.key(0)
    return staged(lambda f: make_tuner(f, rate), stages, draws, bigram.TARGET, key, **given)


def walk(stepper, progress=None, begin=0):
    """All steps, with the records and where the run was after each."""
    progress = progress or stepper.begin(bigram.BASE)
    seen = []
    for number in range(begin, stepper.steps):
        if stepper.finished(progress):
            break
        progress, record = stepper.step(progress, number)
        seen.append((record, jax.tree.map(np.array, progress)))  # the next update takes the state
    return seen


def test_a_stage_draws_from_what_the_last_one_led_to_and_keeps_each_density():
    stepper = make_stepper(Stage(FORWARD, 64, 4), Stage(SHANNON, 32, 2))
    seen = walk(stepper)
    assert stepper.steps == len(seen) == 2 + 2 + 1 + 1
    assert [record["stage"] for record, _ in seen] == [1, 1, 1, 1, 2, 2]
    assert [stepper.drawn(progress) for _, progress in seen] == [32, 64, 64, 64, 96, 96]
    end, policy = seen[-1][1].staged.replay, seen[3][1].state.params
    assert np.abs(policy - bigram.BASE).max() > 0.05
    log_a, log_pi = (
        bigram.log_probs(params, end.tokens, end.where) for params in (bigram.BASE, policy)
    )
    mixed = np.logaddexp(log_pi + np.log(28 / 32), log_a + np.log(4 / 32))
    # A quarter of 28 and of 4 is a whole number of rows: log q needs no correction.
    expected = np.where(np.asarray(end.batches) == 0, log_a, mixed)
    np.testing.assert_allclose(end.log_q, expected, rtol=1e-4)
    assert int(end.held_out.sum()) == 24


def test_what_is_going_to_happen_is_said_in_words():
    stepper = make_stepper(Stage(FORWARD, 64, 4), Stage(SHANNON, 32, 2))
    plan = "in 2 stages: 3 draw 32 samples each, 3 learn from all of them"
    assert stepper.plan == plan
    assert make_stepper(Stage(FORWARD, 32, 2)).plan.startswith("in 1 stage: 1 draw")


def test_weights_that_rest_on_little_are_seen_before_they_are_learnt_from():
    """k̂ of P/q of the stage's own rows, those that are held out left out."""
    seen = walk(make_stepper(Stage(FORWARD, 512, 2), Stage(SHANNON, 256, 2)))
    drawn = [(record, to.staged.replay) for record, to in seen if "pareto_k" in record]
    assert [int(rows.size) for _, rows in drawn] == [512, 768]
    for batch, (record, rows) in enumerate(drawn):
        mine = (rows.batches == batch) & ~rows.held_out
        expected = fjax.estimators.pareto_k(jnp.asarray((rows.log_score - rows.log_q)[mine]))
        np.testing.assert_allclose(record["pareto_k"], float(expected), rtol=1e-4)
    assert collapse({"pareto_k": 0.7}) is None
    assert collapse({}) is None
    assert "Pareto k̂ 0.71, above 0.7" in collapse({"pareto_k": 0.71})
    assert "too few of them are above 0" in collapse({"pareto_k": np.inf})


def test_more_samples_than_there_is_memory_for_are_refused_before_one_is_drawn(monkeypatch):
    stepper = make_stepper(Stage(FORWARD, 64, 4))
    columns = stepper.begin(bigram.BASE).staged.replay.tokens.shape[1]
    needed = replay.replay_bytes(columns, 64)
    monkeypatch.setattr("fjax.runs.stages.device_memory", lambda: needed)
    stepper.begin(bigram.BASE)
    monkeypatch.setattr("fjax.runs.stages.device_memory", lambda: needed - 1)
    said = f"64 samples of {columns} tokens are {needed:,} bytes, more than the {needed - 1:,} that"
    with pytest.raises(RunError, match=said):
        stepper.begin(bigram.BASE)


def test_draws_of_which_none_can_be_held_out_are_refused_before_the_first():
    draws, stages = bigram.collector(base_samples=1), [Stage(FORWARD, 64, 4)]
    stepper = staged(make_tuner, stages, draws, bigram.TARGET, jax.random.key(0))
    with pytest.raises(RunError, match=r"two of each in every draw: .* a single row"):
        stepper.begin(bigram.BASE)


def test_updates_leave_the_replay_alone_and_draws_the_policy():
    seen = walk(make_stepper(Stage(FORWARD, 64, 4)))
    policies = [np.asarray(progress.state.params) for _, progress in seen]
    np.testing.assert_array_equal(policies[1], bigram.BASE)
    assert np.abs(policies[2] - bigram.BASE).max() > 0
    for before, after in zip(seen[1][1].staged.replay, seen[3][1].staged.replay, strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_policy_comes_near_the_target():
    """By all sequences there are: KL(p‖π) of the table, from enumeration."""
    stages = Stage(FORWARD, 512, 60), Stage(FORWARD, 512, 60), Stage(SHANNON, 512, 60)
    policy = walk(make_stepper(*stages, minibatch_size=64))[-1][1].state.params
    tokens, where = fjax.enumeration.sequences(bigram.WORDS, 4, eos_id=bigram.END)
    assert divergence(policy, tokens, where) < 0.35 * divergence(bigram.BASE, tokens, where)


def divergence(params, tokens, where) -> float:
    """KL(p‖π) of texts of at most four tokens; the table has no memory, so that these say enough."""
    tokens = np.concatenate([np.zeros((len(tokens), 1), int), tokens], axis=1)
    where = np.concatenate([np.zeros((len(where), 1), bool), where], axis=1)
    log_a, log_pi = (bigram.log_probs(x, tokens, where) for x in (bigram.BASE, params))
    hits = (np.where(where, tokens, 0) == 9).any(axis=1)
    p = np.where(hits, np.exp(log_a), 0)
    p /= p.sum()
    return float(np.sum(p[hits] * (np.log(p[hits]) - log_pi[hits])))


def test_without_patience_the_last_policy_goes_on_and_nothing_is_looked_at():
    seen = walk(make_stepper(Stage(FORWARD, 64, 4)))
    assert not any("held_out" in record for record, _ in seen)


def test_patience_ends_a_stage_and_its_nearest_policy_goes_on():
    """At a rate that throws the policy away: what was there before the updates is nearest."""
    stepper = make_stepper(
        Stage(FORWARD, 256, 40, patience=2), Stage(SHANNON, 32, 2), rate=50.0, look_every=1
    )
    seen = walk(stepper)
    looks = [record["held_out"] for record, _ in seen if "held_out" in record]
    assert len(looks) == 2
    assert [record["stage"] for record, _ in seen] == [1] * 10 + [2, 2]
    np.testing.assert_array_equal(seen[9][1].state.params, bigram.BASE)
    np.testing.assert_array_equal(seen[9][1].proposal, bigram.BASE)


def test_a_policy_that_is_too_far_from_its_proposal_ends_a_stage():
    stage = Stage(FORWARD, 256, 40, max_kl=0.05)
    seen = walk(make_stepper(stage, look_every=1, rate=0.2))
    moved = [record["kl_to_proposal"] for record, _ in seen if "kl_to_proposal" in record]
    assert moved[-1] > 0.05 >= max(moved[:-1], default=0)
    assert len(seen) < make_stepper(stage).steps


def test_the_held_out_figure_is_the_divergence_of_the_held_out_rows():
    """One stage from the base: half of p's weights by hand, Z of the rows that are trained on."""
    stepper = make_stepper(Stage(FORWARD, 256, 4, patience=5), look_every=1)
    record, progress = walk(stepper)[8]  # the first updates
    replay, held = progress.staged.replay, np.asarray(progress.staged.replay.held_out)
    log_weights = np.asarray(replay.log_score - replay.log_q, float)
    log_z = np.log(np.exp(log_weights[~held]).mean())
    log_pi = bigram.log_probs(progress.state.params, replay.tokens, replay.where)
    log_p = np.asarray(replay.log_score, float) - log_z
    hit = held & (log_p > -np.inf)
    weights = np.exp(log_p - np.asarray(replay.log_q, float))
    by_hand = (weights[hit] * (log_p - log_pi)[hit]).sum() / held.sum()
    np.testing.assert_allclose(record["held_out"], by_hand, rtol=1e-4)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    stages = Stage(FORWARD, 64, 6, patience=5), Stage(SHANNON, 64, 4, max_kl=3.0)
    options = {"divergences": {"jensen_shannon": SHANNON}, "eval_every": 3, "eval_samples": 32}
    # The same for all, so that its programs are compiled once.
    given = bigram.model(), bigram.TARGET, make_stepper(*stages), bigram.collector()

    def run(folder, steps=None, **more):
        return align(*given, folder=folder, steps=steps, **options, **more)

    whole = run(tmp_path / "whole")
    for steps in (1, 4, None):  # while drawing, while learning
        result = run(tmp_path / "parts", steps, resume=steps != 1)
    np.testing.assert_array_equal(result.params, whole.params)
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")
    assert read_metrics(tmp_path / "whole")[-1]["samples"] == 128


def kept(folder) -> list[str]:
    """But for the time, and what only the end of a part is evaluated for."""
    return [
        repr({k: v for k, v in record.items() if k != "seconds"})
        for record in read_metrics(folder)
        if record["kind"] == "step"
    ]


def test_no_hit_changes_nothing_until_there_is_one():
    never = bigram.TARGET._replace(log_score=lambda log_a, features: np.full_like(log_a, -np.inf))
    stages = (Stage(FORWARD, 64, 4, patience=1),)
    draws, key = bigram.collector(), jax.random.key(0)
    stepper = staged(make_tuner, stages, draws, never, key, minibatch_size=16)
    record, progress = walk(stepper)[-1]
    np.testing.assert_array_equal(progress.state.params, bigram.BASE)
    assert record["finite"]
    assert jnp.isneginf(walk(stepper)[0][0]["log_z"])


def make_filter(*stages, rng_key=jax.random.key(0), **options):
    """Filtering and fine-tuning: the same stages with two numbers changed."""

    def make(divergence):
        options = {"divergence": divergence, "baseline": 0.0, "log_z": known_log_z()}
        return fjax.fdpg(bigram.LOG_PROB_FN, optax.sgd(0.5), **options)

    draws = bigram.collector(base_samples=0)
    given = make, stages, draws, bigram.TARGET, rng_key
    return staged(*given, share_of_p=1.0, held_out=0.25, **options)


def test_filtering_and_fine_tuning_is_maximum_likelihood_on_hits():
    stepper = make_filter(Stage(FORWARD, 256, 1), minibatch_size=16)
    progress = walk(stepper)[-1][1]
    kept = jax.tree.map(jnp.asarray, progress.staged.replay)
    key = jax.random.fold_in(jax.random.key(0), 8)
    options = {"batch_weights": np.ones(1), "share_of_p": 1.0}
    log_z = replay.replay_log_z(kept, batch_weights=np.ones(1)).value
    drawn = replay.minibatch(kept, jax.random.fold_in(key, 0), 16, **options, log_z=log_z)
    assert ((np.asarray(drawn.tokens) == 9) & np.asarray(drawn.where)).any(axis=1).all()
    loss = jax.grad(lambda x: -bigram.LOG_PROB_FN(x, drawn.tokens, drawn.where).mean())
    moved = bigram.BASE - progress.state.params
    np.testing.assert_allclose(moved, 0.5 * loss(jnp.asarray(bigram.BASE)), atol=1e-5)


def test_and_brings_the_policy_nearer_to_the_target():
    policy = walk(make_filter(Stage(FORWARD, 512, 60, patience=3)))[-1][1].state.params
    tokens, where = fjax.enumeration.sequences(bigram.WORDS, 4, eos_id=bigram.END)
    assert divergence(policy, tokens, where) < 0.7 * divergence(bigram.BASE, tokens, where)


def test_an_f_that_counts_what_is_never_drawn_is_refused():
    with pytest.raises(ValueError, match=r"Stage 1 .* f'\(∞\) = 0.34.*share_of_p=1 draws none"):
        make_filter(Stage(SHANNON, 64, 5))


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ((), "the first one must draw samples"),
        ((Stage(FORWARD, 0, 5),), "the first one must draw samples"),
        ((Stage(FORWARD, 64, 5), Stage(FORWARD, 64, 0)), "Stage 2 has samples=64 and updates=0"),
        ((Stage(FORWARD, 64, 5), Stage(FORWARD, -1, 5)), "Stage 2 has samples=-1"),
    ],
)
def test_stages_that_cannot_be(stages, said):
    with pytest.raises(ValueError, match=said):
        make_stepper(*stages)
