"""What people run: one folder an experiment, one host loop for all."""

import os
import sys

from . import _endings

# transformers says on import that there is no torch; nobody here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# python -m experiments.…, which is still being looked for: jax and all else is yet to be imported
if sys.argv[:1] == ["-m"]:
    _endings.handle(_endings.leave_at_once)
