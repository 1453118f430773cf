"""Only the policy's log-probabilities are differentiated, and what is an option may be traced: for
every loss at once."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, policy_gradients, preferences, targets
from fjax.rejection import accept, estimate_rejection, log_acceptance

# any f with an inverse f'
H2, KL = divergences.squared_hellinger(), divergences.reverse_kl()
N, T = 5, 3


class Call(NamedTuple):
    """A function, its arrays by name, the options that may be traced, and how many arrays it
    differentiates, from the first."""

    function: object
    arrays: tuple[str, ...]
    options: dict[str, object]
    live: int = 1


pair = ("chosen_log_pi", "rejected_log_pi", "chosen_log_a", "rejected_log_a")
listed = ("log_pi", "log_a", "rewards")
tokens = ("token_log_pi", "token_log_q", "rewards")
masked = {"where": jnp.asarray(np.arange(T)[None] < np.array([3, 2, 1, 3, 2])[:, None])}
CALLS = {
    "dpo": Call(preferences.dpo, pair, {"beta": 0.3}, 2),
    "f_dpo": Call(partial(preferences.f_dpo, divergence=H2), pair, {"beta": 0.3, "max_log_ratio": 0.5}, 2),
    "chi_po": Call(preferences.chi_po, pair, {"beta": 0.3, "max_reward": 0.2, "max_log_ratio": 0.5}, 2),
    "ipo": Call(preferences.ipo, pair, {"beta": 0.3}, 2),
    "exo_pair": Call(preferences.exo_pair, pair, {"beta": 0.3, "label_smoothing": 0.1}, 2),
    "exo": Call(preferences.exo, listed, {"beta": 0.3, "reward_beta": 0.7}),
    "f_po": Call(partial(preferences.f_po, divergence=H2), listed, {"beta": 0.3, "reward_beta": 0.7}),
    "k1": Call(policy_gradients.k1, listed[:2], {}, 0),
    "k2": Call(policy_gradients.k2, listed[:2], {}, 0),
    "k3": Call(policy_gradients.k3, listed[:2], {}, 0),
    "k_estimator": Call(partial(policy_gradients.k_estimator, divergence=H2), listed[:2], {}, 0),
    "divergence_penalty": Call(partial(policy_gradients.divergence_penalty, divergence=H2), ("log_pi", "log_a", "log_q"), {}),
    "kl_reward_to_go": Call(partial(policy_gradients.kl_reward_to_go, **masked), ("token_log_pi", "token_log_a"), {}),
    "reinforce": Call(
        lambda log_pi, rewards, scores: policy_gradients.reinforce(log_pi, rewards, baseline=scores),
        ("log_pi", "rewards", "scores"), {},
    ),
    "rloo": Call(policy_gradients.rloo, ("log_pi", "rewards"), {}),
    "group_advantages": Call(policy_gradients.group_advantages, ("rewards",), {"epsilon": 0.1}, 0),
    "ppo_clip": Call(policy_gradients.ppo_clip, ("log_pi", "log_q", "advantages"), {"clip_ratio": (0.1, 0.2), "dual_clip": 1.5}),
    "grpo": Call(partial(policy_gradients.grpo, **masked), tokens, {"clip_ratio": (0.1, 0.2), "epsilon": 0.1}),
    "dr_grpo": Call(partial(policy_gradients.dr_grpo, max_tokens=4, **masked), tokens, {"clip_ratio": (0.1, 0.2)}),
    "gspo": Call(partial(policy_gradients.gspo, **masked), tokens, {"clip_ratio": (0.1, 0.2), "epsilon": 0.1}),
    "trajectory_balance": Call(policy_gradients.trajectory_balance, ("log_pi", "log_score"), {}),
    "trajectory_balance.log_z": Call(policy_gradients.trajectory_balance, ("log_pi", "log_score", "log_z"), {}),
    "f_trajectory_balance": Call(partial(policy_gradients.f_trajectory_balance, divergence=H2), ("log_pi", "log_p"), {}),
    "f_regularized_optimum": Call(
        partial(policy_gradients.f_regularized_optimum, divergence=H2), ("log_a", "rewards"), {"beta": 0.5}, 0
    ),
}  # fmt: skip
TRACED_ONLY = {
    "smoothed": Call(targets.smoothed, ("log_a", "satisfied"), {"epsilon": 0.1}),
    "reward_tilted": Call(targets.reward_tilted, ("log_a", "rewards"), {"beta": 0.5}),
    "log_acceptance": Call(log_acceptance, ("log_score", "log_q"), {"log_beta": 0.5}),
    "accept": Call(partial(accept, jax.random.key(0)), ("log_score", "log_q"), {"log_beta": 0.5}),
    "estimate_rejection": Call(estimate_rejection, ("log_score", "log_q"), {"log_beta": 0.5}),
}


def arrays(names: tuple[str, ...], seed: int = 0) -> list[jax.Array]:
    """Each by its name: the same for the same one."""

    def one(name):
        if name == "satisfied":
            return jnp.arange(N) % 2 == 0
        shape = (N, T) if name.startswith("token") else () if name == "log_z" else (N,)
        return (
            jnp.asarray(
                np.random.default_rng([seed, *name.encode()]).normal(size=shape), jnp.float32
            )
            - 2
        )

    return [one(name) for name in names]


def test_every_loss_has_a_line():
    assert {*policy_gradients.__all__, *preferences.__all__} == {
        name.split(".")[0] for name in CALLS
    }


@pytest.mark.parametrize("name", CALLS)
def test_only_the_policy_is_differentiated(name):
    """The gradient by every other argument is exactly 0, though the value depends on it."""
    call = CALLS[name]
    given = arrays(call.arrays)
    everything = tuple(range(len(given)))
    gradients = jax.grad(lambda *x: call.function(*x, **call.options).sum(), argnums=everything)(
        *given
    )
    for i, gradient in enumerate(gradients):
        assert (abs(gradient).max() > 0) == (i < call.live), call.arrays[i]
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["dpo", "f_dpo", "chi_po", "ipo", "exo_pair", "exo", "f_po"])
def test_a_base_model_of_the_same_parameters_is_a_constant(name):
    """Regression: with log_a from live parameters DPO's gradient was exactly 0."""
    call = CALLS[name]
    given = arrays(call.arrays)
    policy, half = ([0, 1], 2) if call.arrays == pair else ([0], 1)

    def loss(theta, base):
        shifted = list(given)
        for i in policy:
            shifted[i] = theta * given[i]
            shifted[i + half] = base * given[i] - 0.3 * i
        return call.function(*shifted, **call.options | {"beta": 0.05}).sum()

    live = jax.grad(lambda theta: loss(theta, theta))(1.0)
    assert float(live) == pytest.approx(float(jax.grad(loss)(1.0, 1.0)), rel=1e-6)
    assert abs(live) > 1e-4


