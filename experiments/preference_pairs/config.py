"""What can be set on the command line of this experiment."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from ..common.arguments import FolderOrName, check_numbers
from ..common.settings import ASSETS, Settings

BUILT_IN = Path(__file__).parent / "pairs.jsonl"


@dataclass(frozen=True)
class Config:
    """Offline preference alignment: DPO, f-DPO, χPO, IPO or EXO on pairs of a chosen and a rejected
    continuation.

    Nothing is drawn to take a step: each is on pairs of the file. Evaluations draw from the model
    on prompts that no pair has, and compare it with the base model by the reward that the built-in
    pairs were made with: the win rate, KL(π‖a), and how near it is to p ∝ a·exp(r/β), which DPO has
    as its optimum on Bradley–Terry labels of that reward.

    Examples:

        python -m experiments.preference_pairs
        python -m experiments.preference_pairs --loss chi_po --beta 0.1 --steps 280
        python -m experiments.preference_pairs --loss f_dpo --f jensen_shannon
        python -m experiments.preference_pairs --pairs my_pairs.jsonl \\
            --skip-bad-lines --reward my_module:my_rewards
    """

    loss: Literal["dpo", "f_dpo", "chi_po", "ipo", "exo"] = "dpo"
    """Which loss; see fjax.preferences for the formulas."""
    f: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "jensen_shannon"
    """The penalty D_f(π‖a) of f_dpo; with reverse_kl it is DPO."""
    beta: float = 0.1
    """β of the loss, the price of a nat of KL from the base: the smaller, the further the model
    goes."""
    pairs: Path = BUILT_IN
    """JSON lines with "prompt", "chosen" and "rejected", texts or lists of messages {"role",
    "content"}, which go through the tokenizer's chat template; of whole conversations as "chosen"
    and "rejected" the common beginning is the prompt. Built in: continuations of the base model
    ranked by the built-in reward (see make_pairs)."""
    skip_bad_lines: bool = False
    """Leave bad lines of --pairs out, and count them, instead of stopping at the first."""
    unseen_prompts: Path | None = None
    """A text file of prompts to evaluate on, one a line, or JSON lines, as for rlhf. Built in:
    openings of film-review sentences that no pair has."""
    prompts_per_batch: int = 16
    """Prompts that an evaluation continues at once; each gets --samples divided by this."""
    pairs_per_step: int = 64
    """Pairs a step."""
    reward: FolderOrName = "sentiment"
    """The reward of the win rate: sentiment, the folder of a reward model, or module:function, as
    for sentiment_reward."""
    reward_beta: float = 1.0
    """β of the target p ∝ a·exp(r/β) that evaluations report the distance from."""
    reward_folder: Path = Path("runs/sentiment-reward-model")
    """Where the built-in reward model is kept; trained when it is not there."""
    corpora: Path = ASSETS
    """Folder with sentence_polarity.zip, the labels of the built-in reward."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(
        default_factory=lambda: Settings(
            divergence="reverse_kl", steps=140, samples=128, max_new_tokens=32, learning_rate=1e-4
        )
    )
    """Shared by all experiments. --divergence is the distance from the target that --stop-below and
    the best checkpoint go by."""

    def __post_init__(self):
        check_numbers(self)
        if (
            self.settings.algorithm != "fdpg"
            or self.settings.overlap
            or self.settings.proposal != "policy"
        ):
            raise ValueError(
                "--algorithm, --overlap and --proposal are about samples, and steps on pairs draw "
                "none: leave them out."
            )
