"""What every causal decoder has in common, whatever is in its blocks.

These are masks, positions, the cache, padding, and ids that mean nothing. A family brings hidden
states and a head; from these `logits_fn`, `decode_fn` and `score_fn` make the functions that the
rest of fjax is given. Padding may then stand anywhere and hold any id, a real id that the
vocabulary has not gives NaN where it counts, and the numbers with and without a cache are the same.

Axes in names: B sequences, T new tokens, S cached columns, D width, H heads, K head width, V
vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fjax._checks import as_mask, is_concrete
from fjax._sharding import spread_as
from fjax.adapters import AdaptedMatrix
from fjax.models.base import KVCache, ModelConfig
from fjax.sharding import Divided, save_all_but_gathered
from fjax.types import Array, Bool, DecodeFn, Float, Int, LogitsFn, Params, PRNGKeyArray, ScoreFn

__all__ = [
    "ACTIVATIONS",
    "HeadFn",
    "HiddenFn",
    "attend",
    "attention_mask",
    "can_scan",
    "check_length",
    "decode_fn",
    "empty_cache",
    "logits_fn",
    "is_divided",
    "kept",
    "linear",
    "look_up",
    "project",
    "scan_blocks",
    "score_fn",
    "times",
    "whole",
    "wide",
]


@runtime_checkable
class HiddenFn(Protocol):
    """Hidden states of the new tokens, and the cache with them appended (None without a cache).

    With a cache, an id equal to the size of the vocabulary must be looked up as NaN, as a lookup
    beyond an embedding's rows is in ``jnp.take`` and Flax. Without a ``dropout_key`` there is no
    dropout.
    """

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        where: Bool[Array, "B T"],
        cache: Any,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """``[B, T, D]`` and the longer cache."""
        ...


HeadFn = Callable[[Params, Float[Array, "B T D"]], Float[Array, "B T V"]]
"""(params, hidden states) -> logits."""


def logits_fn(config: ModelConfig, hidden_fn: HiddenFn, head: HeadFn) -> LogitsFn:
    """The teacher-forced model: ``(params, tokens, where, *, start) -> logits`` of the next token.

    ``logits[:, i]`` predicts the token of column ``start + i + 1``. Only columns from ``start`` on
    go through the head. What is not real may have any id; a real one that the vocabulary has not
    makes the logits NaN from its column on.

    Args:
        config: its vocabulary and its length.
        hidden_fn: see `HiddenFn`.
        head: (params, hidden states) -> logits.

    Raises:
        ValueError: at trace time, if there are more columns than the model can read.

    A model that sees a token as itself, and predicts what is most alike:

    >>> from fjax.models.gpt2 import GPT2Config
    >>> tiny = GPT2Config(vocab_size=3, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    >>> def hidden_fn(params, tokens, where, cache, dropout_key):
    ...     return params[tokens], cache
    >>> model = logits_fn(tiny, hidden_fn, lambda params, hidden: hidden @ params.T)
    >>> model(jnp.eye(3, 4), jnp.array([[0, 2, 1]]))[0].argmax(-1).tolist()
    [0, 2, 1]
    """

    def apply(
        params: Params,
        tokens: Int[Array, "B T"],
        where: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        start: int = 0,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B U V"]:
        tokens, where, unknown = _real(config, tokens, where)
        check_length(config, tokens.shape[1])
        return spread_as(tokens, run, params, tokens, where, unknown, start, dropout_key)

    def run(params, tokens, where, unknown, start, dropout_key):
        hidden, _ = hidden_fn(params, tokens, where, None, dropout_key)
        logits = head(params, hidden[:, start:])
        # NaN in the logits and nowhere before, so that what is not counted of them has gradient 0,
        # not 0 · NaN. In a branch: a select over the vocabulary would be paid by every scoring.
        nan_from_there = partial(
            jnp.where, jnp.cumsum(unknown, axis=1)[:, start:, None] > 0, jnp.nan
        )
        return jax.lax.cond(unknown.any(), nan_from_there, lambda logits: logits, logits)

    return apply


def score_fn(config: ModelConfig, hidden_fn: HiddenFn) -> ScoreFn:
    """A reward model: ``(params, tokens, where) -> scores``.

    A linear head on the hidden state of the last real token, with the parameters
    ``{"transformer": of hidden_fn, "score": {"kernel": [D, 1]}}``. NaN for a row without a real
    token, or with one that the vocabulary has not.

    Args:
        config: its vocabulary and its length.
        hidden_fn: see `HiddenFn`.

    Raises:
        ValueError: at trace time, if there are more columns than the model can read.
    """

    def apply(
        params: Params, tokens: Int[Array, "B T"], where: Bool[Array, "B T"] | Int[Array, "B T"]
    ) -> Float[Array, "B"]:
        tokens, where, unknown = _real(config, tokens, where)
        check_length(config, tokens.shape[1])
        return spread_as(tokens, run, params, tokens, where, unknown)

    def run(params, tokens, where, unknown):
        hidden, _ = hidden_fn(params["transformer"], tokens, where, None, None)
        last = tokens.shape[1] - 1 - jnp.argmax(where[:, ::-1], axis=1)
        pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        kernel = params["score"]["kernel"].astype(pooled.dtype)
        scores = jnp.matmul(pooled, kernel, preferred_element_type=wide(pooled.dtype))[:, 0]
        return jnp.where(where.any(1) & ~unknown.any(1), scores, jnp.nan)

    return apply


def decode_fn(config: ModelConfig, hidden_fn: HiddenFn, head: HeadFn) -> DecodeFn:
    """The cached model: ``(params, tokens, cache, where) -> (logits of the last column, cache)``.

    A whole prompt at once or one column a step are the same function. The logits of a row are NaN
    if its last column is not real, if it has read an id that the vocabulary has not, and past the
    end of the cache.

    Args:
        config: its vocabulary and its length.
        hidden_fn: see `HiddenFn`.
        head: (params, hidden states) -> logits.

    Raises:
        ValueError: at trace time, for no token, other rows than the cache's, or more tokens than it
            has room for; how full it is can be told there only if its length is not traced.
    """

    def apply(
        params: Params,
        tokens: Int[Array, "B T"],
        cache: KVCache,
        where: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        tokens, where, unknown = _real(config, tokens, where)
        _check_room(tokens, cache)
        # One past the vocabulary is looked up as NaN, and stays in the cache for the tokens that
        # follow.
        tokens = jnp.where(unknown, config.vocab_size, tokens)
        return spread_as(tokens, run, params, tokens, where, cache)

    def run(params, tokens, where, cache):
        hidden, longer = hidden_fn(params, tokens, where, cache, None)
        valid = where[:, -1:] & (longer.length <= cache.where.shape[1])
        return jnp.where(valid, head(params, hidden[:, -1:])[:, 0], jnp.nan), longer

    return apply


def empty_cache(
    batch_size: int, length: int, *, layers: int, heads: int, head_width: int, dtype: DTypeLike
) -> KVCache:
    """A cache of ``length`` columns with nothing in it.

    >>> empty_cache(3, 8, layers=2, heads=2, head_width=4, dtype=jnp.float32).keys[0].shape
    (3, 2, 8, 4)
    """
    shape = (batch_size, heads, length, head_width)
    # One buffer a leaf, never a shared one: the cache is donated to the decoding program.
    keys = tuple(jnp.zeros(shape, dtype) for _ in range(layers))
    values = tuple(jnp.zeros(shape, dtype) for _ in range(layers))
    return KVCache(keys, values, jnp.zeros((batch_size, length), bool), jnp.int32(0))


def attention_mask(
    tokens_BxT: Int[Array, "B T"], where_BxT: Bool[Array, "B T"] | None, cache: KVCache | None
) -> tuple[Array, Array, Array, Array]:
    """Positions of the new tokens, who may see whom, real columns, columns before.

    The last is how many columns came before. In or out of a cache.

    >>> where = jnp.array([[False, True, True]])
    >>> positions, mask, _, _ = attention_mask(jnp.array([[9, 1, 2]]), where, None)
    >>> positions.tolist(), mask[0].astype(int).tolist()
    ([[0, 0, 1]], [[0, 0, 0], [0, 1, 0], [0, 1, 1]])
    """
    if where_BxT is None:
        where_BxT = jnp.ones_like(tokens_BxT, bool)
    if cache is None:
        where_BxS, length, seen_B = where_BxT, jnp.int32(0), 0
    else:
        seen_B = cache.where.sum(-1, dtype=jnp.int32)[:, None]
        where_BxS = jax.lax.dynamic_update_slice_in_dim(
            cache.where, where_BxT, cache.length, axis=1
        )
        length = cache.length
    # Counting real tokens, not columns, makes left padding exact; padding itself reads position 0,
    # unseen by all.
    positions_BxT = jnp.maximum(seen_B + jnp.cumsum(where_BxT, -1, dtype=jnp.int32) - 1, 0)
    query_Tx1 = length + jnp.arange(tokens_BxT.shape[1])[:, None]
    causal_1xTxS = (jnp.arange(where_BxS.shape[1])[None, :] <= query_Tx1)[None]
    return positions_BxT, causal_1xTxS & where_BxS[:, None, :], where_BxS, length


def attend(
    q_BxHxTxK: Array, k_BxNxSxK: Array, v_BxNxSxK: Array, mask_BxTxS: Bool[Array, "B T S"]
) -> Array:
    """Attention of H heads, of which each H/N share keys and values: ``[B, T, H, K]``.

        softmax(q · kᵀ / √K) · v,    over the columns of the mask

    Keys and values are read as they are: no copy of them for each head is made.

    >>> q, k, v = jnp.zeros((1, 4, 1, 2)), jnp.zeros((1, 2, 3, 2)), jnp.ones((1, 2, 3, 2))
    >>> attend(q, k, v, jnp.ones((1, 1, 3), bool)).shape
    (1, 1, 4, 2)

    Source: Ainslie et al. 2023 (GQA, arXiv 2305.13245), section 2.2.
    """
    batch, heads, time, width = q_BxHxTxK.shape
    q_BxNxGxTxK = q_BxHxTxK.reshape(batch, k_BxNxSxK.shape[1], -1, time, width)
    dtype = wide(q_BxHxTxK.dtype)
    scores = jnp.einsum("bngtk,bnsk->bngts", q_BxNxGxTxK, k_BxNxSxK, preferred_element_type=dtype)
    # The finite minimum, not -inf: a padded query sees no key at all and must not turn into NaN.
    scores = jnp.where(mask_BxTxS[:, None, None], scores * width**-0.5, jnp.finfo(dtype).min)
    att_BxNxGxTxS = jax.nn.softmax(scores, axis=-1).astype(v_BxNxSxK.dtype)
    out_BxTxNxGxK = jnp.einsum("bngts,bnsk->btngk", att_BxNxGxTxS, v_BxNxSxK)
    return out_BxTxNxGxK.reshape(batch, time, heads, width)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""By their names in transformers."""

Matrix = Array | AdaptedMatrix | Divided
"""A parameter as it comes: an array, with an adapter, sharded over fsdp, or both."""


def times(x_BxTxD: Array, kernel: Matrix) -> Array:
    """``x · kernel``, in the dtype of x; with an adapter ``x · W + (x · down) · up``.

    >>> times(jnp.ones((1, 1, 4), jnp.bfloat16), jnp.ones((4, 3))).dtype
    dtype(bfloat16)
    """
    if isinstance(kernel, AdaptedMatrix):
        return times(x_BxTxD, kernel.matrix) + times(times(x_BxTxD, kernel.down), kernel.up)
    # Rows in one axis. From [B, T, D] XLA on a CPU takes the kernel's gradient of a transposed
    # copy, and the backward pass of a block takes twice as long.
    *axes, width = x_BxTxD.shape
    found = x_BxTxD.reshape(-1, width) @ whole(kernel, x_BxTxD.dtype)
    return found.reshape(*axes, -1)


def linear(x_BxTxD: Array, weight: Matrix) -> Array:
    """``x · weightᵀ``, in the dtype of x: of a weight ``[out, in]``, as torch's Linear has it.

    >>> linear(jnp.ones((1, 1, 4), jnp.bfloat16), jnp.ones((3, 4))).shape
    (1, 1, 3)
    """
    if isinstance(weight, AdaptedMatrix):
        change = linear(linear(x_BxTxD, weight.up), weight.down)
        return linear(x_BxTxD, weight.matrix) + change
    *axes, width = x_BxTxD.shape  # rows in one axis, as in `times`
    found = x_BxTxD.reshape(-1, width) @ whole(weight, x_BxTxD.dtype).T
    return found.reshape(*axes, -1)


def whole(matrix: Array | Divided, dtype: DTypeLike) -> Array:
    """A parameter in the dtype of the computation, gathered if it is sharded over fsdp.

    >>> whole(jnp.ones(2), jnp.bfloat16).dtype
    dtype(bfloat16)
    """
    return matrix.gather(dtype) if isinstance(matrix, Divided) else matrix.astype(dtype)


def is_divided(params: Params) -> bool:
    """Whether some of it is sharded over fsdp, to be gathered where it is used."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Divided))
    return any(isinstance(leaf, Divided) for leaf in leaves)


def kept(params: Params, *, remat: bool = False) -> Callable[..., bool] | None:
    """What blocks keep for the backward pass, as a policy of `jax.checkpoint`; None for all of it.

    With ``remat`` nothing; else all but what was gathered of `Divided` parameters.
    """
    if remat:
        return jax.checkpoint_policies.nothing_saveable
    return save_all_but_gathered if is_divided(params) else None


def can_scan(blocks: Sequence[Params]) -> bool:
    """Whether they are sharded over fsdp, and alike: adapters may be of some of them only."""
    return is_divided(blocks[0]) and len({jax.tree.structure(block) for block in blocks}) == 1


def scan_blocks(
    block: Callable[[Params, Array], Array],
    blocks: Sequence[Params],
    x_BxTxD: Array,
    *,
    keep: Callable[..., bool] | None = None,
) -> Array:
    """Through blocks of the same shapes in turn: `jax.lax.scan` over one that is compiled once.

    What one block gathers, and its whole gradient, is freed before the next one's is made. The
    parameters are copied for it, which costs little where each device has a shard of them.

    >>> double = lambda params, x: params["scale"] * x
    >>> scan_blocks(double, [{"scale": jnp.array(2.0)}] * 3, jnp.ones((1, 1, 1))).item()
    8.0
    """
    step = jax.checkpoint(lambda x, params: (block(params, x), None), policy=keep)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return jax.lax.scan(step, x_BxTxD, stacked)[0]


def look_up(table: Matrix, ids_BxT: Array, *, dtype: DTypeLike) -> Array:
    """Rows of a table; NaN for an id beyond it.

    >>> look_up(jnp.eye(3), jnp.array([[2, 3]]), dtype=jnp.float32).tolist()
    [[[0.0, 0.0, 1.0], [nan, nan, nan]]]
    """
    if isinstance(table, AdaptedMatrix):
        found = look_up(table.matrix, ids_BxT, dtype=dtype)
        return found + times(look_up(table.down, ids_BxT, dtype=dtype), table.up)
    return jnp.take(whole(table, dtype), ids_BxT, axis=0)


def project(hidden_BxTxD: Array, embedding: Matrix) -> Array:
    """Logits in float32 at least, whatever the dtype of the computation: ``hidden · embeddingᵀ``.

    >>> project(jnp.ones((1, 1, 4), jnp.bfloat16), jnp.ones((3, 4))).dtype
    dtype('float32')
    """
    if isinstance(embedding, AdaptedMatrix):
        change = project(project(hidden_BxTxD, embedding.up), embedding.down)
        return project(hidden_BxTxD, embedding.matrix) + change
    dtype = hidden_BxTxD.dtype
    return jnp.einsum(
        "btd,vd->btv", hidden_BxTxD, whole(embedding, dtype), preferred_element_type=wide(dtype)
    )


def wide(dtype: DTypeLike) -> Any:
    """float32, or the dtype itself if it is wider: in float64 nothing is rounded on the way.

    >>> wide(jnp.bfloat16)
    dtype('float32')
    """
    return jnp.promote_types(dtype, jnp.float32)


def check_length(config: ModelConfig, columns: int) -> None:
    """ValueError if the model cannot read so many columns."""
    if config.max_length is not None and columns > config.max_length:
        raise ValueError(
            f"This model has {config.max_length} positions but was given {columns} columns (prompt "
            f"and new tokens together); shorten the prompt or ask for fewer new tokens."
        )


def _real(config, tokens, where):
    """The tokens as int32, which of them are real, and which of these are unknown.

    Unknown are those that the vocabulary has not: their predictions are NaN.

    What is not real may hold any id, and is read as token 0, which nobody sees.
    """
    if jnp.ndim(tokens) != 2:
        raise ValueError(
            f"tokens must be [B, T], got {list(jnp.shape(tokens))}; one sequence is tokens[None]."
        )
    tokens = jnp.asarray(tokens)
    where = jnp.ones_like(tokens, bool) if where is None else as_mask(where, tokens)
    tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.int32))
    unknown = where & ((tokens < 0) | (tokens >= config.vocab_size))
    return jnp.where(where & ~unknown, tokens, 0).astype(jnp.int32), where, unknown


def _check_room(tokens, cache):
    rows, columns = cache.where.shape
    # Where the length is traced, a full cache is found by the program, which then gives NaN.
    filled = int(cache.length) if is_concrete(cache.length) else 0
    if tokens.shape[1] == 0 or tokens.shape[0] != rows or filled + tokens.shape[1] > columns:
        raise ValueError(
            f"The cache has {rows} rows and {columns} columns, {filled} of them known to be "
            f"filled, and cannot take tokens of shape {list(tokens.shape)}; make it with "
            f"init_cache for all rows, and for prompt and new tokens together."
        )
