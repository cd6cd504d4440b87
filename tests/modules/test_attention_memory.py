"""Windowed attention on the CPU: the memory of a training step grows with T, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LENGTHS = (4096, 8192, 16384)

# Peak resident memory never falls, so that growing lengths can share a process. In kilobytes on Linux.
SCRIPT = f"""
import json, resource, torch, fastblocks
torch.set_num_threads(1)
block = fastblocks.AttentionRegisterRoFormerBlock(16, 2, {LENGTHS[-1]}, num_register_tokens=4, window_size=64)

def step(length):
    x = torch.randn(1, length, 16, requires_grad=True)
    y, registers = block(x, return_registers=True)
    (y.sum() + registers.sum()).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

step(512)  # libraries load their pages
print(json.dumps([step(length) for length in (512, *{LENGTHS})]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_grows_with_the_length():
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    before, *peaks = json.loads(run.stdout)
    short, middle, long = (peak - before for peak in peaks)
    allocator = 16 * 2**20  # pages that the allocator keeps: what two steps of one length differ by, generously
    assert long - middle <= 2 * (middle - short) + allocator, f"doubling twice: {short}, {middle}, {long} bytes"
    # one byte a pair of tokens is 256 MiB at T = 16384: not even a boolean mask was made
    assert long < LENGTHS[-1] ** 2 / 2, f"{long} bytes"
