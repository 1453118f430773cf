"""What people run: one folder an experiment, one host loop for all."""

import os

# transformers says on import that there is no torch; nobody here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
