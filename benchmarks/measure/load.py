"""Other processes at full load, beside which something is measured."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Ends by itself where its parent does, whatever ended that.
_SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""


@contextmanager
def busy(count: int) -> Iterator[list[int]]:
    """While inside, `count` processes keep a core busy each; gives their ids."""
    others = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
    try:
        yield [other.pid for other in others]
    finally:
        for other in others:
            other.kill()
            other.wait()
