"""`fjax.runs` is an extra: without what it needs it says how to get it, and the rest of fjax does without."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys
sys.modules[{package!r}] = None
import fjax, fjax.rollouts, fjax.evaluation
try:
    import fjax.runs
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_without_its_extra_it_says_how_to_get_it(package):
    command = [sys.executable, "-c", WITHOUT.format(package=package)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith(f"This needs {package}, which cannot be imported")
    assert "pip install 'fjax[runs]'" in ended.stdout
    assert (ended.returncode, ended.stderr) == (0, "")
