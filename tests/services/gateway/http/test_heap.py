import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from vcot.services.gateway.http import heap
if "settled" in sys.argv:
    heap.settle()
def faults():
    for _ in range(200):
        large = [b"x" * 200_000 for _ in range(10)]
        del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print(faults() - before)
"""


def page_faults(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_memory_that_is_settled_is_not_asked_for_anew() -> None:
    assert page_faults("settled") < 100
    assert page_faults() > 1000, "or the setting is needed no more"
