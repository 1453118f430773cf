"""The space is complete and without repetition, probabilities over it sum to one, expectations are
sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, enumeration
from tests.cases import refused, world


@pytest.mark.parametrize(
    ("vocab_size", "max_tokens", "eos_id"), [(2, 1, 0), (3, 3, 1), (4, 2, 3), (1, 1, 0)]
)
def test_the_space_is_complete(vocab_size, max_tokens, eos_id):
    space = enumeration.sequences(vocab_size, max_tokens, eos_id=eos_id)
    kept = [tuple(row[mask]) for row, mask in zip(*map(np.asarray, space), strict=True)]
    others = vocab_size - 1
    assert (
        len(kept)
        == len(set(kept))
        == sum(others**i for i in range(max_tokens)) + others**max_tokens
    )
    for row in kept:
        assert eos_id not in row[:-1]
        assert row[-1] == eos_id or len(row) == max_tokens
    assert (np.asarray(space.tokens)[~np.asarray(space.where)] == eos_id).all()


def test_a_prompt_is_in_front_and_not_counted():
    plain = enumeration.sequences(3, 2, eos_id=0)
    prompted = enumeration.sequences(3, 2, eos_id=0, prompt=[0, 2])
    assert (prompted.tokens[:, :2] == jnp.array([[0, 2]])).all()
    assert not prompted.where[:, :2].any()
    assert (prompted.tokens[:, 2:] == plain.tokens).all()
    assert (prompted.where[:, 2:] == plain.where).all()


def test_the_tabular_policy_is_the_product_of_its_rows_and_sums_to_one(x64):
    log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 3)
    params = jnp.asarray(np.random.default_rng(0).normal(size=(prefixes, 3)))
    space = enumeration.sequences(3, 3, eos_id=1)
    log_pi = log_prob_fn(params, *space)
    assert float(jnp.exp(log_pi).sum()) == pytest.approx(1, abs=1e-14)
    table = jax.nn.log_softmax(params)
    rows = {
        (): 0,
        (2,): 3,
        (2, 0): 4 + 6,
    }  # after the empty prefix: 3 of one digit, then base-3 numbers of two
    sequence = [2, 0, 1]
    index = space.tokens.tolist().index(sequence)
    expected = sum(table[rows[tuple(sequence[:i])], sequence[i]] for i in range(3))
    assert float(log_pi[index]) == pytest.approx(float(expected), rel=1e-14)


def test_the_score_has_mean_zero_and_only_under_the_policy(x64):
    """E_π[∇log π] = 0, E_q[∇log π] ≠ 0: why a baseline is free on-policy, and off-policy not."""
    small = world()
    arguments = (lambda log_pi, *_: log_pi, *small[:3], small.log_p)
    np.testing.assert_allclose(enumeration.expected_gradient(*arguments), 0, atol=1e-15)
    assert abs(enumeration.expected_gradient(*arguments, small.log_q)).max() > 0.1


def test_tuples_have_their_own_expectation(x64):
    """The mean of separate losses has the expectation of one; a product of two samples has its
    own."""
    small = world()
    arguments = (*small[:3], small.log_p, small.log_q)
    one = enumeration.expected_gradient(lambda log_pi, *_: log_pi, *arguments)
    two = enumeration.expected_gradient(lambda log_pi, *_: log_pi, *arguments, samples=2)
    np.testing.assert_allclose(one, two, atol=1e-14)
    # ∇ E[log π(x) log π(y)] = 2 E[log π] E[∇log π] for independent x and y.
    product = enumeration.expected_gradient(
        lambda log_pi, *_: jnp.broadcast_to(log_pi.prod(), (2,)), *arguments, samples=2
    )
    np.testing.assert_allclose(
        product, 2 * (jnp.exp(small.log_q) * small.log_pi).sum() * one, atol=1e-13
    )


def test_what_is_never_drawn_does_not_matter(x64):
    small = world()
    log_q = small.log_p_hard  # three sequences only
    gradient = enumeration.expected_gradient(
        lambda log_pi, log_p, log_q: log_pi / jnp.exp(log_q), *small[:3], small.log_p, log_q
    )
    drawn = jnp.isfinite(log_q)
    expected = jax.grad(lambda params: small.log_prob_fn(params, *small.space)[drawn].sum())(
        small.params
    )
    np.testing.assert_allclose(gradient, expected, atol=1e-14)


def test_exact_gradient_descends_to_the_target(x64):
    """The table can represent p, so D_f(π‖p) goes to 0."""
    small = world()
    divergence = divergences.jensen_shannon()

    def step(params, _):
        gradient = enumeration.exact_gradient(
            small.log_prob_fn, params, small.space, small.log_p, divergence=divergence
        )
        return params - 4 * gradient, None

    params = jax.lax.scan(step, small.params, length=2000)[0]
    log_pi = small.log_prob_fn(params, *small.space)
    np.testing.assert_allclose(jnp.exp(log_pi), jnp.exp(small.log_p), atol=1e-6)


def test_what_cannot_be_listed_is_refused():
    with refused("too many to list"):
        enumeration.sequences(50257, 3, eos_id=50256)
    with refused("one of the 3 tokens, got 3"):
        enumeration.sequences(3, 2, eos_id=3)
    small = world()
    with refused("8-tuples of 7 sequences"):
        enumeration.expected_gradient(lambda log_pi, *_: log_pi, *small[:3], small.log_p, samples=8)
    with refused(r"table is for 2 tokens, got tokens of shape \[1, 3\]"):
        small.log_prob_fn(small.params, jnp.zeros((1, 3), int), jnp.ones((1, 3), bool))


@pytest.mark.parametrize("depth", [120.0, 1000.0])
def test_a_factorised_target_stays_in_log_space(depth):
    """Regression: a prefix of e^-120 had logits of -inf. Below it everything is known to full
    precision."""
    log_prob_fn, _ = enumeration.tabular_log_prob_fn(3, 2)
    space = enumeration.sequences(3, 2, eos_id=0)
    rare = (space.tokens[:, 0] == 2) & space.where[:, 1]
    log_p = jnp.where(rare, -depth, 0.0) + jnp.arange(7.0) / 4
    log_p = log_p - enumeration.exact_log_z(log_p)
    params = enumeration.factorize(log_p, space, vocab_size=3)
    assert np.isfinite(params).all()
    np.testing.assert_allclose(log_prob_fn(params, *space), log_p, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.nn.softmax(params[2 + 1]), jax.nn.softmax(log_p[rare]), rtol=1e-5
    )
    gradient = jax.grad(
        lambda x: log_prob_fn(enumeration.factorize(x, space, vocab_size=3), *space)[2]
    )(log_p)
    assert np.isfinite(gradient).all()


def test_what_the_target_never_does_stays_impossible():
    log_prob_fn, _ = enumeration.tabular_log_prob_fn(3, 2)
    space = enumeration.sequences(3, 2, eos_id=0)
    log_p = jnp.where(space.tokens[:, 0] == 2, -jnp.inf, -jnp.log(4.0))
    params = enumeration.factorize(log_p, space, vocab_size=3)
    np.testing.assert_allclose(log_prob_fn(params, *space), log_p, atol=1e-6)
    assert params[3].tolist() == [0, 0, 0]
    gradient = jax.grad(lambda x: enumeration.factorize(x, space, vocab_size=3)[0, 0])(log_p)
    assert np.isfinite(gradient).all()


def test_a_table_is_of_one_shape_and_masks_may_be_integers(bare):
    log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 2)
    space = enumeration.sequences(3, 2, eos_id=0)
    for params in (jnp.zeros((prefixes - 1, 3)), jnp.zeros((prefixes, 4))):
        # reads beyond it would be clamped
        with pytest.raises(ValueError, match=r"The table is \[4, 3\]"):
            log_prob_fn(params, *space)
    params = jnp.asarray(np.random.default_rng(0).normal(size=(prefixes, 3)), jnp.bfloat16)
    expected = log_prob_fn(params.astype(jnp.float32), *space)
    padded = jnp.where(space.where, space.tokens, -100)
    found = log_prob_fn(params, padded, space.where.astype(int))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(jax.grad(lambda x: log_prob_fn(x, padded, space.where).sum())(params)).all()


def test_arrays_are_of_the_space_and_losses_one_a_sample(bare):
    small = world()
    arguments = (lambda log_pi, *_: log_pi, *small[:3])
    with pytest.raises(ValueError, match=r"7 members, but log_p the shape \[5\]"):
        enumeration.expected_gradient(*arguments, small.log_p[:5])
    with pytest.raises(ValueError, match=r"log_p and log_q must have one shape"):
        enumeration.expected_gradient(*arguments, small.log_p, small.log_q[:1])
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        enumeration.exact_gradient(
            *small[:3], small.log_p[None], divergence=divergences.forward_kl()
        )
    with pytest.raises(ValueError, match=r"7 members, but log_p the shape \[6\]"):
        enumeration.factorize(small.log_p[:6], small.space, vocab_size=3)
    with pytest.raises(ValueError, match=r"one number a sample, 2 here; got shape \[2, 2\]"):
        enumeration.expected_gradient(
            lambda log_pi, log_p, _: log_pi[:, None] - log_p, *small[:3], small.log_p, samples=2
        )
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        enumeration.expected_gradient(*arguments, small.log_p, samples=0)
