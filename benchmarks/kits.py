"""Who computes: this package with a backend, or the original formulas; and what the machine is."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

import fastblocks
from benchmarks import original
from fastblocks.backend import use_backend


def get_kit(backend: str) -> ModuleType:
    """The namespace with the blocks; `"original"`, or a backend of the package, which is selected."""
    if backend == "original":
        return original
    use_backend(backend)
    return fastblocks


def describe_device() -> str:
    """One line: processor or GPU, versions, threads."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU ({processor()})"
    return (
        f"{device}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        f"torch {torch.__version__}, triton {triton}, Python {platform.python_version()}"
    )


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
