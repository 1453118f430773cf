"""DPO, f-DPO, PPO and GRPO against the published formulas, written again in torch; values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, policy_gradients, preferences

torch = pytest.importorskip("torch")

BETA = 0.3


@pytest.fixture
def pairs():
    return np.random.default_rng(0).normal(scale=1.5, size=(4, 32))


def compare(ours, theirs, arrays, x64):
    """Values and gradients by the first array."""
    value, gradient = jax.value_and_grad(lambda x: ours(x, *map(jnp.asarray, arrays[1:])).sum())(jnp.asarray(arrays[0]))
    tensors = [torch.tensor(x, dtype=torch.float64 if x.dtype.kind == "f" else None) for x in arrays]
    tensors[0].requires_grad_()
    total = theirs(*tensors).sum()
    total.backward()
    assert float(value) == pytest.approx(total.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, tensors[0].grad.numpy(), rtol=1e-6, atol=1e-9)


def links():
    return {
        "reverse_kl": (divergences.reverse_kl(), lambda u: torch.log(u) + 1),
        "forward_kl": (divergences.forward_kl(), lambda u: -1 / u),
        "jensen_shannon": (divergences.jensen_shannon(), lambda u: 0.5 * torch.log(2 * u / (1 + u))),
        "alpha": (divergences.alpha_divergence(divergences.alpha_from_f_dpo(0.4)), lambda u: (1 - u**-0.4) / 0.4),
        "hellinger": (divergences.squared_hellinger(), lambda u: 1 - u**-0.5),
        "chi2_mix": (divergences.chi2_mix(), lambda u: u + torch.log(u)),
    }


def test_dpo(pairs, x64):
    def theirs(w, l, aw, al):  # noqa: E741
        return -torch.log(torch.sigmoid(BETA * (w - aw) - BETA * (l - al)))

    compare(lambda *x: preferences.dpo(*x, beta=BETA), theirs, list(pairs), x64)


@pytest.mark.parametrize("kind", links())
def test_f_dpo(pairs, kind, x64):
    divergence, link = links()[kind]

    def theirs(w, l, aw, al):  # noqa: E741
        margin = BETA * link(torch.exp(w - aw)) - BETA * link(torch.exp(l - al))
        return -torch.nn.functional.logsigmoid(margin)

    compare(lambda *x: preferences.f_dpo(*x, beta=BETA, divergence=divergence), theirs, list(pairs), x64)


def test_chi_po(pairs, x64):
    def theirs(w, l, aw, al):  # noqa: E741
        def phi(u):
            return u + torch.log(u)

        margin = BETA * (phi(torch.exp(w - aw)) - phi(torch.exp(l - al)))
        return -torch.nn.functional.logsigmoid(torch.clamp(margin, -2.0, 2.0))

    compare(lambda *x: preferences.chi_po(*x, beta=BETA, max_reward=1.0), theirs, list(pairs), x64)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_ppo(pairs, dual_clip, x64):
    log_pi, log_q, advantages = pairs[0] * 0.3, pairs[1] * 0.3, pairs[2]

    def theirs(log_pi, log_q, advantages):
        ratio = torch.exp(log_pi - log_q)
        gain = torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.3) * advantages)
        if dual_clip is not None:
            gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
        return -gain

    def ours(*x):
        return policy_gradients.ppo_clip(*x, clip=(0.2, 0.3), dual_clip=dual_clip)

    compare(ours, theirs, [log_pi, log_q, advantages], x64)


def group():
    rng = np.random.default_rng(1)
    log_pi = rng.normal(scale=0.3, size=(6, 5)) - 2
    log_q = log_pi + rng.normal(scale=0.2, size=(6, 5))
    where = np.arange(5)[None] < np.array([5, 3, 1, 4, 2, 5])[:, None]
    return log_pi, log_q, rng.normal(size=6), where


def test_grpo(x64):
    log_pi, log_q, rewards, where = group()

    def theirs(log_pi, log_q, rewards, where):
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        ratio = torch.exp(log_pi - log_q)
        a = advantages[:, None]
        token = torch.minimum(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a)
        return -(token * where).sum(1) / where.sum(1)

    def ours(log_pi, log_q, rewards, where):
        return policy_gradients.grpo(log_pi, log_q, rewards, where=where)

    compare(ours, theirs, [log_pi, log_q, rewards, where], x64)


def test_dr_grpo(x64):
    def theirs(log_pi, log_q, rewards, where):
        a, ratio = (rewards - rewards.mean())[:, None], torch.exp(log_pi - log_q)
        return -(torch.minimum(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a) * where).sum(1) / 7

    def ours(log_pi, log_q, rewards, where):
        return policy_gradients.dr_grpo(log_pi, log_q, rewards, where=where, max_tokens=7)

    compare(ours, theirs, list(group()), x64)


def test_gspo(x64):
    def theirs(log_pi, log_q, rewards, where):
        a = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        ratio = torch.exp(((log_pi - log_q) * where).sum(1) / where.sum(1))
        return -torch.minimum(ratio * a, torch.clamp(ratio, 0.9, 1.1) * a)

    def ours(log_pi, log_q, rewards, where):
        return policy_gradients.gspo(log_pi, log_q, rewards, where=where, clip=(0.1, 0.1))

    compare(ours, theirs, list(group()), x64)
