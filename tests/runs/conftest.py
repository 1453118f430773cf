"""Pictures are empty here but in test_plots, where they are looked at."""

import pytest

from tests import pictures


@pytest.fixture(scope="module", autouse=True)
def small_pictures(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        pictures.small(monkeypatch, empty=not request.module.__name__.endswith("test_plots"))
        yield
