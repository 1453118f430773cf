"""The shape of a Llama or a relative, and what a config.json says of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fjax.models import causal
from fjax.models.base import check_flags, check_numbers, check_sizes
from fjax.models.rope import Rope, read_rope, write_rope

__all__ = ["LlamaConfig", "read_config", "refuse_window", "write_config"]


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
        check_flags(self, "tie_word_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")
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


_OURS = ("rope", "qkv_bias", "output_bias", "qk_norm", "norm_offset", "embedding_scale")
"""Fields that no config.json has by these names: each family knows what it means by them."""


def read_config(
    raw: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None, **fixed: Any
) -> LlamaConfig:
    """The configuration that a config.json says.

    Args:
        raw: what config.json holds.
        defaults: of the family, where they are others than those of Llama; for what ``raw`` has
            not.
        **fixed: fields that are the family's, whatever ``raw`` has.

    Raises:
        ValueError: for a shape that is none, and rotary positions that are not computed.

    >>> read_config({"hidden_size": 64}, defaults={"head_dim": 8}, qk_norm=True).head_width
    8
    """
    names = {field.name for field in dataclasses.fields(LlamaConfig)} - {*_OURS}
    said = {name: value for name, value in raw.items() if name in names}
    return LlamaConfig(rope=read_rope(raw), **{**(defaults or {}), **said, **fixed})


def write_config(
    config: LlamaConfig, read_config: Callable[[Mapping[str, Any]], LlamaConfig], **said: Any
) -> dict[str, Any]:
    """What config.json is to say.

    Args:
        config: the configuration.
        read_config: of the family.
        **said: what is the family's, ``architectures`` among it.

    Raises:
        ValueError: if it would not be read as the same model, since the family has no words for it.
    """
    fields = dataclasses.asdict(config)
    spelled = {"num_key_value_heads": config.heads, "head_dim": config.head_width}
    written = {name: value for name, value in fields.items() if name not in _OURS} | spelled
    written |= write_rope(config.rope) | said
    if not read_config(written).computes_as(config):
        raise ValueError(
            f"A config.json of model_type {config.model_type!r} cannot say all of {config}: biases "
            f"and norms must be those of its family. Take the model_type of another."
        )
    return written


def refuse_window(window: Any, config: LlamaConfig) -> None:
    """ValueError for attention to the last ``window`` tokens, if a text may have more.

    >>> refuse_window(4096, LlamaConfig(max_position_embeddings=4096))
    """
    length = config.max_position_embeddings
    if window is not None and not (isinstance(window, int) and window >= length):
        raise ValueError(
            f"it has sliding_window={window!r:.80}, below max_position_embeddings={length}, and "
            f"fjax attends to all of a text. For texts that the window holds, lower "
            f"max_position_embeddings in the file to it."
        )
