"""GPT-2 (Radford et al. 2019) in Flax Linen, as pure functions over a plain tree of parameters.

The rest of fjax never sees the module: it is given a ``LogitsFn`` (teacher-forced, for scoring and
training) and a ``DecodeFn`` (appends tokens to a key-value cache, for sampling), both closed over a
`GPT2Config` only. Names in the parameter tree are those of the Hugging Face checkpoint and kernels
keep its ``[in, out]`` layout, so that loading is by name and without a transpose.

Axes in names: B sequences, T new tokens, S cached columns, D width, H heads, K head width, V
vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from fjax.models import causal
from fjax.models.base import Family, KVCache, check_numbers, check_sizes
from fjax.types import Array, DecodeFn, LogitsFn, Params, PRNGKeyArray, ScoreFn

ACTIVATIONS = causal.ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Shape of a GPT-2; the defaults are GPT-2 small (124M).

    Field names are those of transformers' ``GPT2Config``.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    activation_function: str = "gelu_new"
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self):
        sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
        check_sizes(self, *sizes, *(() if self.n_inner is None else ("n_inner",)))
        check_numbers(self, "embd_pdrop", "attn_pdrop", "resid_pdrop", below=1.0)
        check_numbers(self, "layer_norm_epsilon", "initializer_range")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, got n_embd={self.n_embd} and "
                f"n_head={self.n_head}."
            )
        # a list, for what a file says may not be hashable
        if self.activation_function not in list(ACTIVATIONS):
            raise ValueError(
                f"activation_function must be one of {sorted(ACTIVATIONS)}, got "
                f"{self.activation_function!r}."
            )

    @property
    def max_length(self) -> int:
        """Columns that it can read: ``n_positions``."""
        return self.n_positions

    @property
    def width(self) -> int:
        """D of the hidden states: ``n_embd``."""
        return self.n_embd

    @property
    def depth(self) -> int:
        """Blocks: ``n_layer``."""
        return self.n_layer

    @property
    def heads(self) -> int:
        """Heads of keys and values: ``n_head``."""
        return self.n_head

    def computes_as(self, other: object) -> bool:
        """Whether both compute the same function of the same parameters.

        Dropout and the initial scale, which only training sees, may differ, and so may the
        spelling: ``n_inner`` written out, or one of the two names of one activation.

        >>> small = GPT2Config()
        >>> others = GPT2Config(n_inner=4 * 768, attn_pdrop=0.0), GPT2Config(n_layer=6)
        >>> small.computes_as(others[0]), small.computes_as(others[1])
        (True, False)
        """
        return isinstance(other, GPT2Config) and self._normal() == other._normal()

    def _normal(self) -> "GPT2Config":
        return dataclasses.replace(
            self,
            n_inner=self.n_inner or 4 * self.n_embd,
            activation_function=self.activation_function.replace("gelu_pytorch_tanh", "gelu_new"),
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            initializer_range=0.0,
        )


class _Attention(nn.Module):
    config: GPT2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxTxD, mask_BxTxS, cached, length, deterministic):
        batch, time, width = x_BxTxD.shape
        heads = self.config.n_head
        qkv = _dense(self, "c_attn", 3 * width)(x_BxTxD).reshape(
            batch, time, 3, heads, width // heads
        )
        q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = jnp.moveaxis(qkv, (2, 3), (0, 2))
        if cached is not None:
            # Heads before columns: the one-token attention then reads the cache without a
            # transposed copy of it.
            append = partial(jax.lax.dynamic_update_slice_in_dim, start_index=length, axis=2)
            k_BxHxTxK = append(cached[0], k_BxHxTxK.astype(cached[0].dtype))
            v_BxHxTxK = append(cached[1], v_BxHxTxK.astype(cached[1].dtype))
        scores = jnp.einsum(
            "bhtk,bhsk->bhts", q_BxHxTxK, k_BxHxTxK, preferred_element_type=causal.wide(self.dtype)
        )
        scores = scores / jnp.sqrt(jnp.asarray(width // heads, scores.dtype))
        # The finite minimum, not -inf: a padded query sees no key at all and must not turn into
        # NaN.
        scores = jnp.where(mask_BxTxS[:, None], scores, jnp.finfo(scores.dtype).min)
        att_BxHxTxS = jax.nn.softmax(scores, axis=-1).astype(v_BxHxTxK.dtype)
        att_BxHxTxS = nn.Dropout(self.config.attn_pdrop)(att_BxHxTxS, deterministic=deterministic)
        out_BxTxHxK = jnp.einsum("bhts,bhsk->bthk", att_BxHxTxS, v_BxHxTxK)
        out_BxTxD = _dense(self, "c_proj", width, residual=True)(
            out_BxTxHxK.reshape(batch, time, width)
        )
        return out_BxTxD, (k_BxHxTxK, v_BxHxTxK)


class _MLP(nn.Module):
    config: GPT2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxTxD):
        width = x_BxTxD.shape[-1]
        hidden = _dense(self, "c_fc", self.config.n_inner or 4 * width)(x_BxTxD)
        return _dense(self, "c_proj", width, residual=True)(
            ACTIVATIONS[self.config.activation_function](hidden)
        )


class _Block(nn.Module):
    config: GPT2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxTxD, mask_BxTxS, cached, length, deterministic):
        dropout = partial(nn.Dropout(self.config.resid_pdrop), deterministic=deterministic)
        attention = _Attention(self.config, self.dtype, name="attn")
        att_BxTxD, kept = attention(
            _layer_norm(self, "ln_1")(x_BxTxD), mask_BxTxS, cached, length, deterministic
        )
        x_BxTxD = x_BxTxD + dropout(att_BxTxD)
        mlp_BxTxD = _MLP(self.config, self.dtype, name="mlp")(_layer_norm(self, "ln_2")(x_BxTxD))
        return x_BxTxD + dropout(mlp_BxTxD), kept


class _GPT2(nn.Module):
    """Hidden states of the new tokens and the cache with them appended (None without a cache)."""

    config: GPT2Config
    dtype: DTypeLike
    keep: Callable[..., bool] | None = None

    def setup(self):
        # What of a block is not kept for the backward pass is computed there again.
        block = (
            _Block if self.keep is None else nn.remat(_Block, static_argnums=(5,), policy=self.keep)
        )
        shape = self.config.n_embd, self.dtype, self.config.initializer_range
        self.wte = _Embed(self.config.vocab_size, *shape)
        self.wpe = _Embed(self.config.n_positions, *shape)
        self.h = [block(self.config, self.dtype, name=f"h_{i}") for i in range(self.config.n_layer)]
        self.ln_f = _layer_norm(self, "ln_f")
        self.embd_dropout = nn.Dropout(self.config.embd_pdrop)

    def __call__(self, tokens_BxT, where_BxT, cache, deterministic):
        positions_BxT, mask_BxTxS, where_BxS, length = causal.attention_mask(
            tokens_BxT, where_BxT, cache
        )
        x_BxTxD = self.wte(tokens_BxT) + self.wpe(positions_BxT)
        x_BxTxD = self.embd_dropout(x_BxTxD, deterministic=deterministic)
        scans = not self.is_initializing() and causal.can_scan(self._blocks())
        if cache is None and deterministic and scans:
            return self.ln_f(self._scan(x_BxTxD, mask_BxTxS)), None
        kept = []
        for i, block in enumerate(self.h):
            cached = None if cache is None else (cache.keys[i], cache.values[i])
            x_BxTxD, layer = block(x_BxTxD, mask_BxTxS, cached, length, deterministic)
            kept.append(layer)
        if cache is not None:
            keys, values = zip(*kept, strict=True)
            cache = KVCache(keys, values, where_BxS, length + tokens_BxT.shape[1])
        return self.ln_f(x_BxTxD), cache

    def _blocks(self):
        return [self.variables["params"][f"h_{i}"] for i in range(self.config.n_layer)]

    def _scan(self, x_BxTxD, mask_BxTxS):
        block = _Block(self.config, self.dtype, parent=None)

        def through(params, x_BxTxD):
            return block.apply({"params": params}, x_BxTxD, mask_BxTxS, None, 0, True)[0]

        return causal.scan_blocks(through, self._blocks(), x_BxTxD, keep=self.keep)


class _Dense(nn.Module):
    """As `flax.linen.Dense`, whose kernel may come with an adapter."""

    features: int
    dtype: DTypeLike
    scale: float

    @nn.compact
    def __call__(self, x_BxTxD):
        init = nn.initializers.normal(self.scale)
        kernel = self.param("kernel", init, (x_BxTxD.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x_BxTxD, bias = x_BxTxD.astype(self.dtype), bias.astype(self.dtype)
        return causal.times(x_BxTxD, kernel) + bias[None, None]


class _Embed(nn.Module):
    """As `flax.linen.Embed`, whose table may come with an adapter."""

    rows: int
    features: int
    dtype: DTypeLike
    scale: float

    @nn.compact
    def __call__(self, ids_BxT):
        init = nn.initializers.normal(self.scale)
        table = self.param("embedding", init, (self.rows, self.features))
        return causal.look_up(table, ids_BxT, dtype=self.dtype)


def _dense(module, name, features, *, residual=False):
    # GPT-2 scales the projections that write into the residual stream by 1/sqrt(2L) at
    # initialisation.
    depth = 2 * module.config.n_layer if residual else 1
    scale = module.config.initializer_range / depth**0.5
    return _Dense(features, module.dtype, scale, name=name)


def _layer_norm(module, name):
    return nn.LayerNorm(module.config.layer_norm_epsilon, dtype=module.dtype, name=name)


def _head(params, hidden_BxTxD):
    return causal.project(hidden_BxTxD, params["wte"]["embedding"])


def _hidden_fn(config, dtype, *, remat=False):
    def hidden(params, tokens, where, cache, dropout_key):
        model = _GPT2(config, dtype, causal.kept(params, remat=remat))
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        found = model.apply(
            {"params": params}, tokens, where, cache, dropout_key is None, rngs=rngs
        )
        return cast(tuple[Array, KVCache], found)

    return hidden


def init_params(
    config: GPT2Config, rng_key: PRNGKeyArray, *, param_dtype: DTypeLike = jnp.float32
) -> Params:
    """Draws GPT-2's initial parameters: normal of scale 0.02.

    Residual projections are divided by √(2L).

    Args:
        config: the shape of the model.
        rng_key: key of the draw.
        param_dtype: dtype of every leaf.

    Returns:
        A nested dict with the Hugging Face names: ``wte``, ``wpe``, ``h_0`` … and ``ln_f``.

    >>> tiny = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2)
    >>> sorted(init_params(tiny, jax.random.key(0)))
    ['h_0', 'h_1', 'ln_f', 'wpe', 'wte']

    Source: Radford et al. 2019, section 2.3.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = _GPT2(config, jnp.float32).init(rng_key, tokens, None, None, True)["params"]
    return jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)


