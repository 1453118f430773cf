"""A replay's gradient, summed: over all draws of a minibatch it is that of all rows, and over all
rows that could have been drawn it is ∇D_f(π‖p)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fjax import divergences, replay, surrogates
from fjax.estimators import known_log_z
from fjax.training import Rollout, fdpg
from tests.cases import LOG_PROB_FN, SPACE, each, world

BATCH_WEIGHTS = np.array([0.3, 0.7])
STRATA = np.array([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1]])  # of each batch


def components(small, batch):
    """What the strata of a batch are drawn from: a policy of the time, and another distribution."""
    return jnp.stack([(small.log_q, small.log_pi)[batch], small.log_p])


def log_q_of(small, batch):
    """The density of the batch as a whole, by the numbers of its strata."""
    share = jnp.log(np.bincount(STRATA[batch]) / STRATA[batch].size)
    return jax.nn.logsumexp(share[:, None] + components(small, batch), axis=0)


@jax.jit
def filled(members, log_score):
    """A replay of both batches, with a member of the space in each row."""
    small = world(3)
    kept = None
    for batch, strata in enumerate(STRATA):
        member = members[batch]
        numbers = log_q_of(small, batch)[member], log_score[member]
        rollout = Rollout(*(x[member] for x in SPACE), *numbers, strata=jnp.asarray(strata))
        kept = replay.init_replay(rollout, 20) if kept is None else kept
        kept = replay.add_to_replay(kept, rollout, batch=batch, held_out=0.25)
    return kept


def some_rows(log_score):
    """All members of the space in either batch."""
    return filled(np.tile(np.arange(7), (2, 1)), log_score)


def row_weights(kept, weights=BATCH_WEIGHTS):
    """c_b/n_b of the rows that are trained on, by hand."""
    found = np.zeros(len(kept.batches))
    for batch, weight in enumerate(weights):
        rows = (np.asarray(kept.batches) == batch) & ~np.asarray(kept.held_out)
        found[rows] = weight / rows.sum()
    return found


@functools.partial(jax.jit, static_argnames=("divergence", "baseline"))
def step(params, rollout, baseline_value, *, divergence, baseline=None):
    """The gradient that the tuner descends."""
    tuner = fdpg(
        LOG_PROB_FN,
        optax.sgd(1.0),
        divergence=divergence,
        baseline=baseline_value if baseline is None else baseline,
        log_z=known_log_z(),
    )
    state, info = tuner.update(tuner.init(params), rollout)
    return params - state.params, info


@functools.cache
def every_member():
    """For each member of the space its score weights' arguments where it stands in every row of the
    training part, and how likely it was to be drawn there."""
    small = world(3)
    drawn_from = np.exp(np.concatenate([components(small, b)[STRATA[b]] for b in (0, 1)]))
    numbers = []
    for member in range(7):
        kept = filled(np.full((2, 7), member), small.log_p + 0.4)
        part = replay.replay_part(kept, held_out=False, batch_weights=BATCH_WEIGHTS, log_z=0.4)
        log_pi = jnp.full(part.log_q.shape, small.log_pi[member])
        numbers.append((log_pi, part.log_score, part.log_q))
    training = np.flatnonzero(row_weights(kept))
    return [jnp.stack(x) for x in zip(*numbers, strict=True)], drawn_from[training].T


@each
def test_over_all_rows_that_could_be_drawn_it_is_the_exact_gradient(case, x64):
    """Two proposals, each with a share of another distribution in numbers that the held-out part
    cannot have in proportion: Σ over rows and members of the space."""
    small, f = world(3), case.divergence
    arguments, likely = every_member()
    weights = likely * surrogates.score_weights(*arguments, divergence=f)
    found = np.einsum("mr,mpv->pv", weights, small.scores) / likely.shape[1]
    np.testing.assert_allclose(found, small.exact_gradient(small.log_p, f), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "reverse_kl"])
def test_over_all_draws_of_a_minibatch_it_is_that_of_all_rows(name, x64):
    """Through the tuner, with a number for B. An f comes in through numbers a row only, and that
    each row's are multiplied rightly is shown below."""
    small, f = world(3), getattr(divergences, name)()
    kept = some_rows(small.log_p + 0.4)
    share, options = row_weights(kept), {"batch_weights": BATCH_WEIGHTS, "log_z": 0.4}
    likely = np.asarray(replay.draw_probabilities(kept, **options))
    whole, info = step(
        small.params, replay.replay_part(kept, held_out=False, **options), 0.3, divergence=f
    )
    ones = jax.tree.map(lambda x: x[:, None], folded(kept, likely, share, 0.4))
    ones = jax.tree.map(lambda x: x[np.flatnonzero(share)], ones)
    gradients = jax.vmap(lambda one: step(small.params, one, 0.3, divergence=f)[0])(ones)
    found = np.einsum("r,rpv->pv", likely[share > 0], gradients)
    assert abs(whole).max() > 1e-3
    assert bool(info.finite)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-10)


