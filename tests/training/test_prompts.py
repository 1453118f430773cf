"""Prompts in their tokens, one of them with an end token inside as chat templates have it: the
expected step is down the mean of exact gradients, summed over all that could be drawn."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fjax import enumeration, jensen_shannon, make_log_prob_fn, reverse_kl
from fjax.estimators import known_log_z
from fjax.log_probs import make_token_log_prob_fn, pack
from fjax.training import Rollout, fdpg, ppo_tuner, rloo_tuner
from tests.bigram import logits_fn

END = 0
DESCENT = optax.sgd(1.0)
PROMPTS = np.array([[END, END, END, 1], [END, 1, END, 2]])
WHERE = np.array([[False, False, True, True], [True] * 4])
LOG_PROB_FN = make_log_prob_fn(logits_fn, start=2)
TOKEN_LOG_PROB_FN = make_token_log_prob_fn(logits_fn, start=2)


@pytest.fixture
def worlds(x64):
    """Parameters; all seven completions of each prompt, packed; log p of each, by prompt."""
    rng = np.random.default_rng(0)
    params = jnp.array(rng.normal(size=(3, 3)))
    tokens, where = enumeration.sequences(3, 2, eos_id=END)
    each = len(tokens)
    packed = [
        pack(
            jnp.tile(prompt, (each, 1)),
            tokens,
            prompt_where=jnp.tile(real, (each, 1)),
            where=where,
        )
        for prompt, real in zip(PROMPTS, WHERE, strict=True)
    ]
    space = [jnp.stack(parts) for parts in zip(*packed, strict=True)]
    log_score = LOG_PROB_FN(params, *map(_flat, space)).reshape(2, each)
    log_score = log_score + rng.normal(size=(2, each))
    return params, space, log_score - jax.nn.logsumexp(log_score, axis=1, keepdims=True)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def exact_gradient(worlds, divergence):
    """Of the mean over prompts of D_f(π(·|x)‖p(·|x))."""
    params, space, log_p = worlds
    grads = [
        enumeration.exact_gradient(
            *(LOG_PROB_FN, params, enumeration.Space(space[0][c], space[1][c]), log_p[c]),
            divergence=divergence,
        )
        for c in (0, 1)
    ]
    return (grads[0] + grads[1]) / 2


def rollouts(worlds):
    """Every pair of samples of the one prompt with every pair of the other, and its probability."""
    params, (tokens, where), log_p = worlds
    log_pi = LOG_PROB_FN(params, _flat(tokens), _flat(where)).reshape(log_p.shape)
    drawn = np.array([*itertools.product(range(7), repeat=4)]).reshape(-1, 2, 2)
    rows = np.arange(2)[:, None], drawn
    found = Rollout(
        tokens[rows],
        where[rows],
        log_pi[rows],
        log_p[rows],
        jnp.tile(jnp.array([4, 1]), (len(drawn), 1)),
    )
    return found, jnp.exp(log_pi[rows].sum((1, 2)))


def moves(tuner, worlds, some):
    state = tuner.init(worlds[0])
    step = lambda rollout: worlds[0] - tuner.update(state, rollout)[0].params  # noqa: E731
    return jax.jit(jax.vmap(step))(some)


@pytest.mark.parametrize("name", ["rloo", "reverse_kl", "jensen_shannon"])
def test_the_expected_step_is_down_the_mean_of_exact_gradients(name, worlds):
    divergence = jensen_shannon() if name == "jensen_shannon" else reverse_kl()
    make = rloo_tuner
    if name != "rloo":
        make = partial(fdpg, divergence=divergence, log_z=known_log_z())
    tuner = make(LOG_PROB_FN, DESCENT, num_contexts=6)
    some, probability = rollouts(worlds)
    np.testing.assert_allclose(probability.sum(), 1, atol=1e-12)
    expected = jnp.einsum("s,sij->ij", probability, moves(tuner, worlds, some))
    np.testing.assert_allclose(expected, exact_gradient(worlds, divergence), atol=1e-12)


def test_ppo_begins_in_the_direction_of_rloo_with_baselines_of_each_prompt(worlds):
    """And in size, but for the spread of the advantages of all samples together."""
    some, _ = rollouts(worlds)
    some = jax.tree.map(lambda x: x[50::400], some)
    options = {"num_contexts": 6}
    first = ppo_tuner(TOKEN_LOG_PROB_FN, DESCENT, epochs=1, minibatches=1, **options)
    rewards = some.log_score - some.log_q
    advantages = rewards - rewards[..., ::-1]  # the other sample of the same prompt
    spread = jnp.std(advantages, axis=(1, 2))[:, None, None]
    expected = moves(rloo_tuner(LOG_PROB_FN, DESCENT, **options), worlds, some)
    assert abs(expected).max() > 0.1
    np.testing.assert_allclose(moves(first, worlds, some) * spread, expected, atol=2e-5)
