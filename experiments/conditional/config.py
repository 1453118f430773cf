"""What can be set on the command line of this experiment."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from ..common.arguments import check_numbers
from ..common.settings import Settings


@dataclass(frozen=True)
class Config:
    """Conditional constraints: for every prompt c, continuations that satisfy a predicate, and
    otherwise the base model's own.

    The target of a prompt is p_c(x) ∝ a(x|c)·b(x, c), normalised by its own Z_c = E_a(·|c)[b], the
    rate at which the base model satisfies the predicate there. Each step takes some prompts, draws
    as many samples of each from one prefill, and descends the mean divergence E_c D_f(π(·|c)‖p_c);
    evaluations are on prompts that are never aligned on.

    Examples:

        python -m experiments.conditional
        python -m experiments.conditional --normalizer global
        python -m experiments.conditional --prompts my_prompts.txt \\
            --predicate my_module:my_predicate
    """

    predicate: str = "turns"
    """b(x, c): turns (the continuation has a "but" or its like that the prompt has not), repeats
    (it uses a word of the prompt again, of three letters or more), or module:function, a Python
    function of (prompt, continuation) to True or False."""
    prompts: Path | None = None
    """A text file of prompts to align on, one a line. Built in: the first words of film-review
    sentences that the model has not seen."""
    unseen_prompts: Path | None = None
    """A text file of prompts to evaluate on. Without it every fourth of --prompts is kept for
    that."""
    prompts_per_step: int = 16
    """Prompts a step; each gets --samples divided by this."""
    max_prompt_tokens: int = 32
    """Longer prompts are left out, and counted."""
    normalizer: Literal["per-context", "global"] = "per-context"
    """per-context: each prompt has its own Z_c. global: one Z for all, as if prompts and
    continuations had one joint target; the prompts where the predicate is easy then take over. To
    see what it does wrong."""
    z_samples: int = 128
    """Samples of the base model for each prompt to evaluate on, drawn once before the first
    evaluation: its Z_c is estimated from them. Prompts where none of them satisfies the predicate
    are left out of all figures, and counted."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(
        default_factory=lambda: Settings(steps=120, learning_rate=3e-4, max_new_tokens=32)
    )
    """Shared by all experiments."""

    def __post_init__(self):
        check_numbers(self)
        if self.unseen_prompts is not None and self.prompts is None:
            raise ValueError(
                "--unseen-prompts go with --prompts; the built-in prompts have unseen ones of "
                "their own."
            )
        if self.predicate not in ("turns", "repeats") and ":" not in self.predicate:
            raise ValueError(
                f"--predicate is turns, repeats or module:function, got {self.predicate!r}."
            )
