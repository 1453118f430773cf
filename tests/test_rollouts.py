"""What a batch is drawn from, whoever draws it: log q is of the mixture of policy and base model, by the numbers of rows
that there are of either."""

import jax
import numpy as np
import pytest

import fjax
from fjax.rollouts import (
    Contexts,
    Prompts,
    make_collector,
    make_context_draw,
    make_draw,
    to_rollout,
)

from .bigram import (
    BASE,
    END,
    LOG_PROB_FN,
    NEW_TOKENS,
    SAMPLE_FN,
    WORDS,
    collector,
    decode,
    log_probs,
)

POLICY = BASE + np.random.default_rng(1).normal(size=BASE.shape).astype(np.float32)
SCORE = jax.jit(LOG_PROB_FN)


class Outside:
    """Samples by NumPy alone, as an engine outside of JAX would serve them; it remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, params, rng_key, tokens, where, row_ids, *, each):
        self.asked.append((tokens.shape, each, np.asarray(row_ids).tolist()))
        rng = np.random.default_rng([*np.asarray(jax.random.key_data(rng_key)), int(row_ids[0])])
        table = np.exp(np.asarray(params, float))
        table /= table.sum(axis=1, keepdims=True)
        last = np.repeat(np.asarray(tokens)[:, -1], each)
        drawn, log_probs, there = [], [], [np.ones(len(last), bool)]
        for _ in range(NEW_TOKENS):
            new = np.array([rng.choice(WORDS, p=table[token]) for token in last])
            log_probs.append(np.where(there[-1], np.log(table[last, new]), 0.0))
            drawn.append(new)
            there.append(there[-1] & (new != END))
            last = new
        columns = (np.stack(x, axis=1) for x in (drawn, there[:-1], np.float32(log_probs)))
        return fjax.Samples(*columns, finished=~there[-1])


def prompts(*rows: tuple[int, ...]) -> Prompts:
    """Each after the token that starts a text, padded on the left."""
    width = 1 + max(map(len, rows))
    tokens = np.array([[END] * (width - len(row)) + [*row] for row in rows], np.int32)
    where = np.arange(width) >= width - 1 - np.array([[len(row)] for row in rows])
    texts = [" ".join(f"w{token}" for token in row) for row in rows]
    return Prompts(texts, tokens, where, [""] * len(rows))


CONTEXTS = Contexts(prompts((3,), (4, 5), (6,), (7, 8, 9)), prompts((1, 2), (5,)), per_step=2)


def check_against_numpy(batch, policy, share):
    """Every number of a batch, from its tokens alone."""
    log_pi, log_a = (log_probs(table, batch.tokens, batch.where) for table in (policy, BASE))
    assert abs(log_pi - log_a).max() > 0.1  # so that a wrong share would be seen
    mixture = np.log((1 - share) * np.exp(log_pi) + share * np.exp(log_a))
    for found, expected in (
        (batch.log_proposal, log_pi),
        (batch.log_a, log_a),
        (batch.log_q, mixture),
    ):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    rows = zip(np.asarray(batch.tokens), np.asarray(batch.where), strict=True)
    last = [row[keep][-1] == END for row, keep in rows]
    np.testing.assert_array_equal(batch.finished, last)


@pytest.mark.parametrize("of_base", [0, 4])
@pytest.mark.parametrize("sample_fn", [Outside(), SAMPLE_FN], ids=("outside", "fjax"))
def test_log_q_is_of_the_mixture_that_the_batch_was_drawn_from(sample_fn, of_base):
    draw = make_draw(sample_fn, SCORE, BASE, start_id=END, samples=16, base_samples=of_base)
    batch = jax.device_get(draw(POLICY, jax.random.key(0)))
    assert batch.tokens.shape == (16, 1 + NEW_TOKENS)
    assert batch.from_policy == 16 - of_base
    assert batch.contexts is None
    assert not batch.where[:, 0].any()
    check_against_numpy(batch, POLICY, of_base / 16)
    strata = to_rollout(batch, batch.log_a).strata
    assert np.asarray(strata).tolist() == [0] * (16 - of_base) + [1] * of_base


def test_all_texts_continue_one_prompt():
    """None of its tokens counts, and the model has read the last of them."""
    draw = make_draw(SAMPLE_FN, SCORE, BASE, start_id=(END, 4, 2), samples=16, base_samples=4)
    batch = jax.device_get(draw(POLICY, jax.random.key(0)))
    assert batch.tokens.shape == (16, 3 + NEW_TOKENS)
    assert np.asarray(batch.tokens)[:, :3].tolist() == [[END, 4, 2]] * 16
    assert not batch.where[:, :3].any()
    assert batch.where[:, 3].all()
    check_against_numpy(batch, POLICY, 4 / 16)


def test_an_outside_engine_is_asked_for_rows_that_have_numbers_of_their_own():
    """No row of the base model shares its key with one of the policy."""
    engine = Outside()
    draw = make_draw(engine, SCORE, BASE, start_id=END, samples=16, base_samples=4)
    draw(POLICY, jax.random.key(0))
    assert engine.asked == [((12, 1), 1, [*range(12)]), ((4, 1), 1, [*range(12, 16)])]
    engine = Outside()
    draw, _ = make_context_draw(engine, SCORE, BASE, CONTEXTS, samples=16, base_samples=4)
    draw(POLICY, jax.random.key(0))
    assert engine.asked == [((2, 4), 6, [0, 1]), ((2, 4), 2, [6, 7])]


@pytest.mark.parametrize("sample_fn", [Outside(), SAMPLE_FN], ids=("outside", "fjax"))
def test_prompts_are_continued_as_often_each(sample_fn):
    draw, draw_unseen = make_context_draw(
        sample_fn, SCORE, BASE, CONTEXTS, samples=16, base_samples=4
    )
    chosen = set()
    for step in range(8):
        batch = jax.device_get(draw(POLICY, jax.random.key(step)))
        first, second = dict.fromkeys(batch.contexts.tolist())
        chosen |= {first, second}
        assert batch.contexts.tolist() == [first] * 6 + [second] * 6 + [first] * 2 + [second] * 2
    assert chosen == {0, 1, 2, 3}
    check_against_numpy(batch, POLICY, 4 / 16)
    for index in (0, 1):  # there are as many as a batch takes, so every batch is of the same
        unseen = jax.device_get(draw_unseen(index, POLICY, jax.random.key(index)))
        assert sorted({*unseen.contexts.tolist()}) == [0, 1]
    before = unseen.tokens * ~unseen.where
    assert before[0, :3].tolist() == [END, 1, 2]  # contiguous, whatever stood on the left
    assert before[6, :2].tolist() == [END, 5]
    check_against_numpy(unseen, POLICY, 4 / 16)


def test_a_prompt_may_hold_what_ends_a_text():
    """As chat templates have it, twice; what counts is said by where, and no row is over before it
    has begun."""
    chats = prompts((3, END, 4), (END, 5, END, 6))
    contexts = Contexts(chats, chats, per_step=2)
    draw, _ = make_context_draw(SAMPLE_FN, SCORE, BASE, contexts, samples=64, base_samples=8)
    batch = jax.device_get(draw(POLICY, jax.random.key(0)))
    check_against_numpy(batch, POLICY, 8 / 64)
    lengths = batch.where.sum(axis=1)
    assert lengths.min() >= 1
    assert lengths.max() > 2
    first = batch.where.argmax(axis=1)
    assert {*first.tolist()} == {4, 5}  # behind all of the prompt


def test_unseen_prompts_take_turns():
    unseen = prompts((1, 2), (2,), (3,), (4,), (5,))
    contexts = CONTEXTS._replace(unseen=unseen)
    found = collector(samples=16, base_samples=4, contexts=contexts)
    assert found.unseen_batches == 2  # the fifth is left over
    drawn = [found.draw_unseen(i, POLICY, jax.random.key(0)) for i in range(3)]
    ids = [sorted({*np.asarray(batch.contexts).tolist()}) for batch in drawn]
    assert ids == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize("global_z", [False, True])
def test_a_rollout_has_a_row_for_each_prompt(global_z):
    contexts = CONTEXTS._replace(global_z=global_z)
    found = collector(samples=16, base_samples=4, contexts=contexts)
    batch = jax.device_get(found.draw(POLICY, jax.random.key(0)))
    rollout = to_rollout(batch, batch.log_a, contexts=contexts)
    assert rollout.tokens.shape == (2, 8, 4 + NEW_TOKENS)
    assert np.asarray(rollout.strata).tolist() == [[0] * 6 + [1] * 2] * 2
    if global_z:
        assert rollout.contexts is None
    else:
        assert rollout.contexts.tolist() == batch.contexts[[0, 6]].tolist()
    for c, first in enumerate((0, 6)):
        rows = [*range(first, first + 6), *range(12 + 2 * c, 14 + 2 * c)]
        np.testing.assert_array_equal(rollout.tokens[c], batch.tokens[rows])
        np.testing.assert_array_equal(rollout.log_q[c], batch.log_q[rows])
        np.testing.assert_array_equal(rollout.log_score[c], batch.log_a[rows])


@pytest.mark.parametrize(("asked", "taken"), [(0, 0), (1, 2), (3, 4), (6, 6), (7, 8), (15, 14)])
def test_the_base_model_s_share_is_rounded_to_as_many_of_each_prompt(asked, taken):
    """At least one where any are asked for, and one of the policy's at least."""
    found = collector(samples=16, base_samples=asked, contexts=CONTEXTS)
    assert found.samples - found.policy_samples == taken


