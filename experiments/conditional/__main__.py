"""Command line: python -m experiments.conditional --help."""

import sys

from experiments._command import run

from .config import Config
from .run import main

if __name__ == "__main__":
    sys.exit(run(Config, main, module="experiments.conditional"))
