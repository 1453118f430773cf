"""RL with a KL penalty as tuners with the interface of `fjax.fdpg`: what f-DPG is compared with.

Both maximise E_π[r] - β KL(π‖a), with the penalty inside the reward as k1, where its gradient is exact. In terms of the target
P = a·exp(r/β) the whole reward is (r - β log π/a)/β = log P - log π, so a `Rollout` holds all that is needed, and any
target with P > 0 everywhere may take the place of a reward. At the optimum π = P/Z, as for reverse KL.

Source: Ahmadian et al. 2024 (RLOO, arXiv 2402.14740); Schulman et al. 2017 (PPO, arXiv 1707.06347); Ziegler et al. 2019.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from fjax import policy_gradients
from fjax._typing import Array, Bool, Float, Int, LogProbFn, Params
from fjax.divergences import reverse_kl
from fjax.estimators import RunningLogMean, running_log_mean
from fjax.surrogates import leave_one_out
from fjax.training._update import StepInfo, Tuner, check_microbatch_size, describe, first_state, pull_back, update_log_z
from fjax.training.rollout import Rollout
from fjax.training.state import TrainState, advance

TokenLogProbFn = Callable[[Params, Int[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B T"]]
"""(params, tokens, where) -> log-probability of each token, 0 where not counted."""


def rloo(
    log_prob_fn: LogProbFn,
    optimizer: optax.GradientTransformation,
    *,
    log_z: RunningLogMean = running_log_mean(),
    microbatch_size: int | None = None,
    num_contexts: int | None = None,
) -> Tuner:
    """REINFORCE with a leave-one-out baseline and the KL penalty as k1 in the reward: mean of -(R_i - B_i) log π(x_i).

    R = log P - log π, stopped. The gradient estimates that of KL(π‖p), without bias and whatever Z is: sample for sample it
    is that of `fjax.fdpg` with reverse KL on the policy's own samples. The samples must be the policy's own.

    Args:
        log_prob_fn: the policy, ``(params, tokens, where) -> log π``.
        optimizer: any optax transformation.
        log_z: how log Z is tracked, for the figures of `StepInfo` alone.
        microbatch_size: see `fjax.fdpg`.
        num_contexts: see `fjax.fdpg`; baselines are of one context each.

    Raises:
        ValueError: if ``microbatch_size`` is below 1; at trace time for a single sample.

    >>> from fjax import enumeration
    >>> log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 2)
    >>> tuner = rloo(log_prob_fn, optax.adam(0.1))
    >>> state = tuner.init(jnp.zeros((prefixes, 3)))
    >>> tokens, where = enumeration.sequences(3, 2, eos_id=0)
    >>> log_q = log_prob_fn(state.params, tokens, where)
    >>> state, info = tuner.update(state, Rollout(tokens, where, log_q, log_q + (tokens == 1).any(1)))
    >>> int(state.step), bool(info.finite)
    (1, True)

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 3; Korbak et al. 2022 (arXiv 2205.11275) for P.
    """
    check_microbatch_size(microbatch_size)

    def update(state: TrainState, rollout: Rollout) -> tuple[TrainState, StepInfo]:
        z_state, scores = update_log_z(log_z, state.log_z, rollout)
        log_score = rollout.log_score.reshape(scores.log_q.shape)

        def weigh(log_pi: Float[Array, "M"]) -> Float[Array, "M"]:
            def loss(log_pi):
                by_context = log_pi.reshape(log_score.shape)
                rewards = log_score - jax.lax.stop_gradient(by_context)
                return jax.vmap(policy_gradients.rloo)(by_context, rewards).mean()

            return jax.grad(loss)(log_pi)

        log_pi, weights, grads = pull_back(log_prob_fn, state.params, rollout, weigh, microbatch_size)
        info = describe(log_pi, scores, weights, grads, divergence=reverse_kl())
        return advance(state, grads, optimizer, finite=info.finite, log_z=z_state), info

    return Tuner(lambda params: first_state(params, optimizer, log_z, num_contexts), update)


def ppo(
    token_log_prob_fn: TokenLogProbFn,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int = 2,
    minibatches: int = 4,
    clip: tuple[float, float] = (0.2, 0.2),
    log_z: RunningLogMean = running_log_mean(),
    num_contexts: int | None = None,
) -> Tuner:
    """PPO without a critic: ``epochs`` passes over the samples in minibatches, with `fjax.policy_gradients.ppo_clip` a token.

    The advantage of all tokens of a sample is R_i - B_i, R = log P - log π with the KL penalty in it, B the mean of the other
    samples, divided by the standard deviation of the batch. The first gradient of an update is that of KL(π‖p) in
    direction; the later ones, at ratios other than 1, are of no fixed objective: that is the trust region.

    Args:
        token_log_prob_fn: the policy, `fjax.log_probs.make_token_log_prob_fn`.
        optimizer: any optax transformation; it is called ``epochs · minibatches`` times an update.
        epochs: passes over the samples.
        minibatches: of a pass; they must divide the number of samples.
        clip: (ε, ε'), see `fjax.policy_gradients.ppo_clip`.
        log_z: how log Z is tracked, for the figures of `StepInfo` alone.
        num_contexts: see `fjax.fdpg`; baselines are of one context each.

    Raises:
        ValueError: for epochs or minibatches below 1; at trace time, if the samples cannot be divided.

    >>> from fjax import enumeration, log_probs
    >>> uniform = lambda params, tokens, where=None, *, start=0: params[tokens[:, start:]]
    >>> tuner = ppo(log_probs.make_token_log_prob_fn(uniform), optax.adam(0.1), minibatches=2)
    >>> state = tuner.init(jnp.zeros((3, 3)))
    >>> tokens, where = jnp.array([[0, 1, 2], [0, 2, 0]]), jnp.array([[False, True, True]] * 2)
    >>> log_q = 2 * jnp.log(jnp.array([1 / 3, 1 / 3]))
    >>> state, info = tuner.update(state, Rollout(tokens, where, log_q, log_q + jnp.array([1.0, 0.0])))
    >>> int(state.step), bool(info.finite)
    (1, True)

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Ahmadian et al. 2024 for the baseline in place of a critic.
    """
    if epochs < 1 or minibatches < 1:
        raise ValueError(f"epochs and minibatches must be at least 1, got {epochs} and {minibatches}.")

    def update(state: TrainState, rollout: Rollout) -> tuple[TrainState, StepInfo]:
        z_state, scores = update_log_z(log_z, state.log_z, rollout)
        tokens, where = (x.reshape(-1, x.shape[-1]) for x in (rollout.tokens, rollout.where))
        old = token_log_prob_fn(state.params, tokens, where)
        log_pi = old.sum(-1)
        shape = scores.log_q.shape
        advantages = _advantages(log_pi.reshape(shape), rollout.log_score.reshape(shape)).ravel()

        def loss(params: Params, rows: Int[Array, "B"]):
            new, counted = token_log_prob_fn(params, tokens[rows], where[rows]), where[rows]
            gain = jnp.where(counted, advantages[rows, None], 0.0)
            moved = jnp.abs(new - old[rows]) > jnp.log1p(clip[1])
            clipped = jnp.mean(moved, where=counted)
            return policy_gradients.ppo_clip(new, old[rows], gain, clip=clip).sum(-1).mean(), clipped

        rows = _minibatches(state.step, log_pi.shape[0], epochs, minibatches)
        moved, (norms, clipped, finite) = jax.lax.scan(partial(_one_minibatch, loss, optimizer), state, rows)
        finite = finite.all() & jnp.isfinite(advantages).all()
        info = describe(log_pi, scores, -advantages / advantages.size, {}, divergence=reverse_kl())
        info = info._replace(grad_norm=norms.mean(), clipped_fraction=clipped.mean(), finite=finite)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved._replace(log_z=z_state), state)
        return kept._replace(step=state.step + 1), info

    return Tuner(lambda params: first_state(params, optimizer, log_z, num_contexts), update)


def _one_minibatch(loss, optimizer, state, rows):
    (_, clipped), grads = jax.value_and_grad(loss, has_aux=True)(state.params, rows)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    return advance(state, grads, optimizer, finite=finite, log_z=state.log_z), (norm, clipped, finite)


def _advantages(log_pi: Float[Array, "C N"], log_score: Float[Array, "C N"]) -> Float[Array, "C N"]:
    """R minus the mean of the context's others, in units of the spread over all."""
    rewards = log_score - log_pi
    centred = rewards - jax.vmap(leave_one_out)(rewards)
    return centred / (jnp.std(centred) + 1e-6)


def _minibatches(step: Int[Array, ""], samples: int, epochs: int, minibatches: int) -> Int[Array, "M B"]:
    """Rows of each minibatch, shuffled anew each epoch; a function of the step, so that a resumed run repeats them."""
    if samples % minibatches:
        raise ValueError(f"{samples} samples cannot be divided into {minibatches} minibatches; choose a divisor.")
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), epochs)
    orders = jax.vmap(lambda key: jax.random.permutation(key, samples))(keys)
    return orders.reshape(epochs * minibatches, -1)