@pytest.mark.parametrize(
    "name", [name for name, call in {**CALLS, **TRACED_ONLY}.items() if call.options]
)
def test_options_may_be_traced(name):
    """As where β is annealed within one compiled step; the numbers are those of a plain number."""
    call = {**CALLS, **TRACED_ONLY}[name]
    given = arrays(call.arrays)
    fixed = call.function(*given, **call.options)
    traced = jax.jit(lambda options: call.function(*given, **options))(call.options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), fixed, traced)
    batch = jax.tree.map(lambda x: jnp.array([x, 1.5 * x]), call.options)
    several = jax.vmap(lambda options: call.function(*given, **options))(batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-5, atol=1e-6), fixed, several
    )


def test_annealing_does_not_compile_again():
    step = jax.jit(
        chex.assert_max_traces(lambda beta: preferences.dpo(*arrays(pair), beta=beta), n=1)
    )
    for beta in (0.1, 0.2, 0.3):
        step(beta)


def test_f_dpo_of_a_traced_divergence_is_admitted():
    """Whether f'(0) = -∞ cannot be seen while α is traced."""

    def loss(alpha):
        f = KL._replace(derivative=lambda log_t: (1 - jnp.exp(-alpha * log_t)) / alpha)
        return preferences.f_dpo(*arrays(pair), beta=0.1, divergence=f)

    np.testing.assert_allclose(jax.jit(loss)(0.5), loss(0.5), rtol=1e-6)


REFUSED = [
    ("dpo", {"beta": 0.0}), ("ipo", {"beta": -1.0}), ("chi_po", {"max_reward": 0.0}), ("f_dpo", {"max_log_ratio": 0.0}),
    ("exo_pair", {"label_smoothing": 1.0}), ("exo", {"reward_beta": float("nan")}), ("f_po", {"beta": float("inf")}),
    ("ppo_clip", {"clip_ratio": (-0.1, 0.2)}), ("ppo_clip", {"clip_ratio": (0.1, float("nan"))}), ("ppo_clip", {"dual_clip": 1.0}),
    ("grpo", {"epsilon": -1.0}), ("dr_grpo", {"max_tokens": 0}), ("gspo", {"clip_ratio": (8, -8)}), ("smoothed", {"epsilon": 0.0}),
    ("group_advantages", {"epsilon": float("nan")}), ("f_regularized_optimum", {"beta": 0.0}), ("reward_tilted", {"beta": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "option"), REFUSED, ids=[f"{name}-{next(iter(option))}" for name, option in REFUSED]
)
def test_a_number_out_of_range_is_refused_with_its_name(name, option, bare):
    call = {**CALLS, **TRACED_ONLY}[name]
    with pytest.raises(ValueError, match=next(iter(option))):
        call.function(*arrays(call.arrays), **call.options | option)


@pytest.mark.parametrize(
    "name", [name for name, call in {**CALLS, **TRACED_ONLY}.items() if call.options]
)
def test_several_numbers_for_an_option_are_refused(name, bare):
    """Regression: a β of shape [N, 1] made a loss of [N, N]."""
    call = {**CALLS, **TRACED_ONLY}[name]
    for option, value in call.options.items():
        several = (jnp.ones((N, 1)), 0.2) if option == "clip_ratio" else jnp.full((N, 1), value)
        with pytest.raises(ValueError, match=rf"{option} must be one number"):
            call.function(*arrays(call.arrays), **call.options | {option: several})


UNCALLED = {
    "k_estimator": lambda f: policy_gradients.k_estimator(*arrays(listed[:2]), divergence=f),
    "divergence_penalty": lambda f: policy_gradients.divergence_penalty(
        *arrays(listed[:2]), divergence=f
    ),
    "f_trajectory_balance": lambda f: policy_gradients.f_trajectory_balance(
        *arrays(("log_pi", "log_p")), divergence=f
    ),
    "f_regularized_optimum": lambda f: policy_gradients.f_regularized_optimum(
        *arrays(listed[1:]), beta=0.5, divergence=f
    ),
    "f_dpo": lambda f: preferences.f_dpo(*arrays(pair), beta=0.5, divergence=f),
    "f_po": lambda f: preferences.f_po(*arrays(listed), beta=0.5, reward_beta=0.7, divergence=f),
}


@pytest.mark.parametrize("name", UNCALLED)
def test_a_divergence_that_was_not_called_gets_a_sentence(name, bare):
    with pytest.raises(ValueError, match=r"jensen_shannon\(\)"):
        UNCALLED[name](divergences.jensen_shannon)
