"""All tasks. A new one is a folder and a line here."""

from .common.task import Task
from .conditional.target import TASK as CONDITIONAL
from .gender_balance.target import TASK as GENDER_BALANCE
from .lexical_constraint.target import TASK as LEXICAL_CONSTRAINT
from .moments.target import TASK as MOMENTS
from .preference_pairs.target import TASK as PREFERENCE_PAIRS
from .rlhf.target import TASK as RLHF
from .sentiment_reward.target import TASK as SENTIMENT_REWARD

TASKS: tuple[Task, ...] = (
    LEXICAL_CONSTRAINT,
    SENTIMENT_REWARD,
    GENDER_BALANCE,
    MOMENTS,
    CONDITIONAL,
    RLHF,
    PREFERENCE_PAIRS,
)
"""In the order in which the README tells of them."""
