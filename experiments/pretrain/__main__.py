"""Command line: python -m experiments.pretrain --help."""

import sys
from functools import partial

from ..common.command import run
from .config import Config
from .run import main as pretrain

main = partial(run, Config, pretrain, name="pretrain")

if __name__ == "__main__":
    sys.exit(main())
