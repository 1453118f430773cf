"""What a process frees it keeps, so that the kernel need not clear it anew."""

import os
import platform
import subprocess
import sys

from fjax.runs.memory import device_memory

TAKE = """
import resource, sys
from fjax.runs.memory import keep_freed_memory
kept = keep_freed_memory() if "keep" in sys.argv else False
import numpy as np
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(16 * 2**20)
before = faults()
for _ in range(5):
    np.ones(16 * 2**20)
print(kept, faults() - before)
"""


def take(*arguments):
    """Whether memory is kept; and page faults while 128 MiB are taken and freed five times."""
    command = [sys.executable, "-c", TAKE, *arguments]
    environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}  # pages of 4 KiB, as XLA has them
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    kept, faults = ended.stdout.split()
    return kept == "True", int(faults)


def test_what_is_freed_is_kept_where_there_is_glibc():
    kept, faults = take("keep")
    assert kept == (platform.libc_ver()[0] == "glibc")
    assert faults < 1000 or not kept


def test_else_the_kernel_clears_it_anew():
    """What is measured above can be seen at all, in pages of 4 KiB."""
    kept, faults = take()
    assert not kept
    assert faults > 100_000 or platform.libc_ver()[0] != "glibc"


def test_a_device_has_some_memory():
    assert device_memory() > 2**28
