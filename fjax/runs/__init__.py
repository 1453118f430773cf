"""Whole runs, from the first sample to the exported model: the loop, its folder, what is shown.

Needs the extra ``fjax[runs]``, which brings rich and matplotlib.
"""

from fjax.runs import _extra  # noqa: F401 - before all that needs it
from fjax.runs.display import Display
from fjax.runs.folder import OpenRun, open_run
from fjax.runs.loop import Result, align
from fjax.runs.memory import keep_freed_memory
from fjax.runs.reading import RunError, read_evaluations, read_metrics
from fjax.runs.stages import Stage, staged
from fjax.runs.steps import Progress, Stepper, online

__all__ = [
    "Display",
    "OpenRun",
    "Progress",
    "Result",
    "RunError",
    "Stage",
    "Stepper",
    "align",
    "keep_freed_memory",
    "online",
    "open_run",
    "read_evaluations",
    "read_metrics",
    "staged",
]
