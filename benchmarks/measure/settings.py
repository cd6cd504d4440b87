"""What is asked for of each workload."""

import argparse
from dataclasses import dataclass

from benchmarks import providers
from benchmarks.providers.runner import DTYPES
from benchmarks.workloads import MODES

CHOICES = {"mode": MODES, "dtype": tuple(DTYPES), "provider": providers.PROVIDERS}


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


def values(options: argparse.Namespace, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
    """The values of a repeatable option.

    Raises:
        ValueError: for a value that it does not take.
    """
    found = [v for text in getattr(options, name) or () for v in text.split(",") if v]
    for value in found:
        if value not in CHOICES[name]:
            raise ValueError(f"--{name}: {value!r} is none of {', '.join(CHOICES[name])}")
    return tuple(dict.fromkeys(found)) or default
