"""What the next step needs, and so what a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fjax._typing import Array, Bool, Int, Params


class TrainState(NamedTuple):
    """A tree of arrays: donate it, shard it, save it.

    Attributes:
        step: updates so far. Keys of a step are ``jax.random.fold_in(key, state.step)``, so they need no saving.
        params: of the policy.
        opt_state: of the optimiser.
        log_z: of the running estimate of log Z, or of one for each context; empty for what needs none.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    log_z: Any


def advance(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation, *, finite: Bool[Array, ""], log_z: Any
) -> TrainState:
    """The state after one step down the gradient; if that is not finite, as it was but for the count of steps."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = (optax.apply_updates(state.params, updates), opt_state, log_z)
    old = (state.params, state.opt_state, state.log_z)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return TrainState(state.step + 1, *kept)
