"""Llama (Touvron et al. 2023) and its relatives, as pure functions over a plain tree of parameters.

RMS norms, rotary positions, heads that share keys and values, a gated MLP. What relatives do
otherwise is a few fields of one configuration, so each is a file like `fjax.models.qwen2`, which
says what its config.json means, and a line in `fjax.models.families`.

Names in the tree of parameters are those of the Hugging Face checkpoint, and weights keep its
``[out, in]`` layout: ``layers_3/mlp/up_proj/weight`` is ``model.layers.3.mlp.up_proj.weight``.

Axes in names: B sequences, T new tokens, S cached columns, D width, H heads, N of them with keys
and values of their own, K head width.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from fjax.models import causal
from fjax.models.base import Family, KVCache, check_numbers, check_sizes
from fjax.models.rope import Rope, read_rope, rotate, turns, write_rope
from fjax.types import Array, DecodeFn, LogitsFn, Params, PRNGKeyArray, ScoreFn

__all__ = [
    "FAMILY",
    "RULES",
    "LlamaConfig",
    "decode_fn",
    "init_cache",
    "init_params",
    "logits_fn",
    "read_config",
    "refuse",
    "score_fn",
    "write_config",
]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama or a relative; names are those of transformers where it has one.

    Attributes:
        model_type: of config.json; says which family writes it.
        vocab_size: tokens that it knows.
        hidden_size: D.
        intermediate_size: width of the MLP.
        num_hidden_layers: blocks.
        num_attention_heads: H.
        num_key_value_heads: N, which divides H; None for H.
        head_dim: K; None for D/H.
        hidden_act: of the gate, one of `fjax.models.causal.ACTIVATIONS`.
        max_position_embeddings: tokens that it can read.
        rms_norm_eps: ε of the norms.
        rope: the rotary positions.
        tie_word_embeddings: whether the head is the embedding again.
        qkv_bias: whether queries, keys and values have biases.
        output_bias: whether the projection of attention into the residual stream has one.
        mlp_bias: whether the MLP has.
        qk_norm: whether queries and keys are normed, head by head, as in Qwen3.
        norm_offset: what is added to the scales of norms, 1 in Gemma.
        embedding_scale: what embeddings are multiplied by, √D in Gemma.
        initializer_range: spread of initial weights.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()  # noqa: RUF009 - a frozen value
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    initializer_range: float = 0.02

    def __post_init__(self):
        sizes = "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"
        check_sizes(self, *sizes, "num_hidden_layers", "num_attention_heads")
        given = [n for n in ("num_key_value_heads", "head_dim") if getattr(self, n) is not None]
        check_sizes(self, *given)
        check_numbers(self, "rms_norm_eps", "initializer_range", "norm_offset", "embedding_scale")
        for name in ("tie_word_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r:.80}.")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads where no head_dim is said, "
                f"got {self.hidden_size} and {self.num_attention_heads}."
            )
        if self.num_attention_heads % self.heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.heads}."
            )
        if self.head_width % 2:
            raise ValueError(
                f"Heads are turned in pairs: head_dim must be even, got {self.head_width}."
            )
        if self.hidden_act not in list(causal.ACTIVATIONS):
            raise ValueError(
                f"hidden_act must be one of {sorted(causal.ACTIVATIONS)}, got {self.hidden_act!r}."
            )

    @property
    def max_length(self) -> int:
        """Columns that it can read: ``max_position_embeddings``."""
        return self.max_position_embeddings

    @property
    def width(self) -> int:
        """D of the hidden states: ``hidden_size``."""
        return self.hidden_size

    @property
    def depth(self) -> int:
        """Blocks: ``num_hidden_layers``."""
        return self.num_hidden_layers

    @property
    def heads(self) -> int:
        """Heads of keys and values: ``num_key_value_heads``."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """K: ``head_dim``."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def computes_as(self, other: object) -> bool:
        """Whether both compute the same function of the same parameters.

        The initial scale may differ, and so may the spelling.

        >>> tiny = LlamaConfig(hidden_size=8, num_attention_heads=2)
        >>> tiny.computes_as(dataclasses.replace(tiny, head_dim=4, num_key_value_heads=2))
        True
        """
        return isinstance(other, LlamaConfig) and self._normal() == other._normal()

    def _normal(self) -> "LlamaConfig":
        return dataclasses.replace(
            self,
            num_key_value_heads=self.heads,
            head_dim=self.head_width,
            initializer_range=0.0,
            model_type="",
        )