def folded(kept, likely, share, log_z):
    """Every row as a minibatch should have it."""
    with np.errstate(divide="ignore"):
        log_u = np.log(share) - np.log(np.where(share > 0, likely, 1))
    return Rollout(kept.tokens, kept.where, kept.log_q - log_u, kept.log_score - log_z)


def numbered(kept):
    """With the number of each row in a further column that is not counted."""
    number = jnp.arange(len(kept.batches))[:, None]
    return kept._replace(
        tokens=jnp.concatenate([kept.tokens, number.astype(kept.tokens.dtype)], axis=1),
        where=jnp.concatenate([kept.where, number < 0], axis=1),
    )


def test_a_minibatch_has_the_rows_of_the_training_part_each_with_its_weight(x64):
    """And by the probabilities told, within five standard errors of 40,000 draws."""
    small, n = world(3), 40_000
    kept = numbered(some_rows(small.log_p_hard + 0.4))
    options = {"batch_weights": BATCH_WEIGHTS, "log_z": 0.4}
    drawn = jax.jit(functools.partial(replay.minibatch, n=n, **options))(kept, jax.random.key(0))
    share, likely = row_weights(kept), np.asarray(replay.draw_probabilities(kept, **options))
    assert likely.sum() == pytest.approx(1)
    rows = np.asarray(drawn.tokens[:, -1])
    assert set(rows) == set(np.flatnonzero(share))
    expected = folded(kept, likely, share, 0.4)
    for found, right in zip(drawn[:4], expected[:4], strict=True):
        np.testing.assert_allclose(found, right[rows], rtol=1e-12)
    counts = np.bincount(rows, minlength=len(likely))
    error = np.sqrt(n * likely * (1 - likely))
    assert (abs(counts - n * likely) <= 5 * error).all()


@pytest.mark.parametrize("cap", [np.inf, 2.0, 0.0])
def test_no_weight_is_multiplied_by_more_than_two(cap, x64):
    """u·p/q ≤ S, and where p/q is at most the cap; S = Σ c_b mean(1 + min(p/q, cap)), about 2."""
    small = world(3)
    kept = some_rows(small.log_p_hard)
    options = {"batch_weights": BATCH_WEIGHTS, "log_z": 0.0}
    likely = np.asarray(replay.draw_probabilities(kept, **options, cap=cap))
    share = row_weights(kept)
    ratio = np.exp(kept.log_score - kept.log_q)
    total = np.sum(share * (1 + np.minimum(ratio, cap)))
    rows = share > 0
    u = share[rows] / likely[rows]
    np.testing.assert_allclose(u * (1 + np.minimum(ratio[rows], cap)), total)
    assert (u <= total + 1e-12).all()
    assert (u * np.minimum(ratio[rows], cap) <= total + 1e-12).all()


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_leave_one_out_over_draws_has_the_mean_of_all_rows_for_its_baseline(name, x64):
    """Over all pairs of draws: Σ (c_b/n_b) ρ (f' - B) ∇log π with B = Σ (c_b/n_b) ρ f'."""
    small, f = world(3), getattr(divergences, name)()
    kept = some_rows(small.log_p_hard + 0.4)
    share = row_weights(kept)
    options = {"batch_weights": BATCH_WEIGHTS, "log_z": 0.4}
    likely = np.asarray(replay.draw_probabilities(kept, **options))
    rows = np.flatnonzero(share)
    every = folded(kept, likely, share, 0.4)
    pairs = np.stack(np.meshgrid(rows, rows), axis=-1).reshape(-1, 2)

    def of_pair(pair):
        two = Rollout(*(x[pair] for x in every[:4]))
        return step(small.params, two, 0.0, divergence=f, baseline=surrogates.leave_one_out)[0]

    gradients = jax.jit(jax.vmap(of_pair))(pairs)
    found = np.einsum("n,npv->pv", likely[pairs].prod(axis=1), gradients)
    whole = replay.replay_part(kept, held_out=False, **options)
    log_pi = LOG_PROB_FN(small.params, whole.tokens, whole.where)
    weights = surrogates.score_weights(log_pi, whole.log_score, whole.log_q, divergence=f)
    expected, _ = step(small.params, whole, weights.mean(), divergence=f)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cap", [np.inf, 2.0])
