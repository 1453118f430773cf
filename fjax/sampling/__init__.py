"""Drawing from a language model: transforms of the logits, one token at a time, whole continuations."""

from fjax.sampling.categorical import draw
from fjax.sampling.decode import Samples, sample
from fjax.sampling.transforms import Transform, chain, greedy, identity, temperature, top_k, top_p

__all__ = [
    "Samples",
    "Transform",
    "chain",
    "draw",
    "greedy",
    "identity",
    "sample",
    "temperature",
    "top_k",
    "top_p",
]
