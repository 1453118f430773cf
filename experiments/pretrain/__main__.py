"""Command line: python -m experiments.pretrain --help."""

from functools import partial

from fjax.runs.endings import leave

from ..common.command import run
from .config import Config
from .run import main as pretrain

main = partial(run, Config, pretrain, name="pretrain")

if __name__ == "__main__":
    leave(main())
