"""What signatures share: arrays, parameters, and the functions a user brings."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

__all__ = [
    "Array",
    "Bool",
    "DecodeFn",
    "Float",
    "Int",
    "LogProbFn",
    "LogitsFn",
    "PRNGKeyArray",
    "Params",
    "PyTree",
    "SampleFn",
    "ScoreFn",
    "TokenLogProbFn",
]

Params = Any
"""A tree of arrays that only the model looks into."""


@runtime_checkable
class LogitsFn(Protocol):
    """The teacher-forced model: logits of the next token at every column from ``start`` on."""

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        where: Bool[Array, "B T"] | None = None,
        *,
        start: int = 0,
    ) -> Float[Array, "B U V"]: ...


@runtime_checkable
class DecodeFn(Protocol):
    """The cached model: appends tokens to the cache, gives the logits after the last."""

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        cache: Any,
        where: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B V"], Any]: ...


@runtime_checkable
class ScoreFn(Protocol):
    """A reward model: one number a sequence."""

    def __call__(
        self, params: Params, tokens: Int[Array, "B T"], where: Bool[Array, "B T"]
    ) -> Float[Array, "B"]: ...


@runtime_checkable
class LogProbFn(Protocol):
    """Log-probability of each sequence, summed in float32 over the tokens that ``where`` counts."""

    def __call__(
        self, params: Params, tokens: Int[Array, "B T"], where: Bool[Array, "B T"]
    ) -> Float[Array, "B"]: ...


@runtime_checkable
class TokenLogProbFn(Protocol):
    """Log-probability of each token, 0 where ``where`` does not count it."""

    def __call__(
        self, params: Params, tokens: Int[Array, "B T"], where: Bool[Array, "B T"]
    ) -> Float[Array, "B T"]: ...


@runtime_checkable
class SampleFn(Protocol):
    """Whatever draws: ``each`` completions of C prompts, as a `fjax.Samples` of C·each rows.

    The rows of a prompt are together. ``row_ids`` number the prompts, so that rows with other
    numbers draw independently from the same key. ``log_probs`` of the samples are those of the
    distribution that was really sampled from.
    """

    def __call__(
        self,
        params: Params,
        rng_key: PRNGKeyArray,
        tokens: Int[Array, "C P"],
        where: Bool[Array, "C P"],
        row_ids: Int[Array, "C"],
        *,
        each: int,
    ) -> Any: ...
