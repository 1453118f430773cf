"""Pictures of runs that are about something else: small, and with nothing on them."""

import pytest
from matplotlib.axes import Axes

from fjax.runs.plots import STYLE

DRAW = Axes.draw


def small(monkeypatch: pytest.MonkeyPatch, *, empty: bool = True) -> None:
    """All is prepared and written as ever; but drawing lines and ticks would take more time than
    all steps of a small run."""
    monkeypatch.setitem(STYLE, "savefig.dpi", 30)
    monkeypatch.setitem(STYLE, "figure.constrained_layout.use", False)
    monkeypatch.setattr(Axes, "draw", (lambda axes, renderer: None) if empty else DRAW)
