"""What can be set on the command line of this experiment."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ..common.arguments import FolderOrName
from ..common.contexts import PromptOptions
from ..common.settings import ASSETS, Settings


@dataclass(frozen=True)
class Config(PromptOptions):
    """RLHF on prompts: move a model towards answers that a reward likes, at a price of β a nat.

    The target of a prompt x is the optimum of reward minus β KL(π(·|x)‖a(·|x)), p(y|x) ∝
    a(y|x)·exp(r(x, y)/β), normalised by its own Z_x. Reverse KL to it *is* RL with a KL penalty;
    any other divergence may take its place. Each step takes some prompts and draws as many answers
    of each; evaluations are on prompts that are never aligned on. Built in are openings of
    film-review sentences, and the log-odds of a positive review.

    Examples:

        python -m experiments.rlhf
        python -m experiments.rlhf --model my_model --prompts p.jsonl \\
            --reward my_module:my_reward --beta 0.5
        python -m experiments.rlhf --algorithm rloo \\
            --reward mine:short mine:polite --reward-weights 1 0.5
    """

    reward: tuple[FolderOrName, ...] = ("sentiment",)
    """One or more of: sentiment, the folder of a reward model, or module:function, a Python
    function to one number a completion. With one parameter it is given the completions; with more,
    prompts, completions and the columns of --prompts that it names, or all with **kwargs."""
    reward_weights: tuple[float, ...] = ()
    """How much each counts, in their order; 1 without. Evaluations show each, and the sum."""
    beta: float = 1.0
    """β, the price of a nat of KL from the base model: the smaller, the more the reward counts; at
    0 the target would be the best single answer."""
    reward_max: float | None = None
    """The most that an answer can earn in all: a higher reward counts as this. With it log P/a is
    bounded, and exact samples of each prompt's target can be drawn to measure by, the sooner the
    lower it is; without it divergences rest on weights."""
    reward_folder: Path = Path("runs/sentiment-reward-model")
    """Where the built-in reward model is kept; trained when it is not there."""
    corpora: Path = ASSETS
    """Folder with sentence_polarity.zip (Pang and Lee 2005, CC BY 4.0), the labels of the built-in
    reward."""
    max_prompt_tokens: int = 512
    """Longest prompt, in tokens; of a conversation all that the chat template makes count."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(
        default_factory=lambda: Settings(
            divergence="reverse_kl", learning_rate=2e-4, max_new_tokens=32
        )
    )
    """Shared by all experiments."""

    def __post_init__(self):
        super().__post_init__()
        if not self.reward:
            raise ValueError("--reward needs at least one reward.")
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"--reward-weights are one a reward: got {len(self.reward_weights)} for the "
                f"{len(self.reward)} of --reward."
            )
        alone = self.prompts is None and self.prompt is None
        if alone and self.settings.model != "built-in":
            raise ValueError(
                "--prompts is needed for a model of your own: a .jsonl of prompts or "
                "conversations, or a text file with one a line. The built-in ones are openings of "
                "film reviews."
            )
