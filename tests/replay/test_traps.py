"""The two traps of reusing samples, summed over all that can be drawn: weights of a mixture whose
proposals were trained on the samples themselves, and rows held out only after they were trained on.

What keeps out of them is exact in the same sums.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, estimators, replay, surrogates
from fjax.training import Rollout
from tests.cases import SPACE, world

ALL = np.arange(7)


def trained_on(log_q, member):
    """A distribution that was moved half the way to a sample: what training on it does."""
    return jnp.logaddexp(log_q, jnp.where(member == ALL, 0.0, -jnp.inf)) - jnp.log(2.0)


def kept(members, log_q, log_score, *, held_out=0.0):
    """A replay with a batch for each row of members."""
    found = None
    for batch, (member, own) in enumerate(zip(members, log_q, strict=True)):
        rollout = Rollout(*(x[member] for x in SPACE), own[member], log_score[member])
        found = replay.init_replay(rollout, 8) if found is None else found
        found = replay.add_to_replay(found, rollout, batch=batch, held_out=held_out)
    return found


def all_tuples(n):
    return np.indices((7,) * n).reshape(n, -1).T


def two_batches(small, estimate, *, mixture):
    """Of a sample each, the second from what was trained on the first: Σ of an estimate from both.

    Each is weighted by its own density, or both by the mixture of the two proposals.
    """

    def of_pair(pair):
        own = jnp.stack([small.log_q, trained_on(small.log_q, pair[0])])
        together = jnp.logaddexp(*own) - jnp.log(2.0)
        found = kept(
            pair[:, None], (together, together) if mixture else own, small.log_p_hard + 0.4
        )
        return jnp.exp(own[0][pair[0]] + own[1][pair[1]]), estimate(found)

    likely, values = jax.jit(jax.vmap(of_pair))(all_tuples(2))
    assert likely.sum() == pytest.approx(1)
    return np.tensordot(likely, values, axes=1)


def z_of(found):
    return jnp.exp(replay.replay_log_z(found, batch_weights=jnp.array([0.5, 0.5])).value)


def test_z_is_exact_with_own_densities_and_far_too_small_with_the_mixture(x64):
    """The later proposal knows which samples were drawn first, and gives them a density that they
    would not have had: their weights shrink. It is the most serious where they are few."""
    small = world()
    exact = np.exp(0.4)
    assert float(two_batches(small, z_of, mixture=False)) == pytest.approx(exact, rel=1e-12)
    assert float(two_batches(small, z_of, mixture=True)) < 0.8 * exact


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "total_variation"])
def test_so_is_the_gradient(name, x64):
    small, f = world(), getattr(divergences, name)()
    options = {"batch_weights": jnp.array([0.5, 0.5]), "log_z": 0.4}
    exact = small.exact_gradient(small.log_p_hard, f)

    def gradient(found):
        """Σ over the rows, by their probability of being drawn again: what a minibatch estimates."""
        likely = replay.draw_probabilities(found, **options)[:2]
        log_u = jnp.log(0.5 / likely)
        log_pi = small.log_prob_fn(small.params, found.tokens[:2], found.where[:2])
        weights = surrogates.score_weights(
            log_pi, found.log_score[:2] - 0.4, found.log_q[:2] - log_u, divergence=f
        )
        scores = jax.jacobian(small.log_prob_fn)(small.params, found.tokens[:2], found.where[:2])
        return jnp.einsum("r,rpv->pv", likely * weights, scores)

    np.testing.assert_allclose(two_batches(small, gradient, mixture=False), exact, atol=1e-10)
    assert abs(two_batches(small, gradient, mixture=True) - exact).max() > 0.02


def by_ess(small, *, adaptive):
    """Two batches of a training and a held-out row each, weighted by what the held-out ones say."""

    def of_rows(rows):
        second = trained_on(small.log_q, rows[0]) if adaptive else small.log_pi
        own = jnp.stack([small.log_q, second])
        found = kept(rows.reshape(2, 2), own, small.log_p_hard + 0.4, held_out=0.5)
        weights = replay.weights_by_ess(found, num_batches=2)
        z = jnp.exp(replay.replay_log_z(found, batch_weights=weights).value)
        return jnp.exp(own[0][rows[:2]].sum() + own[1][rows[2:]].sum()), z, weights[0]

    likely, values, weights = jax.jit(jax.vmap(of_rows))(all_tuples(4))
    assert likely.sum() == pytest.approx(1)
    assert np.ptp(weights) > 0.4
    return float(likely @ values)


def test_weights_by_held_out_rows_are_exact_for_given_proposals(x64):
    assert by_ess(world(), adaptive=False) == pytest.approx(np.exp(0.4), rel=1e-12)


def test_and_nearly_where_a_proposal_was_trained_on_the_batch_before(x64):
    """As `weights_by_ess` says; for a single row, which moved the proposal half the way, 8 %."""
    bias = by_ess(world(), adaptive=True) / np.exp(0.4) - 1
    assert 1e-3 < abs(bias) < 0.1


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_an_estimate_on_rows_that_trained_is_biased_and_on_held_out_ones_it_is_not(name, x64):
    """Of two rows drawn together the first trains the policy and the second was held out. Had the
    part been chosen after the training, either could be the one that is looked at."""
    small, f = world(), getattr(divergences, name)()
    options = {"batch_weights": np.ones(1), "log_z": 0.0}

    def of_pair(pair):
        log_pi = trained_on(small.log_pi, pair[0])
        exact = divergences.exact_divergence(log_pi, small.log_p, divergence=f)
        found = kept(pair[None], small.log_q[None], small.log_p, held_out=0.5)

        def estimate(rows):
            return estimators.estimate_divergence(
                log_pi[pair], small.log_p[pair], small.log_q[pair], divergence=f, where=rows[:2]
            ).value

        likely = jnp.exp(small.log_q[pair].sum())
        return likely, exact, estimate(~found.held_out), estimate(found.held_out)

    likely, exact, trained, unseen = jax.jit(jax.vmap(of_pair))(all_tuples(2))
    exact = float(likely @ exact)
    assert float(likely @ unseen) == pytest.approx(exact, rel=1e-12)
    assert abs(float(likely @ trained) - exact) > 0.1
    # And so it is from the part as a rollout, for a pair of rows.
    found = kept(np.array([[3, 5]]), small.log_q[None], small.log_p, held_out=0.5)
    part = replay.replay_part(found, held_out=True, **options)
    log_pi = trained_on(small.log_pi, 3)[5:6]
    value = estimators.estimate_divergence(log_pi, part.log_score, part.log_q, divergence=f).value
    assert float(value) == pytest.approx(float(unseen[3 * 7 + 5]), rel=1e-12)
