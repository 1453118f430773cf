"""What the next step needs, and so what a checkpoint holds."""

from typing import Any, NamedTuple

from fjax._typing import Array, Int, Params


class TrainState(NamedTuple):
    """A tree of arrays: donate it, shard it, save it.

    Attributes:
        step: updates so far. Keys of a step are ``jax.random.fold_in(key, state.step)``, so they need no saving.
        params: of the policy.
        opt_state: of the optimiser.
        log_z: of the running estimate of log Z.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    log_z: Any
