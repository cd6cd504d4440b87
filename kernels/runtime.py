"""The one place that imports Triton and knows interpreter, device and architecture."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
import triton.language as tl

__all__ = [
    "HIP",
    "INTERPRETED",
    "VERSION",
    "allows_tf32",
    "architecture",
    "cdiv",
    "power_of_two",
    "pretending",
    "shared_memory",
    "sm_count",
    "tl",
    "triton",
    "unsupported_reason",
]

# Triton reads TRITON_INTERPRET when a kernel is decorated, so it has to be set before this module is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret
HIP: bool = torch.version.hip is not None
VERSION: tuple[int, ...] = tuple(map(int, triton.__version__.split(".")[:2]))  # of Triton

# SMs per GPU, for reports on architectures that this machine does not have.
SM_COUNT = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}

# KiB of shared memory that one program can have. From NVIDIA's CUDA programming guide, table of compute capabilities,
# and AMD's CDNA3 ISA, "Local data share". Other architectures count as the smallest of their vendor.
SHARED_KIB = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_87": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_103": 227,
    "sm_120": 99,
    "gfx942": 64,
    "interpreter": 227,
}

_pretended: str | None = None  # the architecture set by `pretending`


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (Triton's own, which kernels can call too, takes 4 µs.)"""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def unsupported_reason(device: torch.device) -> str:
    """Why no kernel can run on this device; an empty string if one can."""
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return f"the input is on {device.type}; Triton needs a GPU, or TRITON_INTERPRET=1 set before Python starts"
    return _too_old(architecture(device))


@cache
def _too_old(name: str) -> str:
    """Triton supports NVIDIA's GPUs from compute capability 8.0 on; the ones before it have no bfloat16."""
    if name.startswith("sm_") and int(name.removeprefix("sm_")) < 80:
        return f"the GPU is {name}, Triton needs sm_80 or later"
    return ""


def is_capturing() -> bool:
    """Whether the current stream's launches go into a CUDA graph; False without CUDA, too."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def allows_tf32() -> bool:
    """Whether float32 products may round their operands to TF32.

    PyTorch 2.9 has `fp32_precision` beside `allow_tf32`, follows both switches in it, and raises when `allow_tf32` is
    read after the new switch was set.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def shared_memory(name: str) -> int:
    """Bytes of shared memory available to one program on an architecture."""
    return SHARED_KIB.get(name, 64 if name.startswith("gfx") else 99) << 10


def architecture(device: torch.device) -> str:
    """A device's architecture: `sm_90`, `gfx942`, …, or `interpreter`."""
    return _pretended or _architecture(device)


@cache
def _architecture(device: torch.device) -> str:
    if INTERPRETED or device.type != "cuda":
        return "interpreter"
    if HIP:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def sm_count(device: torch.device) -> int:
    """Number of SMs; 4 in the interpreter, so that tests also run programs that loop over several tiles."""
    return SM_COUNT[_pretended] if _pretended else _sm_count(device)


@cache
def _sm_count(device: torch.device) -> int:
    if _architecture(device) == "interpreter":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def pretending(name: str) -> Iterator[None]:
    """Inside it every device counts as this architecture."""
    global _pretended
    previous, _pretended = _pretended, name
    try:
        yield
    finally:
        _pretended = previous
