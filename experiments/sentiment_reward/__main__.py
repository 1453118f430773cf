"""Command line: python -m experiments.sentiment_reward --help."""

from fjax.runs.endings import leave

from ..common.build import main_of
from .target import TASK

main = main_of(TASK)

if __name__ == "__main__":
    leave(main())
