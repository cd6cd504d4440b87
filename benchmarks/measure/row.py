"""What was measured of one provider, workload, mode and dtype."""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure.floor import Work
from benchmarks.measure.timing import Timing
from benchmarks.providers.skipped import Skipped
from benchmarks.workloads.workload import Workload


@dataclass
class Row:
    """Without a timing, `refused` says why."""

    workload: Workload
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
        row = {"workload": self.workload.name, "shape": self.workload.shape}
        row |= {key: getattr(self, key) for key in ("mode", "dtype", "provider", "error")}
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
