"""The standard workloads for pytest-benchmark: `pytest benchmarks --benchmark-only`, `--size cpu` or full.

`-k "att-time and fastblocks"` selects. A provider that is wrong fails, one that cannot run here is skipped with its
reason.
"""

import gc

import pytest
import torch

from benchmarks import providers
from benchmarks.measure import suite
from benchmarks.providers.runner import tf32
from benchmarks.workloads import all_workloads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bf16" if DEVICE.type == "cuda" else "fp32"
NAMES = providers.PROVIDERS if DEVICE.type == "cuda" else ("baseline", "fastblocks", "block-diagonal")
WORKLOADS = all_workloads("full" if DEVICE.type == "cuda" else "cpu")
ROUNDS = 20 if DEVICE.type == "cuda" else 3

CASES = [
    pytest.param(workload, mode, name, id=f"{workload.name}-{mode}-{name}")
    for workload in WORKLOADS
    for mode in workload.modes
    for name in NAMES
    if providers.belongs(name, workload)
]


@pytest.mark.parametrize(("workload", "mode", "name"), CASES)
def test_workload(benchmark, workload, mode, name):
    benchmark.group = f"{workload.name} {mode} {DTYPE}"
    settings = suite.Settings((mode,), (DTYPE,), (name,), 0.0, memory=False)
    (row,) = suite.measure(workload, DEVICE, settings)
    if why := row.get("refused"):
        (pytest.fail if why.startswith("wrong") else pytest.skip)(why)
    gc.collect()
    runner = providers.prepare(name, workload, DEVICE, DTYPE)
    sync = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None

    def run():
        runner.run(mode)
        sync()

    def setup():
        runner.prepare(mode)
        sync()

    with tf32(DTYPE != "fp32"):
        benchmark.pedantic(run, setup=setup, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(row)
