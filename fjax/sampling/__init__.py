"""Drawing from a language model: logits, one token, whole continuations."""

from fjax.rejection import RejectionEstimate, accept, estimate_rejection, log_acceptance
from fjax.sampling.categorical import draw
from fjax.sampling.decode import Samples, sample
from fjax.sampling.transforms import Transform, chain, greedy, identity, temperature, top_k, top_p

__all__ = [
    "RejectionEstimate",
    "Samples",
    "Transform",
    "accept",
    "chain",
    "draw",
    "estimate_rejection",
    "greedy",
    "identity",
    "log_acceptance",
    "sample",
    "temperature",
    "top_k",
    "top_p",
]
