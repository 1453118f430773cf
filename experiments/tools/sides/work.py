"""What all sides do, so that what is timed is the same."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LEARNING_RATE, BETAS, MAX_GRAD_NORM = 1e-6, (0.9, 0.98), 1.0
"""Of Adam, and the norm that a longer gradient is scaled down to. All updates are on the same rows:
at a rate that is fit for one of many, a large model would soon draw nothing else."""


class Work(NamedTuple):
    """What a step is of.

    Attributes:
        model: a folder, or a name on the hub.
        samples: rows.
        new_tokens: that each is long; none ends before.
        lora_rank: of adapters, where they are trained.
        trainable: which matrices have them, as on the command line.
    """

    model: str
    samples: int
    new_tokens: int
    lora_rank: int = 8
    trainable: str | None = None


class Side(NamedTuple):
    """A step in its phases, on parameters that the side keeps.

    Attributes:
        draw: () -> tokens ``[N, 1 + T]``, a start token and those drawn with a cache of keys and
            values.
        score: (tokens) -> ``[2, N]``, log a and log π of each row, without a gradient.
        update: (tokens, log_score, log_q) -> the loss before it. f-DPG with Jensen–Shannon:
            gradient, its norm clipped, Adam.
        numbers: () -> how many are trained, and how many the model has.
    """

    draw: Callable[[], np.ndarray]
    score: Callable[[np.ndarray], np.ndarray]
    update: Callable[[np.ndarray, np.ndarray, np.ndarray], float]
    numbers: Callable[[], tuple[int, int]]


class Rows(NamedTuple):
    """What an update is made on: the arguments of `Side.update`."""

    tokens: np.ndarray
    log_score: np.ndarray
    log_q: np.ndarray


def rows_of(tokens: np.ndarray, log_a: np.ndarray, log_pi: np.ndarray) -> Rows:
    """All likelier under the target, some more than others: no two terms of the loss cancel."""
    bonus = np.where(np.arange(len(tokens)) % 2, 0.5, 1.5)
    return Rows(tokens, (log_a + bonus).astype(np.float32), log_pi.astype(np.float32))
