"""Every public import path of fjax, as it was before modules moved (commit 1adb5c1), still works."""

import importlib
import pickle

import jax.numpy as jnp
import pytest

import fjax

# Module -> what its ``__all__`` listed, or without one what it defined.
PATHS = {
    "fjax": (
        "Estimate FDivergence Rollout Samples TrainState Tuner alpha_divergence divergences "
        "effective_sample_size enumeration estimate_divergence estimate_log_z estimators "
        "exact_divergence exponential_family fdpg fit_coefficients forward_kl from_pretrained "
        "jensen_shannon leave_one_out log_probs make_log_prob_fn metrics models pointwise "
        "policy_gradients preferences reverse_kl reward_tilted sample sampling "
        "save_pretrained score_weights sequence_log_probs surrogate_loss surrogates targets "
        "token_log_probs total_variation training"
    ),
    "fjax.divergences": (
        "Elementwise FDivergence alpha_divergence alpha_from_amari alpha_from_cressie_read "
        "alpha_from_f_dpo chi2_mix dual exact_divergence forward_kl from_generator "
        "generalized_jensen_shannon jeffreys jensen_shannon mixture neyman_chi2 pearson_chi2 "
        "reverse_kl squared_hellinger total_variation triangular_discrimination"
    ),
    "fjax.divergences.algebra": "dual from_generator mixture",
    "fjax.divergences.alpha": (
        "alpha_divergence alpha_from_amari alpha_from_cressie_read alpha_from_f_dpo"
    ),
    "fjax.divergences.catalogue": (
        "chi2_mix forward_kl generalized_jensen_shannon inf_from jeffreys jensen_shannon "
        "neyman_chi2 pearson_chi2 reverse_kl squared_hellinger total_variation "
        "triangular_discrimination"
    ),
    "fjax.divergences.core": "FDivergence Options exact_divergence made_once",
    "fjax.enumeration": (
        "Space exact_gradient exact_log_z expected_gradient expected_surrogate_gradient "
        "factorize sequences tabular_log_prob_fn"
    ),
    "fjax.estimators": (
        "Estimate LogMean RunningLogMean effective_sample_size estimate_divergence "
        "estimate_divergence_from_score estimate_entropy estimate_kl_to_base estimate_log_z "
        "estimate_mean init_log_mean log_mean_estimate log_mixture running_log_mean "
        "update_log_mean"
    ),
    "fjax.log_probs": (
        "make_log_prob_fn make_token_log_prob_fn pack sequence_log_probs token_log_probs "
        "where_from_lengths"
    ),
    "fjax.metrics": "Rouge bleu distinct_n rouge self_bleu",
    "fjax.models": (
        "PretrainedModel RewardModel from_pretrained gpt2 load_reward_model save_pretrained "
        "save_reward_model"
    ),
    "fjax.models.gpt2": ("GPT2Config KVCache decode_fn init_cache init_params logits_fn score_fn"),
    "fjax.models.huggingface": (
        "PretrainedModel RewardModel from_pretrained load_reward_model save_pretrained "
        "save_reward_model"
    ),
    "fjax.policy_gradients": (
        "divergence_penalty dr_grpo f_regularized_optimum f_trajectory_balance "
        "group_advantages grpo gspo k1 k2 k3 k_estimator kl_reward_to_go ppo_clip reinforce "
        "rloo trajectory_balance"
    ),
    "fjax.policy_gradients.balance": (
        "f_regularized_optimum f_trajectory_balance trajectory_balance"
    ),
    "fjax.policy_gradients.kl": (
        "divergence_penalty flat_at_one gradient_only k1 k2 k3 k_estimator kl_reward_to_go"
    ),
    "fjax.policy_gradients.losses": ("dr_grpo group_advantages grpo gspo ppo_clip reinforce rloo"),
    "fjax.preferences": "chi_po dpo exo exo_pair f_dpo f_po ipo",
    "fjax.sampling": (
        "RejectionEstimate Samples Transform accept chain draw estimate_rejection greedy "
        "identity log_acceptance sample temperature top_k top_p"
    ),
    "fjax.sampling.categorical": "draw",
    "fjax.sampling.decode": "Samples sample",
    "fjax.sampling.rejection": ("RejectionEstimate accept estimate_rejection log_acceptance"),
    "fjax.sampling.transforms": "Transform chain greedy identity temperature top_k top_p",
    "fjax.surrogates": (
        "Baseline RunningMean centred_weights importance_weights leave_one_out pseudo_rewards "
        "running_mean score_weights self_normalized self_normalized_log_q surrogate_loss"
    ),
    "fjax.targets": (
        "MomentFit exponential_family fit_coefficients pointwise product_of_experts "
        "reward_tilted smoothed"
    ),
    "fjax.testing": "check_divergence",
    "fjax.training": (
        "Checkpoints FanOut JsonlLogger Logger PairBatch PairInfo PairTuner Rollout StepInfo "
        "TensorBoardLogger TrainState Tuner WandbLogger fdpg ppo preference_tuner read_jsonl "
        "rloo"
    ),
    "fjax.training.checkpoint": "Checkpoints",
    "fjax.training.f_dpg": "fdpg",
    "fjax.training.logging": ("FanOut JsonlLogger Logger TensorBoardLogger WandbLogger read_jsonl"),
    "fjax.training.policy_gradient": "TokenLogProbFn ppo rloo",
    "fjax.training.preference": "PairBatch PairInfo PairLoss PairTuner preference_tuner",
    "fjax.training.rollout": "Rollout checked_rollout checked_tokens together",
    "fjax.training.state": "TrainState advance first_state",
}


@pytest.mark.parametrize("path", PATHS)
def test_what_could_be_imported_can_be(path):
    module = importlib.import_module(path)
    missing = [name for name in PATHS[path].split() if not hasattr(module, name)]
    assert not missing


def test_an_old_path_leads_to_the_same_thing():
    """No second class of the same name, which `isinstance` and pickles would tell apart."""
    from fjax.sampling.rejection import accept
    from fjax.targets import MomentFit
    from fjax.training.policy_gradient import ppo
    from fjax.training.preference import PairBatch
    from fjax.training.rollout import Rollout
    from fjax.training.state import TrainState

    assert accept is fjax.rejection.accept is fjax.sampling.accept
    assert MomentFit is fjax.moments.MomentFit
    assert ppo is fjax.training.ppo is fjax.training.ppo_tuner
    assert fjax.training.rloo is fjax.training.rloo_tuner
    assert PairBatch is fjax.training.PairBatch
    assert (Rollout, TrainState) == (fjax.Rollout, fjax.TrainState)
    assert pickle.loads(pickle.dumps(TrainState)) is TrainState


def test_an_old_keyword_is_the_new_one():
    ratio, level, gain = jnp.log(jnp.array([1.5, 0.5])), jnp.zeros(2), jnp.ones(2)
    old = fjax.policy_gradients.ppo_clip(ratio, level, gain, clip=(0.1, 0.3))
    new = fjax.policy_gradients.ppo_clip(ratio, level, gain, clip_ratio=(0.1, 0.3))
    assert old.tolist() == new.tolist()
    with pytest.raises(TypeError, match="clip_ratio"):
        fjax.policy_gradients.ppo_clip(ratio, level, gain, clip=(0.1, 0.3), clip_ratio=(0.1, 0.3))
