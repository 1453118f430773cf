"""Command line: python -m experiments.preference_pairs --help."""

import sys

from experiments._command import run

from .config import Config
from .run import main

if __name__ == "__main__":
    sys.exit(run(Config, main, module="experiments.preference_pairs"))
