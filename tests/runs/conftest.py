"""Pictures are small here but in test_plots, where they are looked at."""

import pytest

from fjax.runs.plots import STYLE


@pytest.fixture(scope="package", autouse=True)
def small_pictures():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(STYLE, "savefig.dpi", 30)
        monkeypatch.setitem(STYLE, "figure.constrained_layout.use", False)
        yield
