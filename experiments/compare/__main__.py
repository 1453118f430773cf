"""Command line: python -m experiments.compare --help."""

from functools import partial

from fjax.runs.endings import leave

from ..common.command import run
from .config import Config
from .run import main as compare

main = partial(run, Config, compare, name="compare")

if __name__ == "__main__":
    leave(main())
