"""The tiny GPT-2 as it is loaded, and a copy of its folder to spoil."""

import shutil

import pytest

from fjax import from_pretrained
from tests.models.folders import TINY


@pytest.fixture(scope="module")
def model():
    return from_pretrained(TINY)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")
