"""Windowed attention on the CPU: memory and time of a training step grow with T, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LENGTHS = (4096, 8192, 16384)

# Peak resident memory never falls, so that growing lengths can share a process. In kilobytes on Linux.
SCRIPT = f"""
import json, resource, time, torch, fastblocks
torch.set_num_threads(1)
block = fastblocks.AttentionRegisterRoFormerBlock(16, 2, {LENGTHS[-1]}, num_register_tokens=4, window_size=64)

def step(length):
    start = time.process_time()
    x = torch.randn(1, length, 16, requires_grad=True)
    y, registers = block(x, return_registers=True)
    (y.sum() + registers.sum()).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.process_time() - start

step(512)  # libraries load their pages
peaks = [step(length)[0] for length in (512, *{LENGTHS})]
times = [min(step(length)[1] for _ in range(3)) for length in {LENGTHS}]
print(json.dumps([peaks, times]))
"""


@pytest.fixture(scope="module")
def measured():
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


linux = pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")


@linux
def test_memory_grows_with_the_length(measured):
    before, *peaks = measured[0]
    short, middle, long = (peak - before for peak in peaks)
    allocator = 16 * 2**20  # pages that the allocator keeps: what two steps of one length differ by, generously
    assert long - middle <= 2 * (middle - short) + allocator, f"doubling twice: {short}, {middle}, {long} bytes"
    # one byte a pair of tokens is 256 MiB at T = 16384: not even a boolean mask was made
    assert long < LENGTHS[-1] ** 2 / 2, f"{long} bytes"


def test_time_grows_with_the_length(measured):
    """Four times the length: four times the work; sixteen if every token met every other. CPU time, best of three."""
    short, _, long = measured[1]
    assert long <= 8 * short, f"{measured[1]} seconds for {LENGTHS} tokens"
