"""Command line: python -m experiments.compare --help."""

import sys
from functools import partial

from ..common.command import run
from .config import Config
from .run import main as compare

main = partial(run, Config, compare, name="compare")

if __name__ == "__main__":
    sys.exit(main())
