"""A workload measured: every provider checked against float64, then timed in turn with the others.

A row is a dict, as it stands in result files: `workload`, `shape`, `mode`, `dtype`, `provider`, `error`; then either
`refused`, which says why there is no time, or seconds and bytes.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.measure.error import EPSILON, errors, objection
from benchmarks.measure.floor import floor, size, work
from benchmarks.measure.timing import Run, clock_of, interleaved, peak_bytes, quartiles
from benchmarks.providers import BASELINE, GRAPH
from benchmarks.providers.runner import Runner, Skipped, tf32
from benchmarks.workloads import MODES
from benchmarks.workloads.workload import Workload

HOST_CALLS = 8
NUDGES = 7  # runs to find how far a network's error varies

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run of the suite does with each workload.

    Args:
        modes: of `workloads.MODES`.
        dtypes: of `runner.DTYPES`.
        providers: of `providers.PROVIDERS`; the baseline's error is found even if it is not among them.
        seconds: for the samples of one workload, mode and dtype; checks and compilation come on top.
        compiler: torch.compile's backend.
        memory: also find the peak.
    """

    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = ("bf16",)
    providers: tuple[str, ...] = providers.PROVIDERS
    seconds: float = 1.0
    compiler: str = "inductor"
    memory: bool = True

    def of(self, workload: Workload) -> list[str]:
        """The providers that can be asked for a workload, in the order of the table."""
        return [n for n in providers.PROVIDERS if n in self.providers and providers.belongs(n, workload)]


def reason(problem: BaseException) -> str:
    """One line of an exception."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    first = next((line.strip() for line in str(problem).splitlines() if line.strip()), "")
    return str(problem) if isinstance(problem, Skipped) else f"{type(problem).__name__}: {first}"[:200]


def refused(workload: Workload, settings: Settings, why: str) -> list[Row]:
    """A row of each provider, mode and dtype, none of them timed."""
    return [
        _row(workload, mode, dtype, name, why)
        for dtype in settings.dtypes
        for mode in settings.modes
        if mode in workload.modes
        for name in settings.of(workload)
    ]


def _row(workload: Workload, mode: str, dtype: str, provider: str, why: str = "") -> Row:
    row = {"workload": workload.name, "shape": workload.shape, "mode": mode, "dtype": dtype, "provider": provider}
    return row | {"error": None} | ({"refused": why} if why else {})


def measure(workload: Workload, device: torch.device, settings: Settings) -> list[Row]:
    """All rows of a workload, in the order of dtypes, modes, providers."""
    found = []
    for dtype in settings.dtypes:
        with tf32(dtype != "fp32"):
            found += _measure_dtype(workload, device, dtype, settings)
        _clean()
    return found


def _measure_dtype(workload: Workload, device: torch.device, dtype: str, settings: Settings) -> list[Row]:
    names = settings.of(workload)
    runners, excuses, rows, written = {}, {}, [], 0
    for name in dict.fromkeys((BASELINE, *names)):
        try:
            runners[name] = providers.prepare(name, workload, device, dtype, settings.compiler)
        except Exception as problem:
            excuses[name] = reason(problem)
    for mode in (mode for mode in settings.modes if mode in workload.modes):
        truth, baseline, ready = _truth(workload, device, dtype, mode), None, {}
        for name in dict.fromkeys((BASELINE, *names)):
            row = _row(workload, mode, dtype, name, truth if isinstance(truth, str) else excuses.get(name, ""))
            if "refused" not in row:
                found, size_of_results = _check(row, runners[name], truth)
                written = written or (size_of_results if mode == "forward" else 0)
                if name == BASELINE:
                    baseline = found
                elif found:
                    baseline = _judge(row, found, baseline, workload, (runners.get(BASELINE), runners[name]), truth)
            if name in names:
                rows.append(row)
                if "refused" not in row:
                    ready[name] = row
        del truth
        _clean()
        if ready:
            plain = next((r for r in map(runners.get, ready) if not r.foreign), runners[next(iter(ready))])
            written = written or size(getattr(plain, "runner", plain).run("forward"))
            moved = work(mode, plain.tensors(), plain.weights, written, workload.flops)
            for row in ready.values():
                row |= moved
            _time(ready, runners, workload, device, settings)
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


def _check(row: Row, runner: Runner, truth: list) -> tuple[list[float] | None, int]:
    """A provider's errors and the bytes of its results; None and why, in the row, if it cannot run."""
    mode = row["mode"]
    try:
        runner.reset()
        runner.prepare(mode)
        results = runner.run(mode)
        found = errors(runner.compared(results, mode), truth)
    except Exception as problem:
        row["refused"] = reason(problem)
        runner.release()
        _clean()
        return None, 0
    row["error"] = max(found, default=0.0)
    return found, size([t for t in results if t is not None])


