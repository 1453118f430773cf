"""What goes into a replay and comes out of it: parts, contexts, room, precision, resuming, and what
is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fjax import divergences, estimators, replay, surrogates
from fjax.training import Checkpoints, Rollout, fdpg
from tests.cases import CASES, SPACE, each_of, refused, world

HALF = np.array([0.5, 0.5])


def rollout(n=6, columns=3, **fields):
    """Rows told apart by their log q."""
    tokens = jnp.ones((n, columns), jnp.int32)
    numbers = -jnp.arange(n, dtype=jnp.float32)
    return Rollout(tokens, tokens > 0, numbers, numbers + 0.5)._replace(**fields)


def of_contexts(c=2, n=4, **fields):
    whole = rollout(c * n)
    rows = [x.reshape(c, n, *x.shape[1:]) for x in whole[:4]]
    return Rollout(*rows, contexts=jnp.arange(c))._replace(**fields)


def filled(*rollouts, capacity=40, held_out=0.25):
    kept = replay.init_replay(rollouts[0], capacity)
    for batch, one in enumerate(rollouts):
        kept = replay.add_to_replay(kept, one, batch=batch, held_out=held_out)
    return kept


def test_rows_are_kept_as_they_came():
    kept = filled(rollout(4), rollout(6))
    assert int(kept.size) == 10
    assert kept.batches.tolist() == [0] * 4 + [1] * 6 + [-1] * 30
    np.testing.assert_array_equal(kept.log_q[:10], -np.r_[np.arange(4), np.arange(6)])
    np.testing.assert_array_equal(kept.log_score[4:10], 0.5 - np.arange(6))
    assert np.isneginf(kept.log_score[10:]).all()
    assert kept.where[:10].all()
    assert not kept.where[10:].any()
    assert kept.contexts is None


@pytest.mark.parametrize(
    ("n", "share", "expected"),
    [(10, 0.1, 1), (10, 0.34, 3), (10, 0.0, 0), (10, 0.01, 1), (3, 0.99, 2)],
)
def test_a_share_is_held_out_at_even_distances(n, share, expected):
    kept = filled(rollout(n), capacity=n, held_out=share)
    rows = np.flatnonzero(kept.held_out)
    assert len(rows) == expected
    if expected > 1:
        assert np.ptp(np.diff(rows)) <= 1
    np.testing.assert_array_equal(kept.log_q, -np.arange(n))  # every row counts alike


def test_each_stratum_of_each_context_gives_its_share():
    strata = jnp.array([[0, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0]])
    kept = filled(of_contexts(2, 6, strata=strata), held_out=0.3)
    held = np.asarray(kept.held_out[:12]).reshape(2, 6)
    for row, whose in zip(held, np.asarray(strata), strict=True):
        assert row[whose == 0].sum() == row[whose == 1].sum() == 1
    assert kept.contexts[:12].tolist() == [0] * 6 + [1] * 6
    # Of the first row 4 and 2, 3 and 1 of them in training: 4/6 = 3u/4, 2/6 = u/4.
    u = np.exp(kept.log_q[:6] - -np.arange(6))
    np.testing.assert_allclose(u[np.asarray(strata[0] == 0) & ~held[0]], 9 / 8, rtol=1e-6)


@each_of(CASES[:4])
def test_contexts_and_strata_have_the_exact_gradient(case, x64):
    """Two contexts in the first batch, one of them twice in the second: over all that can be drawn
    it is Σ_b c_b · mean over its contexts of ∇D_f(π‖p_c)."""
    small, f = world(3), case.divergence
    arguments, likely, found = every_member()
    weights = likely * surrogates.score_weights(*arguments, divergence=f)
    found = np.einsum("mr,mpv->pv", weights, small.scores) / likely.shape[1]
    first, second = (small.exact_gradient(world(seed).log_p, f) for seed in (3, 5))
    expected = 0.3 * (first + second) / 2 + 0.7 * second
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@functools.cache
def every_member():
    """As in test_gradient, where both contexts have a target and a Z of their own."""
    small, log_z = world(3), jnp.array([0.4, -2.0])
    log_p = jnp.stack([world(seed).log_p for seed in (3, 5)])
    parts = jnp.stack([small.log_q, small.log_pi])
    batches = [
        (np.array([0, 1]), np.array([0, 0, 0, 1, 1])),
        (np.array([1, 1]), np.array([0, 0, 1, 1, 1])),
    ]

    @jax.jit
    def of_member(member):
        kept = None
        for batch, (contexts, strata) in enumerate(batches):
            shape = (2, len(strata))
            share = jnp.log(np.bincount(strata) / len(strata))
            log_q = jax.nn.logsumexp(share + parts[:, member])
            log_score = jnp.broadcast_to((log_p[:, member] + log_z)[contexts][:, None], shape)
            tokens, where = (jnp.broadcast_to(x[member], (*shape, 2)) for x in SPACE)
            one = Rollout(
                tokens, where, jnp.full(shape, log_q), log_score, jnp.asarray(contexts),
                jnp.broadcast_to(strata, shape),
            )  # fmt: skip
            kept = replay.init_replay(one, 30) if kept is None else kept
            kept = replay.add_to_replay(kept, one, batch=batch, held_out=0.3)
        return kept

    options = {"batch_weights": np.array([0.3, 0.7]), "log_z": log_z}
    numbers, strata = [], np.concatenate([np.tile(strata, 2) for _, strata in batches])
    for member in range(7):
        kept = of_member(member)
        part = replay.replay_part(kept, held_out=False, **options)
        log_pi = jnp.full(part.log_q.shape, small.log_pi[member])
        numbers.append((log_pi, part.log_score, part.log_q))
    training = np.flatnonzero(~kept.held_out[: len(strata)])
    likely = np.exp(parts[strata[training]]).T
    return [jnp.stack(x) for x in zip(*numbers, strict=True)], likely, kept


def test_z_of_each_context_is_that_of_its_rows(x64):
    """Against sums by hand; that of all rows, of one batch, is `fjax.estimate_log_z`."""
    rng = np.random.default_rng(0)
    scores = [jnp.asarray(rng.normal(size=(2, 4))) for _ in range(2)]
    one = of_contexts(log_q=jnp.zeros((2, 4)), log_score=scores[0])
    two = of_contexts(log_q=jnp.zeros((2, 4)), log_score=scores[1], contexts=jnp.array([1, 1]))
    kept = filled(one, two, held_out=0.25)
    weights = np.array([0.3, 0.7])
    found = jax.jit(functools.partial(replay.replay_log_z, num_contexts=3))(
        kept, batch_weights=weights
    )
    training = np.asarray(~kept.held_out[:16]).reshape(2, 2, 4)
    first, second = (np.exp(x) for x in scores)
    z_0 = first[0][training[0, 0]].mean()
    by_context = 0.3 / 2 * first[1][training[0, 1]].mean() + 0.7 * second[training[1]].mean()
    np.testing.assert_allclose(np.exp(found.value), [z_0, by_context / 0.85, 0], rtol=1e-12)
    assert np.isinf(found.std_error[2])
    alone = filled(rollout(30, log_score=jnp.asarray(rng.normal(size=30))), held_out=0.0)
    estimate = replay.replay_log_z(alone, batch_weights=np.ones(1))
    expected = estimators.estimate_log_z(alone.log_score[:30], alone.log_q[:30])
    for mine, theirs in zip(estimate, expected, strict=True):
        assert float(mine) == pytest.approx(float(theirs), rel=1e-12)


def test_the_standard_error_of_weighted_batches_is_their_spread(x64):
    """Over 4,000 replays, within five standard errors of a standard deviation and 3 % of bias."""
    rng = np.random.default_rng(1)

    @jax.jit
    @jax.vmap
    def of(scores):
        kept = filled(
            *(rollout(40, log_score=x, log_q=0.0 * x) for x in scores), capacity=80, held_out=0.0
        )
        return replay.replay_log_z(kept, batch_weights=np.array([0.2, 0.8]))

    found = of(jnp.asarray(rng.normal(size=(4000, 2, 40)) * 0.5))
    spread = np.exp(found.value).std()
    predicted = np.sqrt(np.mean((np.exp(found.value) * found.std_error) ** 2))
    assert predicted == pytest.approx(spread, rel=5 / np.sqrt(8000) + 0.03)


def test_a_context_without_a_known_z_is_left_out():
    scores = jnp.array([[0.0, 1.0, 2.0, 0.5], [-jnp.inf] * 4])
    kept = filled(of_contexts(log_q=jnp.zeros((2, 4)), log_score=scores), held_out=0.0)
    log_z = replay.replay_log_z(kept, batch_weights=np.ones(1), num_contexts=2).value
    assert np.isneginf(log_z[1])
    options = {"batch_weights": np.ones(1), "log_z": log_z}
    part = replay.replay_part(kept, held_out=False, **options)
    np.testing.assert_allclose(part.log_score, scores[0] - log_z[0], rtol=1e-6)
    np.testing.assert_allclose(part.log_q, 0, atol=1e-6)
    drawn = replay.minibatch(kept, jax.random.key(0), 64, **options)
    assert np.isfinite(drawn.log_score).all()


def test_without_a_z_or_a_row_the_gradient_is_zero():
    small = world()
    rows = Rollout(*SPACE, small.log_q, jnp.full(7, -jnp.inf))
    tuner = fdpg(
        small.log_prob_fn,
        optax.sgd(1.0),
        divergence=divergences.jensen_shannon(),
        log_z=estimators.known_log_z(),
    )
    for kept in (filled(rows, held_out=0.0), replay.init_replay(rows, 9)):
        log_z = replay.replay_log_z(kept, batch_weights=np.ones(1)).value
        assert np.isneginf(log_z)
        drawn = replay.minibatch(kept, jax.random.key(0), 4, batch_weights=np.ones(1), log_z=log_z)
        state, info = jax.jit(tuner.update)(tuner.init(small.params), drawn)
        np.testing.assert_array_equal(state.params, small.params.astype(jnp.float32))
        assert bool(info.finite)


def test_weights_by_ess_are_those_of_the_other_part():
    """By hand: weights 4 and 4 held out of the first batch, 1 and 3 of the second, 0 of the third;
    one more effective sample is shared out by numbers of rows."""
    with np.errstate(divide="ignore"):
        held = [np.log(x) for x in ([4.0, 4.0], [1.0, 3.0], [0.0, 0.0])]
    ones = [
        rollout(4, log_q=jnp.zeros(4), log_score=jnp.array([9.0, h[0], 7.0, h[1]], jnp.float32))
        for h in held
    ]
    kept = filled(*ones, held_out=0.5)
    ess = np.array([2, 16 / 10, 0]) + 1 / 3
    found = replay.weights_by_ess(kept, num_batches=4)
    np.testing.assert_allclose(found, [*ess / ess.sum(), 0], rtol=1e-6)
    swapped = replay.weights_by_ess(
        kept._replace(held_out=~kept.held_out), num_batches=4, held_out=False
    )
    np.testing.assert_allclose(swapped, [*ess / ess.sum(), 0][:4], rtol=1e-2)
    none = kept._replace(log_score=jnp.full(40, -jnp.inf))
    np.testing.assert_allclose(replay.weights_by_ess(none, num_batches=3), [1 / 3] * 3, rtol=1e-6)


def test_nan_is_for_the_caller_to_see():
    kept = filled(rollout(4, log_q=jnp.array([0.0, jnp.nan, 0.0, 0.0])), held_out=0.0)
    assert np.isnan(replay.replay_log_z(kept, batch_weights=np.ones(1)).value)
    drawn = replay.minibatch(kept, jax.random.key(0), 4, batch_weights=np.ones(1), log_z=0.0)
    assert np.isnan(drawn.log_q).all()


def test_within_jit_it_is_the_same_and_says_if_there_was_no_room():
    kept = replay.init_replay(rollout(), 8)
    add = jax.jit(functools.partial(replay.add_to_replay, held_out=0.5))
    compiled = add(kept, rollout(), batch=jnp.array(3))
    jax.tree.map(
        np.testing.assert_array_equal,
        compiled,
        replay.add_to_replay(kept, rollout(), batch=3, held_out=0.5),
    )
    full = add(compiled, rollout(), batch=4)
    assert int(full.size) == 12
    np.testing.assert_array_equal(full.log_q[:6], compiled.log_q[:6])
    assert full.batches.tolist() == [3] * 6 + [4] * 2


def test_a_minibatch_is_of_at_least_float32_and_compiled_once():
    kept = filled(
        rollout(6, log_q=jnp.zeros(6, jnp.bfloat16), log_score=jnp.zeros(6, jnp.bfloat16))
    )
    assert kept.log_q.dtype == jnp.float32
    draw = jax.jit(functools.partial(replay.minibatch, n=5, batch_weights=np.ones(1), log_z=0.0))
    first, again = (draw(kept, jax.random.key(key)) for key in (0, 1))
    assert first.log_q.dtype == first.log_score.dtype == jnp.float32
    assert draw._cache_size() == 1
    assert first.contexts is None
    assert first.tokens.shape == again.tokens.shape == (5, 3)


def test_it_resumes_bit_for_bit(tmp_path):
    """Kept by `Checkpoints` after one batch, then another is added: the same rows and draws."""
    kept = filled(rollout(20))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, kept)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(replay.init_replay(rollout(), 40))

    def go_on(kept):
        kept = replay.add_to_replay(kept, rollout(10), batch=1, held_out=0.25)
        weights = replay.weights_by_ess(kept, num_batches=2)
        log_z = replay.replay_log_z(kept, batch_weights=weights).value
        return kept, replay.minibatch(
            kept, jax.random.key(7), 16, batch_weights=weights, log_z=log_z
        )

    jax.tree.map(np.testing.assert_array_equal, go_on(restored), go_on(kept))


def test_rows_spread_over_devices_are_drawn_alike():
    kept = filled(rollout(20))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.tree.map(lambda x: jax.device_put(x, rows) if x.ndim else x, kept)
    draw = jax.jit(functools.partial(replay.minibatch, n=8, batch_weights=np.ones(1), log_z=0.5))
    expected, found = (draw(x, jax.random.key(0)) for x in (kept, spread))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize("contexts", [False, True])
def test_its_bytes_are_known_beforehand(contexts):
    kept = replay.init_replay(of_contexts() if contexts else rollout(), 50)
    found = replay.replay_bytes(3, 50, contexts=contexts)
    assert found == sum(x.nbytes for x in jax.tree.leaves(kept))


def test_what_is_not_like_the_rows_before_is_refused():
    kept = replay.init_replay(rollout(), 8)
    with refused(r"rows of 3 tokens without contexts, the rollout 4 tokens without contexts"):
        replay.add_to_replay(kept, rollout(columns=4), batch=0)
    with refused(r"rows of 3 tokens without contexts, the rollout 3 tokens with contexts"):
        replay.add_to_replay(kept, of_contexts(), batch=0)
    with refused(r"room for 8 rows and holds 0, so 9 more do not fit.*init_replay\(rollout, 9\)"):
        replay.add_to_replay(kept, rollout(9), batch=0)
    with refused(r"log_q \[5\]"):
        replay.add_to_replay(kept, rollout(log_q=jnp.zeros(5)), batch=0)
    with refused("numbered from 0, got batch=-1"):
        replay.add_to_replay(kept, rollout(), batch=-1)
    with refused("batch must be one number"):
        replay.add_to_replay(kept, rollout(), batch=jnp.zeros(2, int))
    for share in (1.0, -0.1, np.nan):
        with refused(f"from 0 to below 1; got {share}"):
            replay.add_to_replay(kept, rollout(), batch=0, held_out=share)
    with refused(r"held_out=0.1 cannot be taken of a stratum with a single row"):
        strata = jnp.array([0, 0, 0, 0, 0, 1])
        replay.add_to_replay(kept, rollout(strata=strata), batch=0)
    with refused("a stratum with a single row, as stratum 0.* among 1 samples is"):
        replay.add_to_replay(kept, rollout(1), batch=0)
    for capacity in (0, -1, 2.5):
        with refused("capacity must be at least 1"):
            replay.init_replay(rollout(), capacity)


def test_weights_and_normalisers_that_are_none_are_refused():
    kept = filled(rollout(), rollout())
    options = {"batch_weights": HALF, "log_z": 0.0}
    key = jax.random.key(0)
    for weights in ([0.5, -0.5], [np.nan, 1.0], [0.0, 0.0], [np.inf, 1.0]):
        with refused("must be at least 0, finite and not all 0"):
            replay.minibatch(kept, key, 2, batch_weights=np.array(weights), log_z=0.0)
    with refused(r"one number a batch, \[B\]; got shape \[2, 1\]"):
        replay.minibatch(kept, key, 2, batch_weights=HALF[:, None], log_z=0.0)
    with refused("batches up to number 1, so num_batches must be at least 2; got 1"):
        replay.minibatch(kept, key, 2, batch_weights=np.ones(1), log_z=0.0)
    with refused("batches up to number 1"):
        replay.weights_by_ess(kept, num_batches=1)
    with refused("Rows without contexts have one Z, but 3 were asked for"):
        replay.replay_log_z(kept, batch_weights=HALF, num_contexts=3)
    with refused("Rows without contexts have one Z, but 2 were asked for"):
        replay.minibatch(kept, key, 2, batch_weights=HALF, log_z=jnp.zeros(2))
    with refused(r"one number, or one a context, \[K\]; got \[2, 2\]"):
        replay.minibatch(kept, key, 2, batch_weights=HALF, log_z=jnp.zeros((2, 2)))
    for share in (-0.1, 1.5, np.nan):
        with refused(f"share_of_p is a share of the draws, from 0 to 1; got {share}"):
            replay.draw_probabilities(kept, **options, share_of_p=share)
    with refused("n must be at least 1"):
        replay.minibatch(kept, key, 0, **options)
    with refused("contexts up to number 1, so num_contexts must be at least 2; got 1"):
        replay.replay_log_z(filled(of_contexts()), batch_weights=np.ones(1), num_contexts=1)


def test_a_part_without_rows_or_within_jit_is_refused():
    kept = filled(rollout(), held_out=0.0)
    options = {"batch_weights": np.ones(1), "log_z": 0.0}
    with refused("No row of the held-out part counts: the replay has 6 rows, 0 of them held out"):
        replay.replay_part(kept, held_out=True, **options)
    with refused("call it outside jit"):
        jax.jit(lambda x: replay.replay_part(x, held_out=False, **options))(kept)
