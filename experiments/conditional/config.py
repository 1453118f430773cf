"""What can be set on the command line of this experiment."""

from dataclasses import dataclass, field

import tyro

from ..common.contexts import PromptOptions
from ..common.settings import Settings


@dataclass(frozen=True)
class Config(PromptOptions):
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
    function of (prompt, continuation), and of the columns of the prompt's line that it names, to
    True or False."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(
        default_factory=lambda: Settings(steps=120, learning_rate=3e-4, max_new_tokens=32)
    )
    """Shared by all experiments."""

    def __post_init__(self):
        super().__post_init__()
        if self.predicate not in ("turns", "repeats") and ":" not in self.predicate:
            raise ValueError(
                f"--predicate is turns, repeats or module:function, got {self.predicate!r}."
            )
