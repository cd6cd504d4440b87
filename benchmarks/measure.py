"""One case measured: time forward and in training, memory, error, for every provider."""

from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch

from benchmarks import original
from benchmarks.case import Case, make_instances, worst_error
from benchmarks.timing import Timing, clock_of, interleaved, peak_bytes

ORIGINAL, FUSED = "original", "fastblocks"  # the providers' names


@dataclass(frozen=True)
class Result:
    """What was measured of a case; dictionaries have a provider's name as key."""

    case: Case
    bytes: int
    forward: dict[str, Timing]
    training: dict[str, Timing]
    peak: dict[str, int]
    error: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Everything but the functions."""
        case = {k: getattr(self.case, k) for k in ("name", "what", "shape", "flops")}
        times = {
            kind: {name: asdict(timing) | {"quartiles": timing.quartiles} for name, timing in timings.items()}
            for kind, timings in (("forward", self.forward), ("training", self.training))
        }
        return case | {"bytes": self.bytes} | times | {"peak_bytes": self.peak, "error": self.error}


def measure(case: Case, kits: dict[str, ModuleType], device: torch.device, seconds: float) -> Result:
    """Measure a case.

    Args:
        case: the case.
        kits: provider -> namespace.
        device: where.
        seconds: to spend on samples, forward and training together; memory and error come on top.
    """
    instances = make_instances(case, kits, device)
    clock = clock_of(device)
    for instance in instances.values():
        instance.set_training(False)
    error, moved = errors(case, instances, device)
    forward = interleaved({n: i.forward for n, i in instances.items()}, seconds / 3, clock=clock)
    for instance in instances.values():
        instance.set_training(True)
    peak = {name: peak_bytes(instance.train, device) for name, instance in instances.items()}
    training = interleaved({n: i.train for n, i in instances.items()}, seconds * 2 / 3, clock=clock)
    return Result(case, moved, forward, training, peak, error)


@torch.no_grad()
def errors(case: Case, instances: dict, device: torch.device) -> tuple[dict[str, float], int]:
    """Each provider's worst relative error against the original formulas in float64, and the bytes of a forward."""
    (reference,) = make_instances(case, {ORIGINAL: original}, device, torch.float64).values()
    reference.set_training(False)
    want = reference.forward()
    found, moved = {}, 0
    for name, instance in instances.items():
        got = instance.forward()
        moved = instance.bytes_moved(got)
        found[name] = worst_error(got, want)
    return found, moved
