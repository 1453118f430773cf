"""Offline preference losses as ``init`` and ``update``: one optimiser step on a batch of pairs.

There is no sampling and no Z: the base model's log-probabilities of all pairs are computed once,
and a step is the gradient of the mean loss, whichever of `fjax.preferences` that is.

Source: Rafailov et al. 2023 (DPO, arXiv 2305.18290).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fjax._checks import as_mask, same_shape
from fjax._sharding import together
from fjax.training._doors import as_log_probs, check_options, checked_tokens
from fjax.training._update import advance, first_state, norm, pull_back
from fjax.training.base import TrainState
from fjax.types import Array, Bool, Float, Int, LogProbFn, Params

PairLoss = Callable[
    [Float[Array, "N"], Float[Array, "N"], Float[Array, "N"], Float[Array, "N"]], Float[Array, "N"]
]
"""(chosen_log_pi, rejected_log_pi, chosen_log_a, rejected_log_a) -> one loss a pair."""


class PairBatch(NamedTuple):
    """N pairs of answers to the same prompt, as arrays.

    Attributes:
        chosen_tokens: prompt and chosen answer, contiguous, padded on the right.
        chosen_where: tokens that count: the answer, up to and including its end-of-sequence token.
        rejected_tokens: the same prompts and the rejected answers.
        rejected_where: tokens of these that count.
        chosen_log_a: log-probability of the chosen answers under the base model, in nats.
        rejected_log_a: of the rejected ones.
    """

    chosen_tokens: Int[Array, "N T"]
    chosen_where: Bool[Array, "N T"]
    rejected_tokens: Int[Array, "N T"]
    rejected_where: Bool[Array, "N T"]
    chosen_log_a: Float[Array, "N"]
    rejected_log_a: Float[Array, "N"]


class PairInfo(NamedTuple):
    """What there is to see of one update, all of it of the policy *before* the update.

    Attributes:
        loss: mean over the pairs.
        accuracy: share of pairs whose margin is above 0. At π = a all margins are 0, up to
            rounding.
        margin: mean of log π/a of the chosen answer minus that of the rejected one: the implicit
            reward, without its β.
        chosen_log_ratio: mean log π/a of the chosen answers. DPO often lowers it, and the rejected
            one's further.
        rejected_log_ratio: mean log π/a of the rejected answers.
        grad_norm: of the whole gradient, before the optimiser.
        finite: False if the loss or its gradient was not. Then the update left everything but
            ``step`` as it was. Usual reasons: a log_a of -inf or NaN; ``where`` that counts a
            column which nothing predicts, such as column 0 of a language model, for log π is NaN
            then (`fjax.make_log_prob_fn`).
    """

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    margin: Float[Array, ""]
    chosen_log_ratio: Float[Array, ""]
    rejected_log_ratio: Float[Array, ""]
    grad_norm: Float[Array, ""]
    finite: Bool[Array, ""]


class PairTuner(NamedTuple):
    """An offline algorithm, as two pure functions.

    Callers jit ``update``, and donate its first argument.

    Attributes:
        init: params -> state.
        update: (state, pairs) -> (state, info).
    """

    init: Callable[[Params], TrainState]
    update: Callable[[TrainState, PairBatch], tuple[TrainState, PairInfo]]


def preference_tuner(
    log_prob_fn: LogProbFn,
    optimizer: optax.GradientTransformation,
    *,
    loss: PairLoss,
    microbatch_size: int | None = None,
) -> PairTuner:
    """Descends the mean of a pair loss: ∇ 1/N Σ ℓ(log π(x⁺), log π(x⁻), log a(x⁺), log a(x⁻)).

    The gradient handed to the optimiser is that of the mean loss over the batch, exactly.

    Args:
        log_prob_fn: the policy, ``(params, tokens, where) -> log π``; see `fjax.make_log_prob_fn`.
        optimizer: any optax transformation; it is given a gradient to descend.
        loss: of `fjax.preferences`, with its options bound, as in ``partial(fjax.preferences.dpo,
            beta=0.1)``.
        microbatch_size: answers that go through the policy at once, two to a pair; None means all.
            The result is the same up to rounding; memory falls, and log π is computed twice.

    Returns:
        The `PairTuner`. The ``log_z`` of its states is empty; ``update`` leaves whatever is there
        as it is.

    Raises:
        ValueError: for options that are not what they should be; at trace time for pairs whose
            shapes do not belong together.

    >>> from functools import partial
    >>> from fjax import enumeration, preferences
    >>> log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 2)
    >>> loss = partial(preferences.dpo, beta=0.1)
    >>> tuner = preference_tuner(log_prob_fn, optax.adam(0.1), loss=loss)
    >>> state = tuner.init(jnp.zeros((prefixes, 3)))
    >>> tokens, where = enumeration.sequences(3, 2, eos_id=0)
    >>> log_a = log_prob_fn(state.params, tokens, where)
    >>> pairs = PairBatch(tokens[1:], where[1:], tokens[:-1], where[:-1], log_a[1:], log_a[:-1])
    >>> state, info = jax.jit(tuner.update)(state, pairs)
    >>> int(state.step), round(float(info.loss), 6)
    (1, 0.693147)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    """
    check_options(optimizer=optimizer, microbatch_size=microbatch_size)
    log_prob_fn = as_log_probs(log_prob_fn)

    def init(params: Params) -> TrainState:
        return first_state(params, optimizer)

    def update(state: TrainState, pairs: PairBatch) -> tuple[TrainState, PairInfo]:
        pairs = _checked(pairs)

        def mean_loss(log_pi: Float[Array, "M"]) -> Float[Array, ""]:
            chosen_log_pi, rejected_log_pi = jnp.split(log_pi, 2)
            return loss(
                chosen_log_pi, rejected_log_pi, pairs.chosen_log_a, pairs.rejected_log_a
            ).mean()

        # All chosen answers, then all rejected ones: one pass through the policy for both answers
        # of all pairs.
        tokens = jnp.concatenate([pairs.chosen_tokens, pairs.rejected_tokens])
        where = jnp.concatenate([pairs.chosen_where, pairs.rejected_where])
        # The gradient by log π, pulled back.
        log_pi, _, grads = pull_back(
            log_prob_fn, state.params, tokens, where, jax.grad(mean_loss), microbatch_size
        )
        info = _describe(log_pi, pairs, mean_loss(log_pi), grads)
        return advance(state, grads, optimizer, finite=info.finite, log_z=state.log_z), info

    return PairTuner(init, update)


def _checked(pairs: PairBatch) -> PairBatch:
    """The same as arrays of JAX, the numbers in float32 at least."""
    chosen, rejected = (
        checked_tokens(getattr(pairs, name), name=name)
        for name in ("chosen_tokens", "rejected_tokens")
    )
    shapes = {name: jnp.shape(x) for name, x in pairs._asdict().items()}
    n_t = shapes["chosen_tokens"]
    if (
        len(n_t) != 2
        or 0 in n_t
        or any(shape != (n_t[:1] if "log_a" in name else n_t) for name, shape in shapes.items())
    ):
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(
            "A PairBatch has tokens and where of shape [N, T], chosen and rejected ones padded to "
            "the same T, and log_a of "
            f"shape [N], N being at least 1. Got {given}."
        )
    log_as = same_shape(chosen_log_a=pairs.chosen_log_a, rejected_log_a=pairs.rejected_log_a)
    return PairBatch(
        chosen,
        as_mask(pairs.chosen_where, chosen, name="chosen_where"),
        rejected,
        as_mask(pairs.rejected_where, rejected, name="rejected_where"),
        *map(together, log_as),
    )


def _describe(
    log_pi: Float[Array, "M"], pairs: PairBatch, loss: Float[Array, ""], grads: Params
) -> PairInfo:
    chosen_log_pi, rejected_log_pi = jnp.split(log_pi, 2)
    chosen, rejected = chosen_log_pi - pairs.chosen_log_a, rejected_log_pi - pairs.rejected_log_a
    margins, grad_norm = chosen - rejected, norm(grads)
    return PairInfo(
        loss=loss,
        accuracy=jnp.mean(margins > 0, dtype=margins.dtype),
        margin=margins.mean(),
        chosen_log_ratio=chosen.mean(),
        rejected_log_ratio=rejected.mean(),
        grad_norm=grad_norm,
        finite=jnp.isfinite(grad_norm) & jnp.isfinite(loss),
    )
