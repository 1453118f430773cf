"""Rotary position embeddings: the angle between two tokens tells how far apart they are.

    (x_i, x_{i + K/2}) is turned by position · ω_i,    ω_i = θ^(-2i/K)

Models that were trained on short texts and then on longer ones have other frequencies, by one of a
few recipes that their config.json names. Each is a function of the configuration alone, so that a
sequence has the same probabilities in every batch; what is not, is refused.

Source: Su et al. 2021 (RoFormer, arXiv 2104.09864), section 3.2; the recipes are those of
transformers' ``modeling_rope_utils``, and say below where they are from.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fjax.models.base import check_flags, check_numbers
from fjax.models.causal import wide
from fjax.types import Array

__all__ = ["Rope", "frequencies", "read_rope", "rotate", "turns", "write_rope"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """What a config.json says of rotary embeddings; names are those of transformers.

    Attributes:
        rope_theta: θ.
        rope_type: the recipe, one of "default", "dynamic", "linear", "llama3", "yarn".
        factor: how many times longer texts became; for all but "default".
        original_max_position_embeddings: how long they were before; "llama3" and "yarn".
        low_freq_factor: turns in that length below which a frequency is divided; "llama3".
        high_freq_factor: turns above which it stays; "llama3".
        beta_slow: the same as ``low_freq_factor`` for "yarn".
        beta_fast: the same as ``high_freq_factor`` for "yarn".
        truncate: whether these bounds are rounded to whole dimensions; "yarn".
        attention_factor: of sine and cosine; None for what "yarn" takes it to be.
        mscale: for that; "yarn".
        mscale_all_dim: the same.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 1
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        if self.rope_type not in list(_RECIPES):  # a list, for a file may say what has no hash
            raise ValueError(
                f"rope_type must be one of {', '.join(_RECIPES)}, got {self.rope_type!r:.80}."
            )
        numbers = [name for name in _fields() if name not in ("rope_type", "truncate")]
        given = [name for name in numbers if getattr(self, name) is not None]
        check_numbers(self, *given)
        check_flags(self, "truncate")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}.")
        positive = "factor", "original_max_position_embeddings", "low_freq_factor", "beta_slow"
        for name in positive:
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be positive, got 0.")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, high) <= getattr(self, low):
                raise ValueError(
                    f"{high} must be above {low}, got {getattr(self, high)} and "
                    f"{getattr(self, low)}."
                )


def frequencies(rope: Rope, width: int) -> tuple[np.ndarray, float]:
    """ω of each pair, and the factor of sine and cosine, for heads of this width.

    In float32, rounded where transformers rounds, since that is what the model was trained with: at
    position 8000 a last bit of ω is worth 5e-4 of an angle.

    >>> omega, factor = frequencies(Rope(), 4)
    >>> omega.tolist(), factor
    ([1.0, 0.009999999776482582], 1.0)
    """
    # A power in float64 is what torch's in float32 comes to; numpy's is a bit off one time in ten.
    powers = np.float64(rope.rope_theta) ** (np.arange(0, width, 2) / width)
    omega = np.float32(1) / powers.astype(np.float32)
    return _RECIPES[rope.rope_type](rope, omega, width)