def _norm(config: LlamaConfig, params: Params, x: Array) -> Array:
    """``x / √(mean x² + ε) · scale``, in float32 at least and then rounded once.

    Source: Zhang and Sennrich 2019 (RMSNorm, arXiv 1910.07467), equation 4.
    """
    raised = x.astype(causal.wide(x.dtype))
    size = jnp.mean(jnp.square(raised), axis=-1, keepdims=True) + config.rms_norm_eps
    scale = (params["weight"] + config.norm_offset).reshape(*(1,) * (x.ndim - 1), -1)
    return (raised * jax.lax.rsqrt(size) * scale).astype(x.dtype)


def _linear(params: Params, x_BxTxD: Array) -> Array:
    found = causal.linear(x_BxTxD, params["weight"])
    if "bias" not in params:
        return found
    return found + params["bias"].astype(x_BxTxD.dtype)[None, None]


def _attention(config, params, x_BxTxD, turned, mask_BxTxS, cached, length):
    def heads(name):
        found = _linear(params[name], x_BxTxD)
        return found.reshape(*x_BxTxD.shape[:2], -1, config.head_width)

    q_BxTxHxK, k_BxTxNxK, v_BxTxNxK = heads("q_proj"), heads("k_proj"), heads("v_proj")
    if config.qk_norm:
        q_BxTxHxK = _norm(config, params["q_norm"], q_BxTxHxK)
        k_BxTxNxK = _norm(config, params["k_norm"], k_BxTxNxK)
    q_BxHxTxK, k_BxNxSxK, v_BxNxSxK = (
        jnp.moveaxis(x, 2, 1) for x in (q_BxTxHxK, k_BxTxNxK, v_BxTxNxK)
    )
    q_BxHxTxK, k_BxNxSxK = rotate(q_BxHxTxK, turned), rotate(k_BxNxSxK, turned)
    if cached is not None:
        append = partial(jax.lax.dynamic_update_slice_in_dim, start_index=length, axis=2)
        k_BxNxSxK = append(cached[0], k_BxNxSxK.astype(cached[0].dtype))
        v_BxNxSxK = append(cached[1], v_BxNxSxK.astype(cached[1].dtype))
    out_BxTxHxK = causal.attend(q_BxHxTxK, k_BxNxSxK, v_BxNxSxK, mask_BxTxS)
    out_BxTxD = _linear(params["o_proj"], out_BxTxHxK.reshape(*x_BxTxD.shape[:2], -1))
    return out_BxTxD, (k_BxNxSxK, v_BxNxSxK)


def _mlp(config, params, x_BxTxD):
    gate = causal.ACTIVATIONS[config.hidden_act](_linear(params["gate_proj"], x_BxTxD))
    return _linear(params["down_proj"], gate * _linear(params["up_proj"], x_BxTxD))


def _block(config, params, x_BxTxD, turned, mask_BxTxS, cached, length):
    normed = _norm(config, params["input_layernorm"], x_BxTxD)
    att_BxTxD, kept = _attention(
        config, params["self_attn"], normed, turned, mask_BxTxS, cached, length
    )
    x_BxTxD = x_BxTxD + att_BxTxD
    normed = _norm(config, params["post_attention_layernorm"], x_BxTxD)
    return x_BxTxD + _mlp(config, params["mlp"], normed), kept


def _hidden_fn(config: LlamaConfig, dtype: DTypeLike, *, remat: bool = False) -> causal.HiddenFn:
    def hidden(params, tokens, where, cache, dropout_key):
        positions, mask, where, length = causal.attention_mask(tokens, where, cache)
        x_BxTxD = causal.look_up(params["embed_tokens"]["weight"], tokens, dtype=dtype)
        x_BxTxD = x_BxTxD * jnp.asarray(config.embedding_scale, dtype)
        turned = turns(config.rope, positions, config.head_width, dtype)
        blocks = [params[f"layers_{i}"] for i in range(config.num_hidden_layers)]
        keep = causal.kept(params, remat=remat)
        if cache is None:
            through = lambda block, x: _block(config, block, x, turned, mask, None, 0)[0]  # noqa: E731
            x_BxTxD = _through_all(through, blocks, x_BxTxD, keep)
        else:
            layers = zip(blocks, cache.keys, cache.values, strict=True)
            kept = []
            for block, *cached in layers:
                x_BxTxD, layer = _block(config, block, x_BxTxD, turned, mask, cached, length)
                kept.append(layer)
            keys, values = zip(*kept, strict=True)
            cache = KVCache(keys, values, where, length + tokens.shape[1])
        return _norm(config, params["norm"], x_BxTxD), cache

    return hidden


def _through_all(through, blocks, x_BxTxD, keep):
    if causal.can_scan(blocks):
        return causal.scan_blocks(through, blocks, x_BxTxD, keep=keep)
    block = through if keep is None else jax.checkpoint(through, policy=keep)
    for params in blocks:
        x_BxTxD = block(params, x_BxTxD)
    return x_BxTxD


