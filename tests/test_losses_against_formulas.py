"""Preference and policy-gradient losses against the published formulas, written again in NumPy;
values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, policy_gradients, preferences

pytestmark = pytest.mark.usefixtures("x64")

BETA = 0.3


@pytest.fixture
def pairs():
    return np.random.default_rng(0).normal(scale=1.5, size=(4, 32))


def compare(ours, theirs, arrays):
    """Values one by one, and the gradient by the first array with central differences of the
    formula, good to 1e-9."""
    np.testing.assert_allclose(
        ours(*map(jnp.asarray, arrays)), theirs(*arrays), rtol=1e-9, atol=1e-12
    )
    gradient = jax.grad(lambda x: ours(x, *map(jnp.asarray, arrays[1:])).sum())(
        jnp.asarray(arrays[0])
    )
    assert abs(gradient).max() > 1e-3
    step = 1e-5
    for index in np.ndindex(arrays[0].shape):
        moved = np.zeros_like(arrays[0])
        moved[index] = step
        above, below = (theirs(arrays[0] + sign * moved, *arrays[1:]).sum() for sign in (1, -1))
        np.testing.assert_allclose(
            gradient[index], (above - below) / (2 * step), rtol=1e-6, atol=1e-8, err_msg=str(index)
        )


def logistic(margin):
    return np.log(1 + np.exp(-margin))


def links():
    return {
        "reverse_kl": (divergences.reverse_kl(), lambda u: np.log(u) + 1),
        "forward_kl": (divergences.forward_kl(), lambda u: -1 / u),
        "jensen_shannon": (divergences.jensen_shannon(), lambda u: 0.5 * np.log(2 * u / (1 + u))),
        "alpha": (
            divergences.alpha_divergence(divergences.alpha_from_f_dpo(0.4)),
            lambda u: (1 - u**-0.4) / 0.4,
        ),
        "hellinger": (divergences.squared_hellinger(), lambda u: 1 - u**-0.5),
        "chi2_mix": (divergences.chi2_mix(), lambda u: u + np.log(u)),
    }


def test_dpo(pairs):
    def theirs(w, l, aw, al):  # noqa: E741
        return logistic(BETA * (w - aw) - BETA * (l - al))

    compare(lambda *x: preferences.dpo(*x, beta=BETA), theirs, list(pairs))


@pytest.mark.parametrize("kind", links())
def test_f_dpo(pairs, kind):
    divergence, link = links()[kind]

    def theirs(w, l, aw, al):  # noqa: E741
        return logistic(BETA * link(np.exp(w - aw)) - BETA * link(np.exp(l - al)))

    compare(lambda *x: preferences.f_dpo(*x, beta=BETA, divergence=divergence), theirs, list(pairs))


@pytest.mark.parametrize("max_reward", [None, 1.0, 0.25])
def test_chi_po(pairs, max_reward):
    def theirs(w, l, aw, al):  # noqa: E741
        def phi(u):
            return u + np.log(u)

        margin = BETA * (phi(np.exp(w - aw)) - phi(np.exp(l - al)))
        return logistic(
            margin if max_reward is None else np.clip(margin, -2 * max_reward, 2 * max_reward)
        )

    compare(
        lambda *x: preferences.chi_po(*x, beta=BETA, max_reward=max_reward),
        theirs,
        list(pairs * 0.5),
    )


def test_ipo(pairs):
    def theirs(w, l, aw, al):  # noqa: E741
        return ((w - aw) - (l - al) - 1 / (2 * BETA)) ** 2

    compare(lambda *x: preferences.ipo(*x, beta=BETA), theirs, list(pairs))


def test_exo_of_a_pair(pairs):
    smoothing = 0.05

    def theirs(w, l, aw, al):  # noqa: E741
        s = 1 / (1 + np.exp(-BETA * ((w - aw) - (l - al))))
        return s * np.log(s / (1 - smoothing)) + (1 - s) * np.log((1 - s) / smoothing)

    compare(
        lambda *x: preferences.exo_pair(*x, beta=BETA, label_smoothing=smoothing),
        theirs,
        list(pairs),
    )


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_exo_of_a_list(pairs):
    def theirs(log_pi, log_a, rewards):
        policy, target = softmax(BETA * (log_pi - log_a)), softmax(rewards / 0.7)
        return (policy * np.log(policy / target)).sum()

    compare(
        lambda *x: preferences.exo(*x, beta=BETA, reward_beta=0.7),
        theirs,
        [4 * x[:8] for x in pairs[:3]],
    )


def test_f_po(pairs):
    """With Jensen–Shannon: ½ KL(π̂‖m) + ½ KL(p̂‖m)."""

    def theirs(log_pi, log_a, rewards):
        policy, target = softmax(BETA * (log_pi - log_a)), softmax(rewards / 0.7)
        middle = (policy + target) / 2
        return 0.5 * (policy * np.log(policy / middle) + target * np.log(target / middle)).sum()

    def ours(*x):
        return preferences.f_po(
            *x, beta=BETA, reward_beta=0.7, divergence=divergences.jensen_shannon()
        )

    compare(ours, theirs, [4 * x[:8] for x in pairs[:3]])


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_ppo(dual_clip):
    """At ratios from 0.37 to 4.5, which every branch has a part of, between the two bounds in
    either order too."""
    log_q = np.random.default_rng(0).normal(size=64)
    log_pi, advantages = log_q + np.tile(np.linspace(-1.0, 1.5, 32), 2), np.repeat([1.5, -0.7], 32)

    def theirs(log_pi, log_q, advantages):
        ratio = np.exp(log_pi - log_q)
        gain = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.3) * advantages)
        if dual_clip is not None:
            gain = np.where(advantages < 0, np.maximum(gain, dual_clip * advantages), gain)
        return -gain

    compare(
        lambda *x: policy_gradients.ppo_clip(*x, clip_ratio=(0.2, 0.3), dual_clip=dual_clip),
        theirs,
        [log_pi, log_q, advantages],
    )


def group():
    rng = np.random.default_rng(1)
    log_pi = rng.normal(scale=0.3, size=(6, 5)) - 2
    log_q = log_pi + rng.normal(scale=0.2, size=(6, 5))
    where = np.arange(5)[None] < np.array([5, 3, 1, 4, 2, 5])[:, None]
    return log_pi, log_q, rng.normal(size=6), where


def scaled(rewards):
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)


def test_grpo():
    def theirs(log_pi, log_q, rewards, where):
        a, ratio = scaled(rewards)[:, None], np.exp(log_pi - log_q)
        return -(np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a) * where).sum(1) / where.sum(1)

    compare(lambda *x: policy_gradients.grpo(*x[:3], where=x[3]), theirs, list(group()))


def test_dr_grpo():
    def theirs(log_pi, log_q, rewards, where):
        a, ratio = (rewards - rewards.mean())[:, None], np.exp(log_pi - log_q)
        return -(np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a) * where).sum(1) / 7

    compare(
        lambda *x: policy_gradients.dr_grpo(*x[:3], where=x[3], max_tokens=7), theirs, list(group())
    )


def test_gspo():
    def theirs(log_pi, log_q, rewards, where):
        a, ratio = scaled(rewards), np.exp(((log_pi - log_q) * where).sum(1) / where.sum(1))
        return -np.minimum(ratio * a, np.clip(ratio, 0.9, 1.1) * a)

    log_pi, log_q, rewards, where = group()
    # so that the mean of some is beyond the clip, and the sum of more
    log_q = log_q - np.linspace(-0.2, 0.2, 6)[:, None]
    compare(
        lambda *x: policy_gradients.gspo(*x[:3], where=x[3], clip_ratio=(0.1, 0.1)),
        theirs,
        [log_pi, log_q, rewards, where],
    )


def test_rloo_and_trajectory_balance():
    _, _, rewards, _ = group()
    log_pi = np.linspace(-3.0, -1.0, 6)

    def by_others(log_pi, rewards):
        return np.array(
            [-(r - np.delete(rewards, i).mean()) * log_pi[i] for i, r in enumerate(rewards)]
        )

    compare(policy_gradients.rloo, by_others, [log_pi, rewards])
    compare(
        lambda *x: policy_gradients.trajectory_balance(*x, 0.7),
        lambda p, s: 0.5 * (0.7 + p - s) ** 2,
        [log_pi, rewards],
    )