def init_cache(
    config: GPT2Config, batch_size: int, length: int, *, dtype: DTypeLike = jnp.float32
) -> KVCache:
    """An empty cache for ``batch_size`` rows of up to ``length`` columns.

    These are prompt and new tokens together.

    Raises:
        ValueError: if ``length`` exceeds the model's positions.

    >>> tiny = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2)
    >>> init_cache(tiny, 3, 8).keys[0].shape
    (3, 2, 8, 2)
    """
    causal.check_length(config, length)
    return causal.empty_cache(
        batch_size,
        length,
        layers=config.n_layer,
        heads=config.n_head,
        head_width=config.n_embd // config.n_head,
        dtype=dtype,
    )


def logits_fn(
    config: GPT2Config, *, dtype: DTypeLike = jnp.float32, remat: bool = False
) -> LogitsFn:
    """The teacher-forced model: ``(params, tokens, where, *, start) -> logits``.

    Of the next token, in float32. ``logits[:, i]`` predicts the token of column ``start + i + 1``.
    Only columns from ``start`` on go through the head. ``where`` marks real tokens and is needed
    for left padding only: a causal model never sees padding on the right. What is not real may have
    any id; a real one that the vocabulary has not makes the logits NaN from its column on. With
    ``dropout_key`` the configuration's dropout is on (pre-training); without it there is none.

    Args:
        config: the shape of the model.
        dtype: of the computation (bfloat16 on accelerators); softmax and logits are float32 all the
            same.
        remat: compute each block again for its gradient, rather than keep what is in it: a third
            more work, for the memory of one block in place of all.

    Raises:
        ValueError: at trace time, if there are more columns than positions.

    >>> tiny = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2)
    >>> params = init_params(tiny, jax.random.key(0))
    >>> logits_fn(tiny)(params, jnp.zeros((3, 5), jnp.int32), start=2).shape
    (3, 3, 11)
    """
    return causal.logits_fn(config, _hidden_fn(config, dtype, remat=remat), _head)