def test_rows_that_p_would_have_drawn_say_all_of_forward_kl(cap, x64):
    """On average over all draws: -Σ (c_b/n_b)(p/q) ∇log π, whatever the cap, with B = 0."""
    small, f = world(3), divergences.forward_kl()
    kept = some_rows(small.log_p_hard + 0.4)
    share, options = row_weights(kept), {"batch_weights": BATCH_WEIGHTS, "log_z": 0.4}
    likely = np.asarray(replay.draw_probabilities(kept, **options, cap=cap, share_of_p=1.0))
    hit = (share > 0) & ~np.isneginf(kept.log_score)
    np.testing.assert_array_equal(likely > 0, hit)
    assert likely.sum() == pytest.approx(1)
    ones = folded(kept, likely, share, 0.4)
    ones = Rollout(*(x[hit][:, None] for x in ones[:4]))
    gradients = jax.vmap(lambda one: step(small.params, one, 0.0, divergence=f)[0])(ones)
    found = np.einsum("r,rpv->pv", likely[hit], gradients)
    whole, _ = step(
        small.params, replay.replay_part(kept, held_out=False, **options), 0.0, divergence=f
    )
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-10)
    weights = jnp.asarray(share[hit] * np.exp(kept.log_score - 0.4 - kept.log_q)[hit])
    by_hand = jax.grad(
        lambda params: -jnp.sum(weights * LOG_PROB_FN(params, kept.tokens[hit], kept.where[hit]))
    )(small.params)
    np.testing.assert_allclose(found, by_hand, rtol=0, atol=1e-10)


def test_with_the_z_of_the_rows_it_is_maximum_likelihood_on_what_is_drawn(x64):
    """Then u·p/q is 1: each row drawn counts alike, and the gradient is that of -mean log π."""
    small = world(3)
    kept = some_rows(small.log_p_hard + 0.4)
    log_z = replay.replay_log_z(kept, batch_weights=BATCH_WEIGHTS).value
    options = {"batch_weights": BATCH_WEIGHTS, "log_z": log_z, "share_of_p": 1.0}
    drawn = replay.minibatch(kept, jax.random.key(0), 5, **options)
    found, _ = step(small.params, drawn, 0.0, divergence=divergences.forward_kl())
    by_hand = jax.grad(lambda params: -LOG_PROB_FN(params, drawn.tokens, drawn.where).mean())
    np.testing.assert_allclose(found, by_hand(small.params), rtol=0, atol=1e-10)


def test_where_p_would_have_drawn_no_row_the_gradient_is_zero(x64):
    small = world(3)
    kept = some_rows(jnp.full(7, -jnp.inf))
    options = {"batch_weights": BATCH_WEIGHTS, "log_z": 0.4, "share_of_p": 1.0}
    assert not np.any(replay.draw_probabilities(kept, **options))
    drawn = replay.minibatch(kept, jax.random.key(0), 5, **options)
    found, info = step(small.params, drawn, 0.0, divergence=divergences.forward_kl())
    assert bool(info.finite)
    assert not np.any(found)
