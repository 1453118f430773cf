"""What can be set on the command line of this experiment."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ..common.arguments import FolderOrName, check_numbers
from ..common.settings import ASSETS, Settings


@dataclass(frozen=True)
class Config:
    """RLHF: move a language model towards what a reward model likes, at a price of β a nat.

    The target is the optimum of reward minus β KL(π‖a), p(x) ∝ a(x)·exp(r(x)/β). Reverse KL to it
    *is* RL with a KL penalty; any other divergence may take its place. The built-in reward is the
    log-odds of a positive film review, from a GPT-2 with a scalar head that is trained on human
    labels first (some minutes, once); or give any Python function.

    Examples:

        python -m experiments.sentiment_reward
        python -m experiments.sentiment_reward --beta 0.5 \\
            --divergence jensen_shannon
        python -m experiments.sentiment_reward --beta 0.1 \\
            --reward my_module:my_rewards
    """

    reward: FolderOrName = "sentiment"
    """sentiment, the folder of a reward model, or module:function, a Python function from a list of
    texts to one number each. Of a folder, "text_format" in its config.json says what it was trained
    on: "text" (taken where nothing is said), "end text", "text end" or "end text end", by where its
    end-of-sequence token stands."""
    beta: float = 1.0
    """β, the price of a nat of KL from the base model: the smaller, the more the reward counts; at
    0 the target would be the best single sample."""
    reward_max: float | None = None
    """The most that a text can earn: a higher reward counts as this. With it log P/a is bounded,
    and exact samples of the target can be drawn to measure by, the sooner the lower it is. Without
    it they cannot, and every divergence rests on weights."""
    reward_folder: Path = Path("runs/sentiment-reward-model")
    """Where the built-in reward model is kept; trained when it is not there."""
    corpora: Path = ASSETS
    """Folder with sentence_polarity.zip (Pang and Lee 2005, CC BY 4.0), the labels of the built-in
    reward."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(
        default_factory=lambda: Settings(divergence="reverse_kl", learning_rate=2e-4)
    )
    """Shared by all experiments."""

    def __post_init__(self):
        check_numbers(self)