def score_fn(config: GPT2Config, *, dtype: DTypeLike = jnp.float32) -> ScoreFn:
    """A reward model: ``(params, tokens, where) -> scores``.

    A linear head on the hidden state of the last real token. NaN for a row without a real token, or
    with one that the vocabulary has not.

    Args:
        config: the shape of the model.
        dtype: of the computation; the scores are float32 at least.

    Raises:
        ValueError: at trace time, if there are more columns than positions.

    >>> tiny = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2)
    >>> body, head = init_params(tiny, jax.random.key(0)), {"kernel": jnp.ones((4, 1))}
    >>> params = {"transformer": body, "score": head}
    >>> score_fn(tiny)(params, jnp.zeros((3, 5), jnp.int32), jnp.ones((3, 5), bool)).shape
    (3,)

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2; transformers'
    GPT2ForSequenceClassification.
    """
    return causal.score_fn(config, _hidden_fn(config, dtype))


def decode_fn(config: GPT2Config, *, dtype: DTypeLike = jnp.float32) -> DecodeFn:
    """The cached model: ``(params, tokens, cache, where) -> (logits of the last column, cache)``.

    Call it with a whole prompt to prefill and with one column a step to decode; both are the same
    function. Prompts of different lengths are left-padded, ``where`` marks their real tokens, and
    what is not real may have any id.

    The logits of a row are NaN if its last column is not real, if it has read an id that the
    vocabulary has not, and past the end of the cache or of the model's positions.

    Args:
        config: the shape of the model.
        dtype: of the computation; the logits are float32.

    Raises:
        ValueError: at trace time, for no token, other rows than the cache's, or more tokens than it
            has room for; how full it is can be told there only if its length is not traced.

    >>> tiny = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2)
    >>> params, cache = init_params(tiny, jax.random.key(0)), init_cache(tiny, 3, 8)
    >>> logits, cache = decode_fn(tiny)(params, jnp.zeros((3, 5), jnp.int32), cache)
    >>> logits.shape, int(cache.length)
    ((3, 11), 5)
    """
    return causal.decode_fn(config, _hidden_fn(config, dtype), _head)


