"""The RLHF side: KL(π‖a), its values and gradients, and the usual losses.

An estimator of a *value* and a loss with the right *gradient* are two things. Differentiating k1,
k2 or k3 as a loss gives, on-policy: nothing, ∇KL(π‖a), and ∇KL(a‖π); off-policy, without a ratio,
none of them anything useful. So the k's here are stopped, and `divergence_penalty` is what goes
into a loss (docs/kl_gradients.md has the table).

Losses are unreduced and to be minimised. Log-probabilities named ``token_…`` are ``[N, T]`` with a
mask ``where``; the others are of whole sequences, or of anything else that was sampled: the
functions are elementwise unless they say otherwise.

Source: Schulman 2020 (note on approximating KL); Korbak et al. 2022 (arXiv 2205.11275); Go et al.
2023, section 3.2.
"""

from fjax.policy_gradients.balance import (
    f_regularized_optimum,
    f_trajectory_balance,
    trajectory_balance,
)
from fjax.policy_gradients.kl import divergence_penalty, k1, k2, k3, k_estimator, kl_reward_to_go
from fjax.policy_gradients.losses import (
    dr_grpo,
    group_advantages,
    grpo,
    gspo,
    ppo_clip,
    reinforce,
    rloo,
)

__all__ = [
    "divergence_penalty",
    "dr_grpo",
    "f_regularized_optimum",
    "f_trajectory_balance",
    "group_advantages",
    "grpo",
    "gspo",
    "k1",
    "k2",
    "k3",
    "k_estimator",
    "kl_reward_to_go",
    "ppo_clip",
    "reinforce",
    "rloo",
    "trajectory_balance",
]
