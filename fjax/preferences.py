"""Offline preference losses, from log-probabilities of policy and base model on given responses.

Pairs come as ``chosen`` and ``rejected``; u = π/a is a response's ratio to the base model. Every
loss is unreduced, one number a pair (or a list), to be minimised; only the policy's
log-probabilities are differentiated, all else is a constant.

**The guard.** Losses with u or 1/u in them overflow for whole sequences, whose log-ratios reach
hundreds. Beyond log u = ±``max_log_ratio`` (20 by default) they are continued by their tangent in
log u: finite, still increasing, so that a pair keeps its order and a gradient of at most that of
e^20. Where log u enters linearly, as in reverse KL, nothing changes.

Source: Rafailov et al. 2023 (DPO, arXiv 2305.18290); Wang et al. 2024 (f-DPO, arXiv 2309.16240).
"""

import jax
import jax.numpy as jnp

from fjax._checks import is_concrete, made, one_axis, one_number, positive, same_shape
from fjax.divergences import FDivergence, exact_divergence
from fjax.types import Array, Float

__all__ = ["chi_po", "dpo", "exo", "exo_pair", "f_dpo", "f_po", "ipo"]


def dpo(
    chosen_log_pi: Float[Array, "*n"],
    rejected_log_pi: Float[Array, "*n"],
    chosen_log_a: Float[Array, "*n"],
    rejected_log_a: Float[Array, "*n"],
    *,
    beta: float | Float[Array, ""],
) -> Float[Array, "*n"]:
    """-log σ(β log u_chosen - β log u_rejected), the loss of DPO.

    Bradley–Terry on the reward β log π/a that π would be optimal for.

    Args:
        chosen_log_pi: log-probability of the chosen response under the policy, in nats;
            differentiated.
        rejected_log_pi: of the rejected one; differentiated.
        chosen_log_a: of the chosen one under the base model.
        rejected_log_a: of the rejected one.
        beta: β > 0.

    Raises:
        ValueError: if β is not positive, or the shapes differ.

    >>> zero = jnp.zeros(1)
    >>> round(float(dpo(zero, zero, zero, zero, beta=0.1)[0]), 6)  # at π = a: log 2
    0.693147

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    """
    positive(beta=beta)
    chosen_log_u, rejected_log_u = _log_ratios(
        chosen_log_pi, rejected_log_pi, chosen_log_a, rejected_log_a
    )
    margin = chosen_log_u - rejected_log_u
    return -jax.nn.log_sigmoid(beta * margin)


def f_dpo(
    chosen_log_pi: Float[Array, "*n"],
    rejected_log_pi: Float[Array, "*n"],
    chosen_log_a: Float[Array, "*n"],
    rejected_log_a: Float[Array, "*n"],
    *,
    beta: float | Float[Array, ""],
    divergence: FDivergence,
    max_log_ratio: float | Float[Array, ""] = 20.0,
) -> Float[Array, "*n"]:
    """-log σ(β f'(u_chosen) - β f'(u_rejected)): DPO for a penalty D_f(π‖a).

    With reverse KL as the penalty it is DPO.

    Args:
        chosen_log_pi: log-probability of the chosen response under the policy, in nats;
            differentiated.
        rejected_log_pi: of the rejected one; differentiated.
        chosen_log_a: of the chosen one under the base model.
        rejected_log_a: of the rejected one.
        beta: β > 0.
        divergence: which f. f' must be invertible and go to -∞ at 0 (forward and reverse KL,
            Jensen–Shannon, Jeffreys, Neyman, Hellinger, α < 1, χ²-mix).
        max_log_ratio: the guard, see above.

    Raises:
        ValueError: if β is not positive, the shapes differ, or f is not one of these. With f'(0)
            finite, as for Pearson's χ², the optimum gives some responses probability 0, its ratio
            says nothing about their reward, and the normaliser does not cancel; total variation's
            f' has no inverse at all.

    >>> from fjax import forward_kl
    >>> zero = jnp.zeros(1)
    >>> round(float(f_dpo(zero, zero, zero, zero, beta=0.1, divergence=forward_kl())[0]), 6)
    0.693147

    Source: Wang et al. 2024 (arXiv 2309.16240), theorem 2.
    """
    positive(beta=beta)
    _check_admissible(divergence)
    chosen_log_u, rejected_log_u = _log_ratios(
        chosen_log_pi, rejected_log_pi, chosen_log_a, rejected_log_a
    )
    link = _guarded(divergence.derivative, max_log_ratio)
    return -jax.nn.log_sigmoid(beta * (link(chosen_log_u) - link(rejected_log_u)))