def _default(rope: Rope, omega: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    # "dynamic" is other frequencies for texts longer than the model's length, which fjax does not
    # read; up to there it is this.
    return omega, 1.0


def _linear(rope: Rope, omega: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """Positions divided by the factor: Chen et al. 2023 (arXiv 2306.15595)."""
    return omega / np.float32(rope.factor), 1.0


def _llama3(rope: Rope, omega: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """What turns often stays, what turns seldom is divided, with a ramp between (Llama 3.1)."""
    length, factor = rope.original_max_position_embeddings, rope.factor
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = np.float32(2 * math.pi) / omega
    ramp = (np.float32(length) / wavelength - np.float32(low)) / np.float32(high - low)
    between = (1 - ramp) * omega / np.float32(factor) + ramp * omega
    often, seldom = wavelength < length / high, wavelength > length / low
    return np.select([often, seldom], [omega, omega / np.float32(factor)], between), 1.0


def _yarn(rope: Rope, omega: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """The same ramp over dimensions, and sharper attention: Peng et al. 2023 (arXiv 2309.00071)."""
    length, factor = rope.original_max_position_embeddings, rope.factor
    # the dimensions that turn so often in that length
    low, high = (
        width * math.log(length / (often * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
        for often in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (np.arange(width // 2, dtype=np.float32) - low) / (high - low or 0.001)
    kept = 1 - np.clip(ramp, 0, 1).astype(np.float32)
    divided = omega / np.float32(factor)
    return divided * (1 - kept) + omega * kept, _yarn_attention(rope, factor)


def _yarn_attention(rope: Rope, factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


_RECIPES: dict[str, Callable[[Rope, np.ndarray, int], tuple[np.ndarray, float]]] = {
    "default": _default,
    "dynamic": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
# What each recipe has to be told, and what it may be told.
_NEEDED = {
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONS = {
    "yarn": (
        "beta_slow",
        "beta_fast",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    )
}


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Rope)]


def turns(rope: Rope, positions_BxT: Array, width: int, dtype: Any) -> tuple[Array, Array]:
    """Cosine and sine ``[B, 1, T, K/2]`` by which heads are turned, in float32 at least.

    >>> cos, sin = turns(Rope(), jnp.array([[0, 1]]), 4, jnp.float32)
    >>> cos.shape, sin[0, 0, 0].tolist()
    ((1, 1, 2, 2), [0.0, 0.0])
    """
    omega, factor = frequencies(rope, width)
    angles = positions_BxT[:, None, :, None].astype(wide(dtype)) * omega[None, None, None]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BxHxTxK: Array, turned: tuple[Array, Array]) -> Array:
    """Heads turned by their positions; see `turns`.

    >>> quarter = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
    >>> rotate(jnp.array([[[[1.0, 2.0]]]]), quarter).tolist()
    [[[[-2.0, 1.0]]]]
    """
    cos, sin = turned
    first, second = jnp.split(x_BxHxTxK.astype(cos.dtype), 2, axis=-1)
    found = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return found.astype(x_BxHxTxK.dtype)


def read_rope(raw: Mapping[str, Any]) -> Rope:
    """The rotary embeddings that a config.json says.

    ``rope_parameters`` is of transformers 5, ``rope_scaling`` beside ``rope_theta`` of earlier
    ones; where there are both, transformers takes the second, and so does this.

    Raises:
        ValueError: for another recipe, one that lacks a number, and a part of the head only.

    >>> read_rope({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}).factor
    2.0
    """
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"its rope parameters must be an object, got {found!r:.80}.")
    part = found.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ValueError(f"it has partial_rotary_factor={part!r:.80}, and fjax turns whole heads.")
    kind = found.get("rope_type", found.get("type", "default"))
    length = found.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
    said = {
        "rope_theta": raw.get("rope_theta"),
        **found,
        "rope_type": kind,
        "original_max_position_embeddings": raw.get("original_max_position_embeddings", length),
    }
    names = [name for name in _names_of(kind) if said.get(name) is not None]
    lacking = [name for name in _NEEDED.get(str(kind), ()) if name not in names]
    if lacking:
        raise ValueError(f"its rope_type={kind!r:.80} lacks {', '.join(lacking)}.")
    return Rope(**{name: said[name] for name in names})


def _names_of(kind: Any) -> tuple[str, ...]:
    kind = str(kind)
    return ("rope_theta", "rope_type", *_NEEDED.get(kind, ()), *_OPTIONS.get(kind, ()))


def write_rope(rope: Rope) -> dict[str, Any]:
    """What config.json is to say, for transformers 5 and for earlier ones.

    >>> write_rope(Rope(rope_theta=1e5))["rope_parameters"]
    {'rope_theta': 100000.0, 'rope_type': 'default'}
    """
    names = _names_of(rope.rope_type)
    said = {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    scaling = {name: value for name, value in said.items() if name != "rope_theta"}
    return {
        "rope_parameters": said,
        "rope_theta": rope.rope_theta,
        "rope_scaling": None if rope.rope_type == "default" else scaling,
    }
