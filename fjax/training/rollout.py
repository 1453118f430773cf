"""Moved to `fjax.training.base`; this path stays."""

from fjax._sharding import together
from fjax.training._doors import checked_rollout, checked_tokens
from fjax.training.base import Rollout

__all__ = ["Rollout", "checked_rollout", "checked_tokens", "together"]