def chi_po(
    chosen_log_pi: Float[Array, "*n"],
    rejected_log_pi: Float[Array, "*n"],
    chosen_log_a: Float[Array, "*n"],
    rejected_log_a: Float[Array, "*n"],
    *,
    beta: float | Float[Array, ""],
    max_reward: float | Float[Array, ""] | None = None,
    max_log_ratio: float | Float[Array, ""] = 20.0,
) -> Float[Array, "*n"]:
    """-log σ(clip(β φ(u_chosen) - β φ(u_rejected))) with φ(u) = u + log u.

    DPO that pays for running away from the base.

    Args:
        chosen_log_pi: log-probability of the chosen response under the policy, in nats;
            differentiated.
        rejected_log_pi: of the rejected one; differentiated.
        chosen_log_a: of the chosen one under the base model.
        rejected_log_a: of the rejected one.
        beta: β > 0.
        max_reward: R of the paper, which limits the margin to ±2R; beyond it a pair has no
            gradient. None: no limit.
        max_log_ratio: the guard, see above.

    Raises:
        ValueError: if β or R is not positive, or the shapes differ.

    >>> zero = jnp.zeros(1)
    >>> round(float(chi_po(zero, zero, zero, zero, beta=0.1, max_reward=1.0)[0]), 6)
    0.693147

    Source: Huang et al. 2024 (χPO, arXiv 2407.13399), algorithm 1.
    """
    positive(beta=beta)
    chosen_log_u, rejected_log_u = _log_ratios(
        chosen_log_pi, rejected_log_pi, chosen_log_a, rejected_log_a
    )
    link = _guarded(lambda log_u: jnp.exp(log_u) + log_u, max_log_ratio)
    margin = beta * (link(chosen_log_u) - link(rejected_log_u))
    if max_reward is not None:
        _check_limit(max_reward=max_reward)
        margin = jnp.clip(margin, -2 * max_reward, 2 * max_reward)
    return -jax.nn.log_sigmoid(margin)


def ipo(
    chosen_log_pi: Float[Array, "*n"],
    rejected_log_pi: Float[Array, "*n"],
    chosen_log_a: Float[Array, "*n"],
    rejected_log_a: Float[Array, "*n"],
    *,
    beta: float | Float[Array, ""],
) -> Float[Array, "*n"]:
    """(log u_chosen - log u_rejected - 1/(2β))²: a margin to be met and not to be exceeded.

    Args:
        chosen_log_pi: log-probability of the chosen response under the policy, in nats;
            differentiated.
        rejected_log_pi: of the rejected one; differentiated.
        chosen_log_a: of the chosen one under the base model.
        rejected_log_a: of the rejected one.
        beta: τ of the paper, > 0.

    Raises:
        ValueError: if β is not positive, or the shapes differ.

    >>> zero = jnp.zeros(1)
    >>> ipo(zero, zero, zero, zero, beta=0.5).tolist()
    [1.0]

    Source: Azar et al. 2023 (IPO, arXiv 2310.12036), equation 17.
    """
    positive(beta=beta)
    chosen_log_u, rejected_log_u = _log_ratios(
        chosen_log_pi, rejected_log_pi, chosen_log_a, rejected_log_a
    )
    margin = chosen_log_u - rejected_log_u
    return (margin - 1 / (2 * beta)) ** 2


def f_po(
    log_pi: Float[Array, "K"],
    log_a: Float[Array, "K"],
    rewards: Float[Array, "K"],
    *,
    beta: float | Float[Array, ""],
    reward_beta: float | Float[Array, ""],
    divergence: FDivergence,
) -> Float[Array, ""]:
    """D_f(π̂‖p̂) over the K responses to one prompt. `jax.vmap` gives prompts.

    π̂ = softmax(β log u), p̂ = softmax(r/β_r).

    Args:
        log_pi: log-probabilities of the K responses under the policy, in nats; differentiated.
        log_a: under the base model.
        rewards: of each response.
        beta: β > 0 of the policy's implicit reward.
        reward_beta: β_r > 0, the temperature of the rewards.
        divergence: which f.

    Raises:
        ValueError: if β or β_r is not positive, or the shapes differ.

    >>> from fjax import jensen_shannon
    >>> log_u, rewards = jnp.array([1.0, 0.0]), jnp.array([2.0, 1.0])
    >>> options = {"beta": 1.0, "reward_beta": 1.0, "divergence": jensen_shannon()}
    >>> round(float(f_po(log_u, jnp.zeros(2), rewards, **options)), 6)
    0.0

    Source: Han et al. 2024 (f-PO, arXiv 2410.21662), section 4.
    """
    log_policy, log_target = _policy_and_target(log_pi, log_a, rewards, beta, reward_beta)
    return exact_divergence(log_policy, log_target, divergence=divergence)


def exo(
    log_pi: Float[Array, "K"],
    log_a: Float[Array, "K"],
    rewards: Float[Array, "K"],
    *,
    beta: float | Float[Array, ""],
    reward_beta: float | Float[Array, ""],
) -> Float[Array, ""]:
    """KL(π̂‖p̂) over the K responses to one prompt: `f_po` for reverse KL.

    DPO minimises the forward one.

    Args:
        log_pi: log-probabilities of the K responses under the policy, in nats; differentiated.
        log_a: under the base model.
        rewards: of each response.
        beta: β > 0 of the policy's implicit reward.
        reward_beta: β_r > 0, the temperature of the rewards.

    Raises:
        ValueError: if β or β_r is not positive, or the shapes differ.

    >>> round(float(exo(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), beta=1.0, reward_beta=1.0)), 6)
    0.0

    Source: Ji et al. 2024 (EXO, arXiv 2402.00856), equation 12.
    """
    log_policy, log_target = _policy_and_target(log_pi, log_a, rewards, beta, reward_beta)
    return jnp.sum(jnp.exp(log_policy) * (log_policy - log_target))


