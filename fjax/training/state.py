"""What the next step needs, and so what a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fjax.types import Array, Bool, Int, Params


class TrainState(NamedTuple):
    """A tree of arrays: donate it, shard it, save it.

    Attributes:
        step: updates so far. Keys of a step are ``jax.random.fold_in(key, state.step)``, so they
            need no saving.
        params: of the policy.
        opt_state: of the optimiser.
        log_z: of the running estimate of log Z, or of one for each context; empty for what needs
            none.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    log_z: Any


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
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), log_z)


def advance(
    state: TrainState,
    grads: Params,
    optimizer: optax.GradientTransformation,
    *,
    finite: Bool[Array, ""],
    log_z: Any,
) -> TrainState:
    """The state after one step down the gradient; if that is not finite, as it was but for the
    count of steps.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = (optax.apply_updates(state.params, updates), opt_state, log_z)
    old = (state.params, state.opt_state, state.log_z)
    # In the dtype that was there: the state is donated, and carried through loops.
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b).astype(b.dtype), new, old)
    return TrainState(state.step + 1, *kept)