def _head(config: LlamaConfig) -> causal.HeadFn:
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return lambda params, hidden_BxTxD: causal.project(hidden_BxTxD, params[name]["weight"])


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every leaf by its path, with "/" between."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (n * config.head_width for n in (config.num_attention_heads, config.heads))
    attention = {
        "q_proj": (queries, width, config.qkv_bias),
        "k_proj": (keys, width, config.qkv_bias),
        "v_proj": (keys, width, config.qkv_bias),
        "o_proj": (width, queries, config.output_bias),
    }
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    linear = {f"self_attn/{name}": shape for name, shape in attention.items()}
    linear |= {f"mlp/{name}": (*shape, config.mlp_bias) for name, shape in mlp.items()}
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm/weight": (width,),
        "post_attention_layernorm/weight": (width,),
    }
    for name, (rows, columns, bias) in linear.items():
        block[f"{name}/weight"] = (rows, columns)
        block |= {f"{name}/bias": (rows,)} if bias else {}
    if config.qk_norm:
        block |= {f"self_attn/{name}_norm/weight": (config.head_width,) for name in "qk"}
    found: dict[str, tuple[int, ...]] = {"embed_tokens/weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        found |= {f"layers_{i}/{path}": shape for path, shape in block.items()}
    head = {} if config.tie_word_embeddings else {"lm_head/weight": (config.vocab_size, width)}
    return found | {"norm/weight": (width,)} | head


def init_params(
    config: LlamaConfig, rng_key: PRNGKeyArray, *, param_dtype: DTypeLike = jnp.float32
) -> Params:
    """Draws initial parameters: normal of scale ``initializer_range``.

    Args:
        config: the shape of the model.
        rng_key: key of the draw.
        param_dtype: dtype of every leaf.

    Returns:
        A nested dict with the Hugging Face names: ``embed_tokens``, ``layers_0`` …, ``norm`` and,
        unless it is tied, ``lm_head``.

    >>> tiny = LlamaConfig(vocab_size=11, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
    ...                    num_attention_heads=2)
    >>> sorted(init_params(tiny, jax.random.key(0)))
    ['embed_tokens', 'layers_0', 'layers_1', 'lm_head', 'norm']

    Source: transformers' LlamaPreTrainedModel.
    """
    found: dict[str, Any] = {}
    shapes = _shapes(config)
    keys = jax.random.split(rng_key, len(shapes))
    for (path, shape), key in zip(shapes.items(), keys, strict=True):
        *parts, last = path.split("/")
        inner = found
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = _draw(config, path, shape, key).astype(param_dtype)
    return found


def _draw(config: LlamaConfig, path: str, shape: tuple[int, ...], key: PRNGKeyArray) -> Array:
    if path.endswith("bias"):
        return jnp.zeros(shape)
    if path.endswith("norm/weight"):
        return jnp.full(shape, 1 - config.norm_offset)
    return config.initializer_range * jax.random.normal(key, shape)


def init_cache(
    config: LlamaConfig, batch_size: int, length: int, *, dtype: DTypeLike = jnp.float32
) -> KVCache:
    """An empty cache for ``batch_size`` rows of up to ``length`` columns.

    These are prompt and new tokens together. It holds the N heads of keys and values, not all H.

    Raises:
        ValueError: if ``length`` exceeds the model's positions.

    >>> tiny = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=4,
    ...                    num_key_value_heads=2)
    >>> init_cache(tiny, 3, 8).keys[0].shape
    (3, 2, 8, 2)
    """
    causal.check_length(config, length)
    return causal.empty_cache(
        batch_size,
        length,
        layers=config.num_hidden_layers,
        heads=config.heads,
        head_width=config.head_width,
        dtype=dtype,
    )


def logits_fn(
    config: LlamaConfig, *, dtype: DTypeLike = jnp.float32, remat: bool = False
) -> LogitsFn:
    """The teacher-forced model: ``(params, tokens, where, *, start) -> logits``.

    See `fjax.models.causal.logits_fn`. There is no dropout in it.

    Args:
        config: the shape of the model.
        dtype: of the computation (bfloat16 on accelerators); norms, softmax and logits are float32
            all the same.
        remat: compute each block again for its gradient, for less memory.

    Raises:
        ValueError: at trace time, if there are more columns than positions.

    >>> tiny = LlamaConfig(vocab_size=11, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
    ...                    num_attention_heads=2)
    >>> params = init_params(tiny, jax.random.key(0))
    >>> logits_fn(tiny)(params, jnp.zeros((3, 5), jnp.int32), start=2).shape
    (3, 3, 11)

    Source: Touvron et al. 2023 (arXiv 2302.13971), section 2.2.
    """
    return causal.logits_fn(config, _hidden_fn(config, dtype, remat=remat), _head(config))


def decode_fn(config: LlamaConfig, *, dtype: DTypeLike = jnp.float32) -> DecodeFn:
    """The cached model: ``(params, tokens, cache, where) -> (logits of the last column, cache)``.

    See `fjax.models.causal.decode_fn`.

    Args:
        config: the shape of the model.
        dtype: of the computation; the logits are float32.

    Raises:
        ValueError: at trace time, as `fjax.models.causal.decode_fn` says.

    >>> tiny = LlamaConfig(vocab_size=11, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
    ...                    num_attention_heads=2)
    >>> params, cache = init_params(tiny, jax.random.key(0)), init_cache(tiny, 3, 8)
    >>> logits, cache = decode_fn(tiny)(params, jnp.zeros((3, 5), jnp.int32), cache)
    >>> logits.shape, int(cache.length)
    ((3, 11), 5)
    """
    return causal.decode_fn(config, _hidden_fn(config, dtype), _head(config))


def score_fn(config: LlamaConfig, *, dtype: DTypeLike = jnp.float32) -> ScoreFn:
    """A reward model: ``(params, tokens, where) -> scores``.

    A linear head on the hidden state of the last real token, as transformers'
    ``LlamaForSequenceClassification``. See `fjax.models.causal.score_fn`.

    Args:
        config: the shape of the model.
        dtype: of the computation; the scores are float32 at least.

    Raises:
        ValueError: at trace time, if there are more columns than positions.
    """
    return causal.score_fn(config, _hidden_fn(config, dtype))


def refuse(raw: Mapping[str, Any], **supported: Any) -> None:
    """ValueError for an option of config.json that says another thing than what is computed."""
    for name, value in supported.items():
        if raw.get(name, value) not in (None, value):
            raise ValueError(f"it has {name}={raw[name]!r:.80}.")


def read_config(raw: Mapping[str, Any], **of_family: Any) -> LlamaConfig:
    """The configuration that a config.json says, with what is not in it but is the family's."""
    names = {field.name for field in dataclasses.fields(LlamaConfig)} - {"rope"}
    said = {name: value for name, value in raw.items() if name in names and value is not None}
    return LlamaConfig(rope=read_rope(raw), **(said | of_family))


def write_config(config: LlamaConfig, *, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """What every family here writes; the fields that only fjax has are left out."""
    ours = {"rope", "qkv_bias", "output_bias", "qk_norm", "norm_offset", "embedding_scale"}
    fields = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in {*ours, *left_out}
    }
    spelled = {"num_key_value_heads": config.heads, "head_dim": config.head_width}
    return fields | spelled | write_rope(config.rope)


def _read_llama(raw: Mapping[str, Any]) -> LlamaConfig:
    bias = raw.get("attention_bias", False)
    return read_config(raw, qkv_bias=bias, output_bias=bias)


def _write_llama(config: LlamaConfig) -> dict[str, Any]:
    described = {"architectures": ["LlamaForCausalLM"], "attention_bias": config.qkv_bias}
    return described | write_config(config)


def _tensor_name(path: tuple[str, ...]) -> str:
    """``layers_3/mlp/up_proj/weight`` is ``model.layers.3.mlp.up_proj.weight``."""
    name = ".".join(path).replace("layers_", "layers.")
    return name if name.startswith("lm_head") else f"model.{name}"


RULES = (
    # The hidden units of a block are sharded: on the way in, and summed over on the way out.
    (r"(q|k|v|gate|up)_proj/weight(/matrix)?$", (PartitionSpec("tensor", "fsdp"),)),
    (r"(q|k|v|gate|up)_proj/bias$", (PartitionSpec("tensor"),)),
    (r"(o|down)_proj/weight(/matrix)?$", (PartitionSpec("fsdp", "tensor"),)),
    # By tokens where their number can be divided.
    (
        r"(embed_tokens|lm_head)/weight(/matrix)?$",
        (PartitionSpec("tensor", "fsdp"), PartitionSpec(None, ("tensor", "fsdp"))),
    ),
)
"""How parameters are sharded; norms and other biases are too small for it."""

FAMILY = Family(
    name="Llama",
    model_types=("llama",),
    config_type=LlamaConfig,
    read_config=_read_llama,
    write_config=_write_llama,
    init_params=init_params,
    tensor_name=_tensor_name,
    logits_fn=logits_fn,
    decode_fn=decode_fn,
    init_cache=init_cache,
    prefix="model.",
    tied=lambda config: (
        {"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {}
    ),
    # the frequencies, which the first checkpoints have among their weights
    buffers=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    embedding="model.embed_tokens.weight",
    head="lm_head",
    rules=RULES,
    score_fn=score_fn,
    score_architecture="LlamaForSequenceClassification",
)
"""Llama as `fjax.from_pretrained` reads it."""
