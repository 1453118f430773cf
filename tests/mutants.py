"""What `tests/mutate.py` breaks: mathematics, sampler, tuners and rollouts, each with the tests
that must notice."""

from tests.mutant import Mutant
from tests.mutant import of as _of
from tests.mutants_of_hosts import OF_HOSTS

MUTANTS: tuple[Mutant, ...] = (
    *_of(
        "fjax/divergences/catalogue.py",
        "tests/test_divergences.py tests/test_contracts.py",
        (
            "reverse KL's f' without its constant",
            "derivative=lambda log_t: log_t + 1,",
            "derivative=lambda log_t: log_t,",
        ),
        (
            "total variation not halved",
            "derivative=lambda log_t: 0.5 * jnp.sign(log_t)",
            "derivative=lambda log_t: jnp.sign(log_t)",
        ),
        (
            "Pearson's f' without its 2",
            "derivative=lambda log_t: 2 * jnp.expm1(log_t)",
            "derivative=lambda log_t: jnp.expm1(log_t)",
        ),
        (
            "Hellinger's √t is t",
            "derivative=lambda log_t: -jnp.expm1(-log_t / 2)",
            "derivative=lambda log_t: -jnp.expm1(-log_t)",
        ),
        (
            "skewed Jensen–Shannon, weights exchanged",
            "(log_weight, log_rest - log_t)",
            "(log_rest, log_weight - log_t)",
        ),
    ),
    *_of(
        "fjax/surrogates.py",
        "tests/laws/test_expected_gradient.py tests/test_surrogates.py",
        (
            "a weight of 0 times -inf",
            "weights * jnp.where(weights == 0, 0.0, log_pi)",
            "weights * log_pi",
        ),
        ("off-policy baseline without π/q", "value = weighted(value, log_pi - log_q)", "pass"),
        (
            "a stratum of one has a baseline",
            "several = jnp.maximum(sizes.sum(), 1), sizes > 1",
            "several = jnp.maximum(sizes.sum(), 1), sizes > 0",
        ),
        (
            "leave-one-out divides by n",
            "/ jnp.maximum(own_size - 1, 1)",
            "/ jnp.maximum(own_size, 1)",
        ),
    ),
    *_of(
        "fjax/_numerics.py",
        "tests/test_estimators.py tests/test_numerics.py",
        ("standard error with n for n - 1", "squares.sum() / (n - 1) / n", "squares.sum() / n / n"),
    ),
    *_of(
        "fjax/estimators/divergence.py",
        "tests/test_estimators.py",
        ("error of D_f forgets that of Z", "terms + slope * (jnp.exp(log_p - log_q) - 1)", "terms"),
        (
            "the policy is the worse proposal",
            "log_pi - log_proposal, log_score - log_q",
            "log_proposal - log_pi, log_score - log_q",
        ),
    ),
    *_of(
        "fjax/estimators/contexts.py",
        "tests/test_estimates_over_contexts.py",
        ("a ratio has the error of its numerator", "top - value * bottom", "top"),
        ("ties count whole", "0.5 * (mine[:, :, None] ==", "1.0 * (mine[:, :, None] =="),
        (
            "unknown contexts count",
            "value[~np.isnan(value) & ~np.isneginf(value)]",
            "np.nan_to_num(value, neginf=0.0)",
        ),
    ),
    *_of(
        "fjax/estimators/tail.py",
        "tests/test_pareto_k.py",
        ("one weight, rounded apart, is a tail", " & ~(same & (same.sum() >= _FEWEST))", ""),
        ("one weight of two is none", "same.sum() >= _FEWEST", "same.sum() >= 1"),
    ),
    *_of(
        "fjax/estimators/means.py",
        "tests/test_estimators.py",
        (
            "error of a weighted mean without its correction",
            "/ (1 - 1 / jnp.maximum(ess, 1))",
            "",
        ),
        (
            "shares of a mixture exchanged",
            "for share in (1 - base_fraction, base_fraction)",
            "for share in (base_fraction, 1 - base_fraction)",
        ),
    ),
    *_of(
        "fjax/moments.py",
        "tests/test_targets.py tests/test_catalogue_gradients.py",
        (
            "log Z of a fit without λ·μ̄",
            "log_z=log_tilted + dot(soft, moments)",
            "log_z=log_tilted",
        ),
        ("a ridge of 1e-2", "return 1e-9 if dtype == jnp.float64 else 1e-5", "return 1e-2"),
    ),
    *_of(
        "fjax/targets.py",
        "tests/test_targets.py tests/test_catalogue_gradients.py",
        ("reward times β", "log_a + rewards / beta", "log_a + rewards * beta"),
    ),
    *_of(
        "fjax/policy_gradients/losses.py",
        "tests/test_policy_gradients.py tests/test_losses_against_formulas.py",
        (
            "PPO's bounds exchanged",
            "1 - clip_ratio[0], 1 + clip_ratio[1]",
            "1 - clip_ratio[1], 1 + clip_ratio[0]",
        ),
        (
            "GSPO's sum for the mean",
            "mean = (token_log_pi - token_log_q).sum(axis=1) / jnp.maximum(where.sum(axis=1), 1)",
            "mean = (token_log_pi - token_log_q).sum(axis=1)",
        ),
    ),
    *_of(
        "fjax/preferences.py",
        "tests/test_preferences.py tests/test_losses_against_formulas.py",
        ("χPO clips at R", "-2 * max_reward, 2 * max_reward", "-max_reward, max_reward"),
    ),
    *_of(
        "fjax/rejection.py",
        "tests/test_rejection.py",
        (
            "three times the error of the acceptance rate",
            "acceptance = Estimate(value, error,",
            "acceptance = Estimate(value, 3 * error,",
        ),
        (
            "β of one proposal more",
            "possible & (accepted < wanted)",
            "possible & (accepted < wanted + 1)",
        ),
        (
            "the bound forgets the error of log Z",
            "jnp.hypot(error / jnp.where(some, value, 1.0), log_z.std_error)",
            "error / jnp.where(some, value, 1.0)",
        ),
    ),
    *_of(
        "fjax/log_probs.py",
        "tests/test_log_probs.py tests/sampling/test_decode.py",
        (
            "no shift by one",
            "logits_fn(params, tokens[:, :-1], start=start - 1)",
            "logits_fn(params, tokens[:, 1:], start=start - 1)",
        ),
    ),
    *_of(
        "fjax/sampling/decode.py",
        "tests/sampling/test_decode.py",
        (
            "the end is not counted",
            "lengths=progress.lengths + ~finished",
            "lengths=progress.lengths + ~(finished | (drawn == ends[0]))",
        ),
        (
            "only the first of several ends is one",
            "(drawn == end for end in ends)",
            "(drawn == end for end in ends[:1])",
        ),
        (
            "tokens after the end have probabilities",
            "jnp.where(finished, 0.0, log_probs)",
            "log_probs",
        ),
        (
            "one key for all steps",
            "jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)",
            "row_keys",
        ),
        (
            "copies of a prompt share their key",
            "ids[:, None] * n + jnp.arange(n, dtype=ids.dtype)[None, :]",
            "ids[:, None] * n + 0 * jnp.arange(n, dtype=ids.dtype)[None, :]",
        ),
    ),
    *_of(
        "fjax/sampling/categorical.py",
        "tests/sampling/test_categorical.py",
        (
            "one uniform for block and token",
            "column = _invert(jnp.exp(blocks[block] - largest), within_block)",
            "column = _invert(jnp.exp(blocks[block] - largest), between_blocks)",
        ),
        ("probability within the block", "- jnp.log(masses.sum())", "- jnp.log(masses[block])"),
    ),
    *_of(
        "fjax/sampling/transforms.py",
        "tests/sampling/test_transforms.py",
        (
            "top-p leaves out the token that crosses p",
            ".sum(-1, keepdims=True) >= enough",
            ".sum(-1, keepdims=True) > enough + 1e-3",
        ),
        (
            "top-k keeps one more",
            "kept.sum(-1, keepdims=True) >= k",
            "kept.sum(-1, keepdims=True) > k",
        ),
    ),
    *_of(
        "fjax/training/_update.py",
        "tests/training/test_fdpg.py tests/training/test_contexts.py",
        (
            "importance ESS of q",
            "effective_sample_size(log_pi - scores.log_q.ravel())",
            "effective_sample_size(scores.log_q.ravel())",
        ),
        ("an infinite gradient moves the policy", "jnp.where(finite, a, b)", "a"),
        ("spread of the rewards squared", "reward_std=rewards.std()", "reward_std=rewards.var()"),
        (
            "error over contexts with n for n - 1",
            "jnp.sqrt(spread / (n - 1) / n)",
            "jnp.sqrt(spread / n / n)",
        ),
        (
            "repeated rows of a last part count",
            "jnp.zeros_like(weights[:missing])",
            "weights[:missing]",
        ),
        (
            "a context without Z counts in the mean",
            "value = jnp.sum(estimate.value, where=known) / n",
            "value = jnp.sum(estimate.value, where=known) / known.size",
        ),
    ),
    *_of(
        "fjax/training/f_dpg.py",
        "tests/training/test_fdpg.py tests/training/test_contexts.py",
        (
            "the tuner forgets the strata",
            "own = told(baseline, strata, log_pi, sampled_from)",
            "own = baseline",
        ),
        ("contexts without Z move the policy", "jnp.where(scores.known, weights, 0.0)", "weights"),
    ),
    *_of(
        "fjax/training/rl.py",
        "tests/training/test_rl.py",
        (
            "PPO's advantages unscaled",
            "advantages = advantages / (jnp.std(advantages) + 1e-6)",
            "pass",
        ),
        ("no shuffle", "jax.random.permutation(key, samples)", "jnp.arange(samples)"),
        (
            "clipped fraction of one bound",
            "(ratio < 1 - clip_ratio[0]) | (ratio > 1 + clip_ratio[1])",
            "(ratio > 1 + clip_ratio[1])",
        ),
        (
            "RLOO forgets π/q",
            "return (rewards - others) * jnp.exp(log_pi - rollout.log_q)",
            "return rewards - others",
        ),
    ),
    *_of(
        "fjax/rollouts.py",
        "tests/test_rollouts.py tests/runs/test_steps.py",
        (
            "shares of policy and base exchanged",
            "share = 1 - n / len(batch.tokens)",
            "share = n / len(batch.tokens)",
        ),
        (
            "rows of the base are the policy's",
            "len(batch.tokens)) >= batch.from_policy",
            "len(batch.tokens)) < 0",
        ),
        (
            "log q is log π",
            "_mix(batch.log_proposal, batch.log_a, share)",
            "_mix(batch.log_proposal, batch.log_proposal, share)",
        ),
    ),
    *_of(
        "fjax/rollouts.py",
        "tests/test_rollouts.py tests/experiments/test_conditional.py",
        (
            "prompts chosen by the key of row 0",
            "jax.random.fold_in(rng_key, CHOICE_KEY)",
            "jax.random.fold_in(rng_key, 0)",
        ),
    ),
    *_of(
        "fjax/evaluation/exact.py",
        "tests/evaluation/test_exact_contexts.py",
        (
            "a context's Z known from too few samples of its p",
            "np.where(accepted >= each, log_z.value, -np.inf)",
            "np.where(accepted >= 0, log_z.value, -np.inf)",
        ),
        (
            "every batch continues the first contexts",
            "drawn = _draw(collector, params, target, key, index=i % turn)",
            "drawn = _draw(collector, params, target, key, index=0)",
        ),
    ),
    *_of(
        "experiments/common/prompts.py",
        "tests/experiments/test_chat_prompts.py tests/experiments/test_prompts.py",
        (
            "a conversation begins with the start token twice",
            "rows.append(row if prompt.messages else [start_id(tokenizer), *row])",
            "rows.append([start_id(tokenizer), *row])",
        ),
        (
            "end tokens inside a conversation refused",
            "elif prompt.messages is None and tokenizer.eos_token_id in row:",
            "elif tokenizer.eos_token_id in row:",
        ),
        (
            "the start of a text kept where it is cut",
            "return row[-most:]",
            "return row[:most]",
        ),
    ),
    *_of(
        "fjax/runs/steps.py",
        "tests/runs/test_steps.py",
        (
            "a step's features asked with the wrong prompts",
            "target.features(given_of(training, contexts, len(texts)), texts)",
            "target.features(given_of(training, contexts * 0, len(texts)), texts)",
        ),
    ),
    *_of(
        "fjax/replay/draws.py",
        "tests/replay/test_gradient.py",
        (
            "as many rows as they were drawn, whatever the share",
            "share * (1 - share_of_p + share_of_p * jnp.minimum(weights, cap))",
            "share * (1 + jnp.minimum(weights, cap))",
        ),
        (
            "rows count by how likely they were to be drawn again",
            "replay.log_q - log_u, log_p",
            "replay.log_q, log_p",
        ),
        (
            "a row that cannot be drawn counts",
            "jnp.where(likely == 0, -jnp.inf, jnp.log(share) - jnp.log(likely))",
            "jnp.log(share) - jnp.log(likely)",
        ),
    ),
    *_of(
        "fjax/runs/stages.py",
        "tests/runs/test_stages.py",
        (
            "the share of p is not passed on",
            "partial(minibatch, n=minibatch_size, share_of_p=share_of_p)",
            "partial(minibatch, n=minibatch_size)",
        ),
    ),
    *_of(
        "fjax/adapters.py",
        "tests/test_adapters.py",
        (
            "α counts whatever the rank",
            'alpha / adapter["down"].shape[1]',
            "alpha",
        ),
        (
            "what goes down grows with the matrix",
            "jax.random.normal(rng_key, shape, dtype) / math.sqrt(size)",
            "jax.random.normal(rng_key, shape, dtype)",
        ),
        (
            "adapters begin elsewhere than the base model",
            "jnp.zeros((rank, *others), dtype)",
            "jnp.ones((rank, *others), dtype)",
        ),
        (
            "adapters beside a matrix are not scaled",
            '_scale(adapter, alpha) * adapter["up"]',
            'adapter["up"]',
        ),
        (
            "the change is rounded before it is added",
            "(matrix + scale * change).astype(matrix.dtype)",
            "matrix + (scale * change).astype(matrix.dtype)",
        ),
        (
            "a matrix [out, in] is drawn on the side of its output",
            'path.rpartition("/")[2] == "weight"',
            "False",
        ),
        (
            "all matrices begin with the same numbers",
            "jax.random.split(rng_key, len(matrices))",
            "[rng_key] * len(matrices)",
        ),
    ),
    *_of(
        "fjax/models/huggingface/adapters.py",
        "tests/models/test_peft.py",
        (
            "a rank-stabilised scale is read as any other",
            'alpha * math.sqrt(rank) if said.get("use_rslora") else alpha',
            "alpha",
        ),
        (
            "the head that is the embedding again is not written",
            "if module.tied is not None:  # [V, D], as torch's Linear has it",
            "if False:",
        ),
        (
            "an end of a name that other modules have, too, is written for all",
            "if not any(k[-len(end) :] == end for k in kept)",
            "if True",
        ),
        (
            "whatever is said beside plain LoRA is let through",
            "odd += sorted(name for name in said.keys() - _PLAIN if said[name])",
            "odd += []",
        ),
    ),
    *_of(
        "fjax/runs/evaluating.py",
        "tests/runs/test_loop.py::test_adapters_begin_as_the_base_model_and_so_its_rate_is_known",
        (
            "adapters never begin as the base model",
            "return all(same_numbers(merge_attached(ours), theirs) for ours, theirs in pairs)",
            "return False",
        ),
    ),
    *_of(
        "fjax/runs/saving.py",
        "tests/runs/test_interrupted.py",
        (
            "a signal is obeyed when the update has the state already",
            "return any(array.is_deleted() for array in arrays)",
            "return False",
        ),
        (
            "a full disk ends every run",
            "if last or in_use or run.stop_if_unsaved:",
            "if True:",
        ),
    ),
    *_of(
        "fjax/training/_record.py",
        "tests/runs/test_interrupted.py",
        (
            "a checkpoint of another run is taken for its own",
            "if there is None or here is None:",
            "if True:",
        ),
        (
            "a checkpoint of a newer format is read as if it were known",
            "if found <= FORMAT:",
            "if True:",
        ),
    ),
    *_of(
        "fjax/runs/distance.py",
        "tests/runs/test_distance.py tests/evaluation",
        (
            "two units in one distance",
            'unit = "total_variation" if infinite else divergence',
            "unit = divergence",
        ),
    ),
    *_of(
        "experiments/common/moments.py",
        "tests/experiments/test_moments.py tests/experiments/test_exact.py",
        (
            "a bound counts the lower end of every feature",
            "np.maximum(soft * low, soft * high)",
            "np.minimum(soft * low, soft * high)",
        ),
        (
            "rows repeated to fill up a prompt count again",
            "jnp.where(there, 0.0, -jnp.inf)",
            "jnp.zeros(there.shape)",
        ),
    ),
    *_of(
        "fjax/moments.py",
        "tests/test_moments_over_contexts.py",
        (
            "a context that cannot satisfy the constraint counts",
            "share = (known / known.sum())",
            "share = (jnp.ones_like(known) / len(known))",
        ),
        (
            "one Z for all contexts",
            "within = jax.nn.softmax(log_base + dot(features, solution), axis=1)",
            "within = jax.nn.softmax(log_base + dot(features, solution), axis=(0, 1)) * len(share)",
        ),
        (
            "errors forget that a context has few samples",
            "by_context**2 / (1 - jnp.minimum(few, 1 - 1e-6))[:, None]",
            "by_context**2 / (1 + 0 * few)[:, None]",
        ),
    ),
    *_of(
        "fjax/models/llama/functions.py",
        "tests/models/test_llama.py tests/models/test_relatives.py",
        (
            "keys are not turned by their positions",
            "rotate(q_BxHxTxK, turned), rotate(k_BxNxSxK, turned)",
            "rotate(q_BxHxTxK, turned), k_BxNxSxK",
        ),
        (
            "new keys are written over the first ones of a cache",
            "jax.lax.dynamic_update_slice_in_dim, start_index=length",
            "jax.lax.dynamic_update_slice_in_dim, start_index=0",
        ),
        ("the gate is not an activation's", "gate * _linear", "jnp.ones_like(gate) * _linear"),
    ),
    *_of(
        "fjax/models/rope.py",
        "tests/models/test_rope.py tests/models/test_relatives.py",
        ("pairs are mirrored, not turned", "first * cos - second", "first * cos + second"),
        ("the ramp of llama3 upside down", "(1 - ramp) * omega", "ramp * omega"),
    ),
    *_of(
        "experiments/moments/target.py",
        "tests/experiments/test_moments.py",
        (
            "every target is taken for a constraint times the base",
            "if coefficients.tolist() == [np.inf] else None",
            "if len(coefficients) else None",
        ),
        (
            "a bound of what was never bounded",
            "if len(yes_or_no) == len(wanted) else None",
            "if len(yes_or_no) else None",
        ),
    ),
    *_of(
        "experiments/tools/quasi_rejection.py",
        "tests/experiments/test_quasi_rejection.py",
        (
            "proposals of one prompt are scored as another's",
            "given_of(unseen, batch.contexts, len(texts))",
            "given_of(unseen, batch.contexts * 0, len(texts))",
        ),
        (
            "Z from the proposals alone",
            "log_score - np.asarray(batch.log_q),",
            "(log_score - np.asarray(batch.log_q))[:n] * 0 + log_score[:n],",
        ),
        (
            "twice as much is accepted",
            "*logs, log_beta=found.log_beta)",
            "*logs, log_beta=found.log_beta - 0.7)",
        ),
    ),
    *_of(
        "fjax/runs/card.py",
        "tests/runs/test_card.py",
        (
            "a card with the figures of the last step",
            'next(record for record in evaluations if record["step"] == step)',
            "evaluations[-1]",
        ),
        (
            "a card written over somebody's own",
            "theirs = path.is_file() and MARK not in",
            "theirs = False and MARK not in",
        ),
    ),
    *_of(
        "fjax/_markdown.py",
        "tests/training/test_logging.py tests/runs/test_card.py",
        ("texts that may end a cell", r"[\\`*_\[\]|]", r"[\\`*_\[\]]"),
    ),
    *_of(
        "fjax/models/huggingface/save.py",
        "tests/models/test_way_out.py",
        ("an export that draws from the fifty likeliest", '"top_k": 0,', '"top_k": 50,'),
    ),
    *_of(
        "experiments/common/arguments.py",
        "tests/experiments/test_trl_flags.py",
        ("a flag of ours that is taken for TRL's", "and theirs not in ours", "and ours"),
        ("a flag of theirs with underscores", '.replace("_", "-")\n        if', "\n        if"),
    ),
    *_of(
        "experiments/common/prompts.py",
        "tests/experiments/test_conversations.py",
        (
            "what a template writes behind the end of a turn counts",
            "return ids[: found[0] + 1] if found else",
            "return ids if found else",
        ),
    ),
    *_of(
        "experiments/preference_pairs/data.py",
        "tests/experiments/test_conversations.py tests/experiments/test_preference_data.py",
        (
            "an answer that was cut off ends all the same",
            "*(after if ended else after[:-1])",
            "*after",
        ),
    ),
    *OF_HOSTS,
)
