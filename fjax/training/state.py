"""Moved to `fjax.training.base`; this path stays."""

from fjax.training._update import advance, first_state
from fjax.training.base import TrainState

__all__ = ["TrainState", "advance", "first_state"]