# Options of transformers' GPT-2 that change the function, none of them used by a published
# checkpoint of OpenAI's.
_SUPPORTED = {
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "scale_attn_weights": True,
}
# Common names of sizes, which transformers' GPT-2 reads beside its own.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _read_config(raw: Mapping[str, Any]) -> GPT2Config:
    for name, supported in _SUPPORTED.items():
        if raw.get(name, supported) != supported:
            raise ValueError(f"it has {name}={raw[name]!r:.80}.")
    names = {field.name: field.name for field in dataclasses.fields(GPT2Config)} | _ALIASES
    chosen = {}
    for name, value in raw.items():
        field = names.get(name)
        if field in chosen and chosen[field] != value:
            raise ValueError(
                f"it says two things of {field}: {chosen[field]!r} and {name}={value!r}."
            )
        if field is not None:
            chosen[field] = value
    return GPT2Config(**chosen)


def _write_config(config: GPT2Config) -> dict[str, Any]:
    described = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    return described | dataclasses.asdict(config)


def _tensor_name(path: tuple[str, ...]) -> str:
    """``h_3/attn/c_attn/kernel`` is ``transformer.h.3.attn.c_attn.weight``."""
    parts = [f"h.{part[2:]}" if part.startswith("h_") else part for part in path]
    return ".".join(["transformer", *parts[:-1], "bias" if parts[-1] == "bias" else "weight"])


RULES = (
    # The hidden units of a block are sharded: on the way in, and summed over on the way out.
    (r"(c_attn|c_fc)/kernel(/matrix)?$", (PartitionSpec("fsdp", "tensor"),)),
    (r"(c_attn|c_fc)/bias$", (PartitionSpec("tensor"),)),
    (r"c_proj/kernel(/matrix)?$", (PartitionSpec("tensor", "fsdp"),)),
    # By tokens where their number can be divided; GPT-2's, 50257, cannot.
    (
        r"wte/embedding(/matrix)?$",
        (PartitionSpec("tensor", "fsdp"), PartitionSpec(None, ("tensor", "fsdp"))),
    ),
    (r"wpe/embedding(/matrix)?$", (PartitionSpec(None, ("tensor", "fsdp")),)),
)
"""How parameters are sharded; scales and other biases are too small for it."""

FAMILY = Family(
    name="GPT-2",
    model_types=("gpt2",),
    config_type=GPT2Config,
    read_config=_read_config,
    write_config=_write_config,
    init_params=init_params,
    tensor_name=_tensor_name,
    logits_fn=logits_fn,
    decode_fn=decode_fn,
    init_cache=init_cache,
    prefix="transformer.",
    tied=lambda config: {"lm_head.weight": "wte.weight"},
    # the causal mask, which the first checkpoints have among their weights
    buffers=r"h\.\d+\.attn\.(masked_)?bias",
    embedding="transformer.wte.weight",
    rules=RULES,
    score_fn=score_fn,
    score_architecture="GPT2ForSequenceClassification",
)
"""GPT-2 as `fjax.from_pretrained` reads it."""
