"""What all tuners share: the pull-back of weights through log π, and the step.

Beside these, the running log Z and the figures of a step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fjax._checks import float_dtype
from fjax._numerics import map_contexts
from fjax._sharding import together
from fjax.divergences import FDivergence
from fjax.estimators import Estimate, RunningLogMean, effective_sample_size, estimate_divergence
from fjax.sharding import replicate
from fjax.surrogates import leave_one_out, pseudo_rewards, self_normalized
from fjax.training.base import Rollout, StepInfo, TrainState
from fjax.types import Array, Bool, Float, Int, Params


class Scores(NamedTuple):
    """What is known of the samples beside their tokens; without contexts C is 1.

    Attributes:
        log_p: under the target normalised by the running log Z; -inf while that is unknown.
        log_q: under the distribution that was sampled from.
        known: whether the Z of a context is.
        log_z: the estimate itself; one for all contexts, or one for each.
        valid: whether the contexts are some that there are.
    """

    log_p: Float[Array, "C N"]
    log_q: Float[Array, "C N"]
    known: Bool[Array, "C 1"]
    log_z: Estimate
    valid: Bool[Array, ""]


def init_log_z(log_z: RunningLogMean, num_contexts: int | None):
    """The state of log Z, or of one for each context."""
    state = log_z.init()
    return (
        state
        if num_contexts is None
        else jax.tree.map(lambda x: jnp.repeat(x[None], num_contexts, axis=0), state)
    )


def make_init(
    optimizer: optax.GradientTransformation, log_z: RunningLogMean, num_contexts: int | None
) -> Callable[[Params], TrainState]:
    """Params -> the state of step 0."""
    return lambda params: first_state(params, optimizer, init_log_z(log_z, num_contexts))


def update_log_z(
    log_z: RunningLogMean, state, rollout: Rollout, num_contexts: int | None
) -> tuple[object, Scores]:
    """Takes the weights P/q in, each into the Z of its context.

    Scores are normalised by what is known then.
    """
    _check_log_z(log_z, state, num_contexts)
    log_score, log_q, valid = rollout.log_score, rollout.log_q, jnp.array(True)
    if num_contexts is None:
        state = log_z.update(state, (log_score - log_q).ravel())
        z = log_z.estimate(state)
    else:
        contexts = jnp.asarray(rollout.contexts)
        exists = (contexts >= 0) & (contexts < num_contexts)
        valid = exists.all()
        # An index past the end is dropped when written to. A negative one would be that of another
        # context.
        ids = jnp.where(exists, contexts, num_contexts)
        state = _into_contexts(log_z, state, ids, log_score - log_q)
        z = map_contexts(log_z.estimate)(jax.tree.map(lambda x: x[ids], state))
    value = jnp.broadcast_to(z.value.reshape(-1, 1), (log_q.shape[0], 1))
    known = ~jnp.isneginf(value)
    log_p = jnp.where(known, log_score - jnp.where(known, value, 0.0), -jnp.inf)
    return state, Scores(log_p, log_q, known, z, valid)


def _check_log_z(log_z: RunningLogMean, state, num_contexts: int | None) -> None:
    expected = jax.eval_shape(lambda: init_log_z(log_z, num_contexts))
    shapes, expected = (jax.tree.map(jnp.shape, tree) for tree in (state, expected))
    if shapes != expected:
        raise ValueError(
            f"The state is that of another tuner: its log_z has the shapes {shapes}, and with "
            f"num_contexts={num_contexts} they are {expected}. Begin with the state that this "
            f"tuner's init returns."
        )


def _into_contexts(
    log_z: RunningLogMean, state, ids: Int[Array, "C"], log_weights: Float[Array, "C N"]
):
    """The rows in turn, since several may be of one context."""

    def add(state, row):
        index, log_weights = row
        updated = log_z.update(jax.tree.map(lambda x: x[index], state), log_weights)
        return jax.tree.map(
            lambda rows, one: rows.at[index].set(one, mode="drop"), state, updated
        ), None

    return jax.lax.scan(add, state, (ids, log_weights))[0]


def first_state(
    params: Params, optimizer: optax.GradientTransformation, log_z: object = ()
) -> TrainState:
    """Step 0.

    Raises:
        ValueError: if not all leaves of the parameters are floats.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"All of params is trained, so every leaf must hold floats; "
                f"params{jax.tree_util.keystr(path)} is {dtype}. "
                "Keep what is not trained out of params, in the function that uses it."
            )
    # A copy: the state is donated, and whoever calls usually keeps ``params`` as the base model.
    # Its dtypes are not weak ones, which the first update would change.
    params = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), params)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), log_z)
    return replicate(state)


