"""What can be set on the command line of this experiment."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ..common.contexts import PromptOptions
from ..common.settings import Settings


@dataclass(frozen=True)
class Config(PromptOptions):
    """Scorers of one's own in Python: half of the texts are about X, all of them are polite, and
    otherwise the base model's own.

    The target is, of all distributions under which each --target has its --moment on average, the
    one closest to the base model: p(x) ∝ a(x)·exp(λ·φ(x)). λ is fitted to samples of the base model
    before the first step, and shown with its error. A moment of 1 of a function that says yes or
    no is a hard constraint: it holds for every text. Of prompts, the moments are those of all
    together, with one λ, and each has a Z of its own.

    Examples:

        python -m experiments.moments --target mine:about_food --moment 0.5
        python -m experiments.moments \\
            --target mine:about_food mine:polite --moment 0.5 1
        python -m experiments.moments --target mine:words --moment 12 \\
            --divergence total_variation
        python -m experiments.moments --target mine:woman --moment 0.5 \\
            --model my_model --prompt "Tell me a short story." --chat
    """

    target: tuple[str, ...] = ()
    """What is scored: one or several of module:function, each a Python function from a list of
    texts to one number each, True and False counting as 1 and 0. With prompts these are the
    completions, or it takes prompts, completions and the columns of --prompts that it names."""
    moment: tuple[float, ...] = ()
    """What each of them shall be on average, in the same order: for yes and no the share of yes. 1
    or 0 of such a function makes it a constraint that every text satisfies."""
    fit_samples: int = 8192
    """Samples of the base model that λ is fitted to; of prompts, of those to align on together."""
    prompts: Path | None = None
    """A file of prompts to align on. Of a .jsonl each line is an object with a "prompt" (a text, or
    a list of messages {"role", "content"}, which go through the tokenizer's chat template) or
    "messages", and further columns, whatever functions ask for. Of any other file each line is a
    text. Without it, and without --prompt, texts have no prompt."""
    max_prompt_tokens: int = 512
    """Longest prompt, in tokens; of a conversation all that the chat template makes count."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(
        # So near the base model weights say more than a few hundred exact samples would.
        default_factory=lambda: Settings(divergence="forward_kl", exact_samples=None)
    )
    """Shared by all experiments."""

    def __post_init__(self):
        super().__post_init__()
        for name in self.target:
            if not all(name.partition(":")):
                raise ValueError(f"--target is module:function, got {name!r}.")
        if len(set(self.target)) < len(self.target):
            raise ValueError(
                f"--target has the same function twice: {' '.join(self.target)}. Give each once, "
                f"with its moment."
            )
        if len(self.target) != len(self.moment):
            raise ValueError(
                f"Give one --moment for each --target, in the same order: got {len(self.target)} "
                f"functions and {len(self.moment)} moments."
            )

    @property
    def has_prompts(self) -> bool:
        """Whether texts continue some."""
        return self.prompts is not None or self.prompt is not None

    @property
    def wanted(self) -> dict[str, float]:
        """Function -> its moment."""
        return dict(zip(self.target, self.moment, strict=True))
