"""Command line: python -m experiments.compare --help."""

import sys

import jax

from experiments._command import run

from .config import Config
from .run import main

if __name__ == "__main__":
    # an accelerator is for the runs, each a process of its own
    jax.config.update("jax_platforms", "cpu")
    sys.exit(run(Config, main, module="experiments.compare"))
