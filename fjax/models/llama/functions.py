"""What a Llama computes.

Axes in names: B sequences, T new tokens, S cached columns, D width, H heads, N of them with keys
and values of their own, K head width.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fjax.models import causal
from fjax.models.base import KVCache
from fjax.models.llama.config import LlamaConfig
from fjax.models.rope import rotate, turns
from fjax.types import Array, DecodeFn, LogitsFn, Params, PRNGKeyArray, ScoreFn

__all__ = ["decode_fn", "init_cache", "init_params", "logits_fn", "score_fn"]


def _norm(config: LlamaConfig, params: Params, x: Array) -> Array:
    """``x / √(mean x² + ε) · scale``, in float32 at least and then rounded once.

    Source: Zhang and Sennrich 2019 (RMSNorm, arXiv 1910.07467), equation 4.
    """
    raised = x.astype(causal.wide(x.dtype))
    size = jnp.mean(jnp.square(raised), axis=-1, keepdims=True) + config.rms_norm_eps
    scale = params["weight"].astype(raised.dtype) + config.norm_offset
    scale = scale.reshape(*(1,) * (x.ndim - 1), -1)
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
        # Kept as they were turned: positions count real tokens, so that of a column never changes.
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
