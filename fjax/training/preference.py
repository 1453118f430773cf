"""Moved to `fjax.training.pairs`; this path stays."""

from fjax.training.pairs import PairBatch, PairInfo, PairLoss, PairTuner, preference_tuner

__all__ = ["PairBatch", "PairInfo", "PairLoss", "PairTuner", "preference_tuner"]