def advance(
    state: TrainState,
    grads: Params,
    optimizer: optax.GradientTransformation,
    *,
    finite: Bool[Array, ""],
    log_z: Any,
) -> TrainState:
    """The state after one step down the gradient.

    If that is not finite, the state as it was, but for the count of steps.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = (optax.apply_updates(state.params, updates), opt_state, log_z)
    old = (state.params, state.opt_state, state.log_z)
    # In the dtype that was there: the state is donated, and carried through loops.
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b).astype(b.dtype), new, old)
    return TrainState(state.step + 1, *kept)


def pull_back(
    log_prob_fn: Callable[..., Array],
    params: Params,
    tokens: Int[Array, "*c N T"],
    where: Bool[Array, "*c N T"],
    weigh: Callable[[Float[Array, "M *t"]], Float[Array, "M *t"]],
    microbatch_size: int | None,
    log_pi: Float[Array, "M"] | None = None,
) -> tuple[Float[Array, "M *t"], Float[Array, "M *t"], Params]:
    """(log π, weights of it, Σ weights · ∇log π), through all samples at once or in parts.

    ``weigh`` is given the log π of all samples either way; ``log_pi`` spares the extra pass that
    parts need.
    """
    tokens, where = (x.reshape(-1, x.shape[-1]) for x in (tokens, where))
    if microbatch_size is None or microbatch_size >= tokens.shape[0]:
        spread, back = jax.vjp(lambda params: log_prob_fn(params, tokens, where), params)
        log_pi = together(spread)
        weights = weigh(log_pi)
        return log_pi, weights, back(_as(weights, spread))[0]
    tokens, where = together(tokens), together(where)
    if log_pi is None:
        log_pi = score(log_prob_fn, params, tokens, where, microbatch_size)
    weights = weigh(log_pi)
    return (
        log_pi,
        weights,
        _sum_of_parts(log_prob_fn, params, tokens, where, weights, microbatch_size),
    )


def score(
    log_prob_fn: Callable[..., Array],
    params: Params,
    tokens: Int[Array, "N T"],
    where: Bool[Array, "N T"],
    microbatch_size: int | None,
) -> Float[Array, "N *t"]:
    """Log π, through all samples at once or in parts."""
    n = tokens.shape[0]
    if microbatch_size is None or microbatch_size >= n:
        return log_prob_fn(params, tokens, where)
    parts = _in_parts(tokens, microbatch_size), _in_parts(where, microbatch_size)
    log_pi = jax.lax.map(lambda part: log_prob_fn(params, *part), parts)
    return jnp.moveaxis(log_pi, 0, 1).reshape(-1, *log_pi.shape[2:])[:n]


def _in_parts(x: Array, size: int) -> Array:
    """``[P, size, ...]``, the rows dealt out in turn; where they do not suffice, the first again.

    Dealt out, for then each device of a mesh has its own rows in every part: parts of rows that
    follow one another would be those of a few devices each, to be sent to all others.
    """
    parts = -(-len(x) // size)
    missing = parts * size - len(x)
    x = jnp.concatenate([x, x[:missing]]) if missing else x
    return jnp.moveaxis(x.reshape(size, parts, *x.shape[1:]), 1, 0)


def _sum_of_parts(log_prob_fn, params, tokens, where, weights, size) -> Params:
    """Σ weights · ∇log π, ``size`` samples at a time."""
    missing = -len(tokens) % size
    # What fills up the last parts counts for nothing.
    tokens, where = (jnp.concatenate([x, x[:missing]]) for x in (tokens, where))
    weights = jnp.concatenate([weights, jnp.zeros_like(weights[:missing])])
    parts = tuple(_in_parts(x, size) for x in (tokens, where, weights))

    def add(grads, part):
        tokens, where, weights = part
        log_pi, back = jax.vjp(lambda params: log_prob_fn(params, tokens, where), params)
        more = back(_as(weights, log_pi))[0]
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), grads, more), None

    # In float32 at least, for in bfloat16 small parts are lost in a large sum; then as the whole
    # batch would give it.
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, float_dtype(x)), params)
    grads, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda total, x: total.astype(x.dtype), grads, params)


def norm(grads: Params) -> Float[Array, ""]:
    """Of all entries together, in float32 at least.

    The squares of half-precision numbers soon over- and underflow.
    """
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(float_dtype(x)), grads))


def _as(x: Array, like: Array) -> Array:
    """In the dtype, and under explicit sharding in the place, of what it belongs to."""
    x = x.astype(like.dtype)
    return x if together(like) is like else jax.sharding.reshard(x, jax.typeof(like).sharding)


def told(
    baseline,
    strata: Int[Array, "N"] | None,
    log_pi: Float[Array, "N"],
    log_q: Float[Array, "N"] | None = None,
):
    """What a baseline of fjax has to know: whose the samples are, or how likely.

    Every other baseline is the user's.
    """
    if baseline is self_normalized:
        return self_normalized(log_pi, log_pi if log_q is None else log_q)
    return (
        partial(baseline, strata=strata)
        if baseline is leave_one_out and strata is not None
        else baseline
    )


def describe(
    log_pi: Float[Array, "N"],
    scores: Scores,
    weights: Float[Array, "N"],
    grads: Params,
    *,
    divergence: FDivergence,
    clip: tuple[float | Float[Array, ""], float | Float[Array, ""]] | None = None,
) -> StepInfo:
    """The figures of a step whose gradient is Σ weights · ∇log π."""
    by_context = log_pi.reshape(scores.log_q.shape)
    rewards = pseudo_rewards(log_pi, scores.log_p.ravel(), divergence=divergence, clip=clip)
    free = pseudo_rewards(log_pi, scores.log_p.ravel(), divergence=divergence)
    grad_norm = norm(grads)
    away = map_contexts(lambda *x: estimate_divergence(*x, divergence=divergence))(
        by_context, scores.log_p, scores.log_q
    )
    known = scores.known[:, 0]
    return StepInfo(
        loss=jnp.sum(weights * jnp.where(weights == 0, 0.0, log_pi)),
        grad_norm=grad_norm,
        # Without Z there is no p to be away from.
        divergence=_over_contexts(away, known, unknown=jnp.nan),
        log_z=scores.log_z
        if scores.log_z.value.ndim == 0
        else _over_contexts(scores.log_z, known, unknown=-jnp.inf),
        reward_mean=rewards.mean(),
        reward_std=rewards.std(),
        clipped_fraction=jnp.mean(rewards != free, dtype=rewards.dtype),
        importance_ess=effective_sample_size(log_pi - scores.log_q.ravel()),
        finite=jnp.isfinite(grad_norm) & jnp.isfinite(weights).all() & scores.valid,
    )


def _over_contexts(estimate: Estimate, known: Bool[Array, "C"], *, unknown: float) -> Estimate:
    """The mean over contexts, whose spread its error comes from.

    Of a single context, its own estimate.
    """
    n = known.sum()
    if known.shape[0] == 1:
        value, std_error = estimate.value[0], estimate.std_error[0]
    else:
        value = jnp.sum(estimate.value, where=known) / n
        spread = jnp.sum((estimate.value - value) ** 2, where=known)
        std_error = jnp.sqrt(spread / (n - 1) / n)
    some = n > 0
    return Estimate(
        jnp.where(some, value, unknown), jnp.where(some, std_error, jnp.inf), estimate.ess.sum()
    )
