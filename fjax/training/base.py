"""What every online tuner takes and gives.

A rollout of samples, a state, and what there is to see of a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from fjax.divergences import FDivergence
from fjax.estimators import Estimate
from fjax.types import Array, Bool, Float, Int, Params


class Rollout(NamedTuple):
    """N samples of one target, or of each of C contexts, as arrays.

    Attributes:
        tokens: prompt and completion, contiguous, padded on the right (`fjax.log_probs.pack`).
        where: tokens that count: the completion up to and including its end-of-sequence token.
        log_q: log-probability of each completion under the distribution it was really drawn from,
            in nats.
        log_score: log P(x) under the unnormalised target; -inf where it is ruled out.
        contexts: which contexts the C rows of samples are of, numbered from 0; needed for one Z a
            context. Rows of the same context share its Z.
        strata: which part of the sampling distribution each sample was drawn from, where their
            numbers were fixed: 0 for the policy (or its proposal), 1 for the base model. None: all
            of one distribution, log q, or of a mixture by chance.
    """

    tokens: Int[Array, "*c N T"]
    where: Bool[Array, "*c N T"]
    log_q: Float[Array, "*c N"]
    log_score: Float[Array, "*c N"]
    contexts: Int[Array, "C"] | None = None
    strata: Int[Array, "*c N"] | None = None


class TrainState(NamedTuple):
    """A tree of arrays: donate it, shard it, save it.

    Attributes:
        step: updates so far. Keys of a step are ``jax.random.fold_in(key, state.step)``, so they
            need no saving.
        params: of the policy.
        opt_state: of the optimiser.
        log_z: what the running estimate of log Z remembers, or that of each context; empty for
            algorithms that need none.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    log_z: Any


class StepInfo(NamedTuple):
    """What there is to see of one update; nothing of it is needed for the next.

    Over several contexts ``divergence`` and ``log_z`` are means over those whose Z is known, with
    the standard error of that mean.

    Attributes:
        loss: Σ of the surrogate. Its gradient is the point, its value means nothing.
        grad_norm: of the whole gradient, before the optimiser.
        divergence: D_f(π‖p) of the policy *before* the update, from this batch and the running log
            Z; NaN while Z is unknown.
        log_z: the running estimate of log Z, this batch included.
        reward_mean: mean pseudo-reward -f'(π/p), after clipping.
        reward_std: its standard deviation over the batch.
        clipped_fraction: share of samples whose f' was clipped; each biases the gradient. For PPO:
            share of tokens whose ratio lay outside of [1-ε, 1+ε'], on either side, over all
            minibatches.
        importance_ess: effective sample size of π/q: N when the samples are the policy's own, less
            the further they are not.
        finite: False if the gradient was not, or if one of ``contexts`` does not exist (where they
            are known before the program runs, that is an error). Then the update left everything
            but ``step`` as it was. Usual reasons: an infinite f'; a NaN in the rollout; ``where``
            that counts a column which nothing predicts, such as column 0 of a language model, for
            log π is NaN then (`fjax.make_log_prob_fn`).
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    divergence: Estimate
    log_z: Estimate
    reward_mean: Float[Array, ""]
    reward_std: Float[Array, ""]
    clipped_fraction: Float[Array, ""]
    importance_ess: Float[Array, ""]
    finite: Bool[Array, ""]


class Tuner(NamedTuple):
    """An algorithm, as two pure functions. Callers jit ``update``, and donate its first argument.

    Attributes:
        init: params -> state.
        update: (state, rollout) -> (state, info).
        divergence: D_f of ``info.divergence``, by which runs call it and know its limit; None where
            nothing is said of it.
    """

    init: Callable[[Params], TrainState]
    update: Callable[[TrainState, Rollout], tuple[TrainState, StepInfo]]
    divergence: FDivergence | None = None
