"""What can be set on the command line of this experiment."""

from dataclasses import dataclass, field
from typing import Literal

import tyro

from ..common.arguments import check_numbers
from ..common.settings import Settings


@dataclass(frozen=True)
class Config:
    """Make a language model say a word: align it to p(x) ∝ a(x)·[word in x].

    The target p is the base model a, restricted to its own samples that contain the word: of all
    distributions that always say it, the closest to the base. The run draws samples, moves the
    policy towards p by the gradient of the divergence, and writes metrics, plots, samples,
    checkpoints and the aligned model (a Hugging Face folder) to its run folder.

    Examples:

        python -m experiments.lexical_constraint --word amazing
        python -m experiments.lexical_constraint --word amazing \\
            --divergence reverse_kl --clip -8 8
        python -m experiments.lexical_constraint --divergence alpha=0.5
        python -m experiments.lexical_constraint --word amazing --model gpt2 \\
            --learning-rate 1e-5 --steps 1000
    """

    word: str = "amazing"
    """The word, or several in a row. Whole words count, in upper or lower case."""
    when_absent: Literal["continue", "stop"] = "continue"
    """If no sample of the base model has the word: continue (until one has) or stop."""
    smoothing: float = 0.0
    """ε in p ∝ a·([word in x] + ε): above 0 the target is positive everywhere and reverse KL
    finite, without --clip."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)
    """Shared by all experiments."""

    def __post_init__(self):
        check_numbers(self)
        if not self.word.strip():
            raise ValueError("--word must not be empty.")
        if 0 < self.smoothing < 1e-30:
            raise ValueError(
                f"--smoothing must be 0 or at least 1e-30, got {self.smoothing}: float32 has none "
                f"below."
            )
