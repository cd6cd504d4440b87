"""A standard workload measured: every provider checked against float64, then timed in turn with the others."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.limits import Work, work
from benchmarks.rivals import Skipped
from benchmarks.runners import EPSILON, products
from benchmarks.timing import Run, Timing, clock_of, interleaved, peak_bytes
from benchmarks.workloads import Workload

TOLERANCE = 1.5  # times eager's own error in the same dtype, plus one rounding
ALONE = 8  # roundings, where eager cannot run to be compared with
HOST_CALLS = 8
LEAST = 3  # samples


@dataclass(frozen=True)
class Settings:
    """What a run of the suite does with each workload.

    Args:
        modes: of `workloads.MODES`.
        dtypes: of `runners.DTYPES`.
        providers: of `providers.PROVIDERS`; eager's error is found even if eager is not among them.
        seconds: for the samples of one workload, mode and dtype; checks and compilation come on top.
        compiler: torch.compile's backend.
        memory: also find the peak.
    """

    modes: tuple[str, ...] = ("forward", "backward", "training")
    dtypes: tuple[str, ...] = ("bf16",)
    providers: tuple[str, ...] = providers.PROVIDERS
    seconds: float = 1.0
    compiler: str = "inductor"
    memory: bool = True


@dataclass
class Row:
    """One provider, workload, mode and dtype; without a timing, `refused` says why."""

    workload: str
    shape: str
    mode: str
    dtype: str
    provider: str
    timing: Timing | None = None
    refused: str = ""
    error: float | None = None
    work: Work | None = None
    floor: float | None = None  # seconds
    peak_bytes: int | None = None
    host_seconds: float | None = None  # of a call, on a GPU: until the host is free again

    def as_json(self) -> dict[str, Any]:
        """Seconds and bytes; a refused row has no times."""
        row = {key: getattr(self, key) for key in ("workload", "shape", "mode", "dtype", "provider", "error")}
        if self.work:
            row |= {"bytes": self.work.bytes, "flops": self.work.flops}
        if self.timing is None:
            return row | {"refused": self.refused}
        low, median, high = self.timing.quartiles
        row |= {"median": median, "quartiles": [low, high], "samples": len(self.timing.samples)}
        row |= {"floor": self.floor, "floor_ratio": self.floor and median / self.floor}
        return row | {"peak_bytes": self.peak_bytes, "host_seconds": self.host_seconds}


def reason(problem: BaseException) -> str:
    """One line of an exception."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    first = next((line.strip() for line in str(problem).splitlines() if line.strip()), "")
    return f"{type(problem).__name__}: {first}"[:200] if not isinstance(problem, Skipped) else str(problem)


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
    wanted = names if providers.EAGER in names else [providers.EAGER, *names]
    runners, excuses = {}, {}
    for name in wanted:
        try:
            runners[name] = providers.prepare(name, workload, device, dtype, settings.compiler)
        except Exception as problem:
            excuses[name] = reason(problem)
    rows = []
    for mode in settings.modes:
        if not isinstance(truth := _truth(workload, device, dtype, mode), list):
            rows += [Row(workload.name, workload.case.shape, mode, dtype, n, refused=truth) for n in names]
            continue
        yardstick, ready = None, {}
        for name in wanted:
            row = Row(workload.name, workload.case.shape, mode, dtype, name, refused=excuses.get(name, ""))
            if not row.refused:
                yardstick = _check(row, runners[name], truth, yardstick, workload.is_operation)
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


def errors(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> list[float]:
    """Of each tensor: the largest absolute error over the largest absolute value; infinite where there is a NaN."""
    found = []
    for g, w in zip(got, want, strict=False):  # a rival has fewer: `Runner.compared`
        if w is None or g is None or not w.numel():
            found.append(0.0 if w is None or g is not None or not w.any() else float("inf"))
            continue
        scale = w.abs().max().clamp_min(1e-30)
        value = ((g.detach().double() - w).abs().max() / scale).item()
        found.append(value if value == value else float("inf"))
    return found


def _check(row: Row, runner, truth: list, yardstick: list[float] | None, strict: bool) -> list[float] | None:
    """Note a provider's error, refuse it if it is too large; returns eager's errors once they are known.

    Strict is tensor by tensor. Through many layers a small tensor's error is a matter of luck, for eager too, so there
    every tensor is held against eager's worst.
    """
    try:
        runner.reset()
        runner.prepare(row.mode)
        results = runner.run(row.mode)
        found = errors(runner.compared(results, row.mode), truth)
    except Exception as problem:
        row.refused = reason(problem)
        runner.release()
        _clean()
        return yardstick
    row.error = max(found, default=0.0)
    if row.provider == providers.EAGER:
        return found
    epsilon = EPSILON[row.dtype]
    eager = yardstick
    if yardstick and not strict:
        yardstick = [max(yardstick)] * len(yardstick)
    for i, error in enumerate(found):
        allowed = ALONE * epsilon if yardstick is None else TOLERANCE * yardstick[i] + epsilon
        if not error <= allowed:
            row.refused = f"wrong: error {error:.1e}, allowed {allowed:.1e}"
            row.error = error
            break
    return eager


def _time(ready: dict[str, Row], runners: dict, mode: str, workload: Workload, device, settings: Settings) -> None:
    """Fill in what is measured of those who passed."""
    if not ready:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    plain = next((r for r in map(runners.get, ready) if not r.foreign), runners[next(iter(ready))])
    outputs = getattr(plain, "runner", plain).run("forward")
    amount = work(mode, plain.tensors(), plain.weights, outputs, workload.case.flops)
    del outputs
    for provider, row in list(ready.items()):
        prepare, run = partial(runners[provider].prepare, mode), partial(runners[provider].run, mode)
        row.work, row.floor = amount, amount.floor(name) if workload.has_floor else None
        try:
            if settings.memory and provider != "fused-graph":  # its memory is set aside at capture, not at replay
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