def test_how_often_z_s_prompts_are_continued():
    assert collector().z_rounds == 0
    assert collector().unseen_batches == 1
    contexts = CONTEXTS._replace(z_samples=33)
    assert collector(samples=16, contexts=contexts).z_rounds == 5  # of 8 samples a prompt
    assert contexts.start == 2  # the shortest prompt, and the token before it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 4, "base_samples": 4}, "less than samples, got 4 of 4"),
        ({"samples": 4, "base_samples": -1}, "at least 0 and less than samples, got -1 of 4"),
        ({"samples": 0, "base_samples": 0}, "got 0 of 0"),
        ({"samples": 9, "contexts": CONTEXTS}, "samples (9) must be a multiple of the 2 prompts"),
        ({"samples": 2, "contexts": CONTEXTS}, "at least twice as many"),
        (
            {"samples": 8, "contexts": CONTEXTS._replace(training=prompts((1,)))},
            "1 prompts to align on, fewer than the 2 of a step",
        ),
        (
            {"samples": 8, "contexts": CONTEXTS._replace(unseen=prompts((1,)))},
            "1 prompts to evaluate on, fewer than the 2 of a step",
        ),
    ],
)
def test_shares_that_do_not_fit_are_refused(options, message):
    given = {"samples": 32, "base_samples": 0} | options
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared as a whole below
        make_collector(SAMPLE_FN, LOG_PROB_FN, BASE, decode, start_id=END, **given)
    assert message in str(error.value)


def test_base_samples_of_each_prompt_are_as_many():
    with pytest.raises(ValueError, match=r"base_samples \(3\) must be a multiple of the 2 prompts"):
        make_context_draw(SAMPLE_FN, SCORE, BASE, CONTEXTS, samples=8, base_samples=3)
