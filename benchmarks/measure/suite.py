"""A workload measured: every provider checked against float64, then timed in turn with the others."""

import gc
import time
from functools import partial

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.measure.error import EPSILON, errors, objection
from benchmarks.measure.floor import work
from benchmarks.measure.row import Row, reason
from benchmarks.measure.settings import Settings
from benchmarks.measure.timing import Run, clock_of, interleaved, peak_bytes
from benchmarks.providers import BASELINE, GRAPH
from benchmarks.providers.runner import products
from benchmarks.workloads.workload import Workload

HOST_CALLS = 8
NUDGES = 3  # runs to find how far a network's error varies
LEAST = 2  # samples of each: A B B A


def measure(workload: Workload, device: torch.device, settings: Settings) -> list[Row]:
    """All rows of a workload, in the order of dtypes, modes, providers."""
    found = []
    for dtype in settings.dtypes:
        with products(dtype):
            found += _measure_dtype(workload, device, dtype, settings)
        _clean()
    return found


def _measure_dtype(workload: Workload, device: torch.device, dtype: str, settings: Settings) -> list[Row]:
    names = [name for name in providers.PROVIDERS if name in settings.providers and providers.belongs(name, workload)]
    wanted = names if BASELINE in names else [BASELINE, *names]
    runners, excuses = {}, {}
    for name in wanted:
        try:
            runners[name] = providers.prepare(name, workload, device, dtype, settings.compiler)
        except Exception as problem:
            excuses[name] = reason(problem)
    rows = []
    for mode in settings.modes:
        if not isinstance(truth := _truth(workload, device, dtype, mode), list):
            rows += [Row(workload, mode, dtype, n, refused=truth) for n in names]
            continue
        baseline, ready = None, {}
        for name in wanted:
            row = Row(workload, mode, dtype, name, refused=excuses.get(name, ""))
            if not row.refused:
                baseline = _check(row, runners[name], truth, baseline)
            if name in names:
                rows.append(row)
                if not row.refused:
                    ready[name] = row
        del truth
        _clean()
        _time(ready, runners, mode, workload, device, settings)
        for runner in runners.values():
            runner.release()
        _clean()
    return rows


def _truth(workload: Workload, device: torch.device, dtype: str, mode: str) -> list[Tensor | None] | str:
    """Results in float64, or why there are none."""
    try:
        reference = providers.reference(workload, device, dtype)
        reference.prepare(mode)
        return [None if t is None else t.detach() for t in reference.run(mode)]
    except Exception as problem:
        return f"no float64 reference: {reason(problem)}"


def _check(row: Row, runner, truth: list, baseline: list[float] | None) -> list[float] | None:
    """Note a provider's error, refuse it if it is too large; returns the baseline's errors once they are known."""
    try:
        runner.reset()
        runner.prepare(row.mode)
        found = errors(runner.compared(runner.run(row.mode), row.mode), truth)
    except Exception as problem:
        row.refused = reason(problem)
        runner.release()
        _clean()
        return baseline
    row.error = max(found, default=0.0)
    if row.provider == BASELINE:
        return _spread(runner, truth, found) if row.workload.step and row.mode == "training" else found
    row.refused = objection(found, baseline, row.dtype, row.workload.is_operation)
    return baseline


def _spread(runner, truth: list, found: list[float]) -> list[float]:
    """The baseline's worst errors in training a whole network, over a few inputs that differ by their last bit.

    Its losses have kinks (absolute values), and on which side of one a value falls is a matter of rounding: the same
    provider's error varies by a factor of 4.
    """
    inputs, generator = runner.tensors(), torch.Generator().manual_seed(0)
    exact = [t.detach().clone() for t in inputs]
    for _ in range(NUDGES):
        for t, value in zip(inputs, exact, strict=True):
            noise = torch.randn(t.shape, generator=generator).to(t) * EPSILON["fp32"] / 2
            t.data.copy_(value * (1 + noise))
        runner.reset()
        found = list(map(max, found, errors(runner.run("training"), truth)))
    for t, value in zip(inputs, exact, strict=True):
        t.data.copy_(value)
    return found


def _time(ready: dict[str, Row], runners: dict, mode: str, workload: Workload, device, settings: Settings) -> None:
    """Fill in what is measured of those who passed."""
    if not ready:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    plain = next((r for r in map(runners.get, ready) if not r.foreign), runners[next(iter(ready))])
    outputs = getattr(plain, "runner", plain).run("forward")
    amount = work(mode, plain.tensors(), plain.weights, outputs, workload.flops)
    del outputs
    for provider, row in list(ready.items()):
        prepare, run = partial(runners[provider].prepare, mode), partial(runners[provider].run, mode)
        row.work, row.floor = amount, amount.floor(name) if workload.step is None else None
        try:
            if settings.memory and provider != GRAPH:  # its memory is set aside at capture, not at replay
                prepare()
                row.peak_bytes = peak_bytes(run, device)
            if device.type == "cuda":
                row.host_seconds = host_time(prepare, run)
        except Exception as problem:
            row.refused = reason(problem)
            del ready[provider]
    runs = {provider: partial(runners[provider].run, mode) for provider in ready}
    before = {provider: partial(runners[provider].prepare, mode) for provider in ready}
    for provider, timing in interleaved(
        runs, settings.seconds, least=LEAST, clock=clock_of(device), before=before
    ).items():
        ready[provider].timing = timing


def host_time(prepare: Run, run: Run) -> float:
    """Seconds until a call returns, the device being idle at first: the least of a few."""
    times = []
    for _ in range(HOST_CALLS):
        prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return min(times)


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