def _judge(row: Row, found: list, baseline: list | None, workload: Workload, runners: tuple, truth: list):
    """Refuse a provider whose errors are too large; returns the baseline's errors, which may vary more than they did.

    A network's losses have kinks (absolute values), and on which side of one a value falls is a matter of rounding: the
    same provider's error varies by a factor of 4 to 14. Without a loss the worst of hundreds of gradients is one of few
    numbers, and by luck. So both are asked again before one is refused, with inputs that differ by their last bit, and
    it is right if it is no worse than the baseline's worst, or both are alike in their medians.

    Args:
        runners: of the baseline and of the provider.
    """
    strict = workload.is_operation
    wrong = objection(found, baseline, row["dtype"], strict)
    if wrong and baseline and (workload.step or workload.what == "model") and row["mode"] == "training":
        several = _again(runners[0], truth)
        baseline = _of_each([baseline, *several], max)
        wrong = objection(found, baseline, row["dtype"], strict)
        if wrong:
            found = _of_each(_again(runners[1], truth), statistics.median)
            if not objection(found, _of_each(several, statistics.median), row["dtype"], strict):
                wrong, row["error"] = "", max(found)
    if wrong:
        row["refused"] = wrong
    return baseline


def _of_each(runs: list[list[float]], statistic: Callable) -> list[float]:
    """A statistic of each tensor's errors in several runs."""
    return [statistic(errors) for errors in zip(*runs, strict=True)]


def _again(runner: Runner, truth: list) -> list[list[float]]:
    """Errors in training a whole network, for a few inputs that differ by their last bit."""
    inputs, generator, found = runner.tensors(), torch.Generator().manual_seed(0), []
    exact = [t.detach().clone() for t in inputs]
    for _ in range(NUDGES):
        for t, value in zip(inputs, exact, strict=True):
            noise = torch.randn(t.shape, generator=generator).to(t) * EPSILON["fp32"] / 2
            t.data.copy_(value * (1 + noise))
        runner.reset()
        found.append(errors(runner.compared(runner.run("training"), "training"), truth))
    for t, value in zip(inputs, exact, strict=True):
        t.data.copy_(value)
    return found


def _time(ready: dict[str, Row], runners: dict, workload: Workload, device: torch.device, settings: Settings) -> None:
    """Fill in what is measured of those who passed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    runs, more = {}, {}
    for provider, row in ready.items():
        prepare, run = (partial(part, row["mode"]) for part in (runners[provider].prepare, runners[provider].run))
        peak = host = None
        try:
            if settings.memory and provider != GRAPH:  # its memory is set aside at capture, not at replay
                prepare()
                peak = peak_bytes(run, device)
            if device.type == "cuda":
                host = host_time(prepare, run)
        except Exception as problem:
            row["refused"] = reason(problem)
            continue
        runs[provider] = prepare, run
        more[provider] = {"peak_bytes": peak, "host_seconds": host}
    for provider, samples in interleaved(runs, settings.seconds, clock_of(device)).items():
        row = ready[provider]
        low, median, high = quartiles(samples)
        least = floor(row, name) if workload.step is None else None
        row |= {"median": median, "quartiles": [low, high], "samples": len(samples)}
        row |= {"floor": least, "floor_ratio": least and median / least} | more[provider]


def host_time(prepare: Run, run: Run) -> float:
    """Seconds of a call on a GPU until the host is free again, the device being idle at first: the least of a few."""
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