def exo_pair(
    chosen_log_pi: Float[Array, "*n"],
    rejected_log_pi: Float[Array, "*n"],
    chosen_log_a: Float[Array, "*n"],
    rejected_log_a: Float[Array, "*n"],
    *,
    beta: float | Float[Array, ""],
    label_smoothing: float | Float[Array, ""] = 1e-3,
) -> Float[Array, "*n"]:
    """EXO of a pair: s log(s/(1-ε)) + (1-s) log((1-s)/ε).

    s = σ(β log u_chosen - β log u_rejected).

    Args:
        chosen_log_pi: log-probability of the chosen response under the policy, in nats;
            differentiated.
        rejected_log_pi: of the rejected one; differentiated.
        chosen_log_a: of the chosen one under the base model.
        rejected_log_a: of the rejected one.
        beta: β > 0.
        label_smoothing: ε between 0 and 1, both excluded: a hard label would make reverse KL
            infinite.

    Raises:
        ValueError: if ε is out of range, β is not positive, or the shapes differ.

    >>> zero = jnp.zeros(1)
    >>> exo_pair(zero, zero, zero, zero, beta=1.0, label_smoothing=0.5).tolist()
    [0.0]

    Source: Ji et al. 2024 (EXO, arXiv 2402.00856), equation 15.
    """
    positive(beta=beta)
    one_number(label_smoothing=label_smoothing)
    if is_concrete(label_smoothing) and not 0 < label_smoothing < 1:
        raise ValueError(
            f"label_smoothing is between 0 and 1, both excluded; got {label_smoothing}."
        )
    chosen_log_u, rejected_log_u = _log_ratios(
        chosen_log_pi, rejected_log_pi, chosen_log_a, rejected_log_a
    )
    margin = beta * (chosen_log_u - rejected_log_u)
    log_s, log_not = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    chosen = jnp.exp(log_s) * (log_s - jnp.log1p(-label_smoothing))
    return chosen + jnp.exp(log_not) * (log_not - jnp.log(label_smoothing))


def _log_ratios(chosen_log_pi, rejected_log_pi, chosen_log_a, rejected_log_a):
    """Log u of both responses, the base model a constant.

    Also where it shares the policy's parameters.
    """
    chosen_log_pi, rejected_log_pi, chosen_log_a, rejected_log_a = same_shape(
        chosen_log_pi=chosen_log_pi,
        rejected_log_pi=rejected_log_pi,
        chosen_log_a=chosen_log_a,
        rejected_log_a=rejected_log_a,
    )
    chosen_log_a, rejected_log_a = jax.lax.stop_gradient((chosen_log_a, rejected_log_a))
    return chosen_log_pi - chosen_log_a, rejected_log_pi - rejected_log_a


def _policy_and_target(log_pi, log_a, rewards, beta, reward_beta):
    """Log π̂ and the constant log p̂ of the K responses to a prompt."""
    positive(beta=beta, reward_beta=reward_beta)
    log_pi, log_a, rewards = one_axis(log_pi=log_pi, log_a=log_a, rewards=rewards)
    log_policy = jax.nn.log_softmax(beta * (log_pi - jax.lax.stop_gradient(log_a)))
    return log_policy, jax.lax.stop_gradient(jax.nn.log_softmax(rewards / reward_beta))


def _guarded(link, limit):
    """The function of log u within ±limit, and its tangent beyond."""
    _check_limit(max_log_ratio=limit)

    def guarded(log_u):
        inside = jnp.clip(log_u, -limit, limit)
        value, slope = jax.jvp(link, (inside,), (jnp.ones_like(inside),))
        # `inside` has no gradient beyond the limit and all of it within; the slope is a constant
        # either way.
        return value + jax.lax.stop_gradient(slope) * (log_u - inside)

    return guarded


def _check_limit(**limits):
    for name, limit in limits.items():
        one_number(**{name: limit})
        if is_concrete(limit) and not limit > 0:
            raise ValueError(f"{name} must be positive, got {limit}.")


def _check_admissible(divergence):
    made(divergence)
    with jax.ensure_compile_time_eval():
        at_zero = divergence.derivative(jnp.asarray(-jnp.inf))
    if not is_concrete(at_zero):  # an α that is annealed
        return
    at_zero = float(at_zero)
    if at_zero != -float("inf"):
        raise ValueError(
            f"f-DPO needs f'(0) = -∞, but that of {divergence.name} is {at_zero:.6g}: its optimum "
            f"gives some responses "
            "probability 0, where the ratio π/a no longer tells the reward, and the normaliser "
            "does not cancel. Admissible are forward and reverse KL, Jensen–Shannon, Jeffreys, "
            "Neyman, Hellinger, α < 1 and χ²-mix."
        )
