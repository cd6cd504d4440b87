"""The one place that imports Triton and knows interpreter, device and architecture."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
import triton.language as tl

__all__ = ["HIP", "INTERPRETED", "architecture", "multiprocessors", "pretending", "tl", "triton", "unsupported_reason"]

# Triton reads TRITON_INTERPRET when a kernel is decorated, so it has to be set before this module is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret
HIP: bool = torch.version.hip is not None

# Of the architectures that reports are made for without one at hand.
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}

_pretended: str | None = None  # an architecture that reports ask about


def unsupported_reason(device: torch.device) -> str:
    """Why no kernel can run on this device; an empty string if one can."""
    if INTERPRETED or device.type == "cuda":
        return ""
    return f"the input is on {device.type}; Triton needs a GPU, or TRITON_INTERPRET=1 set before Python starts"


def architecture(device: torch.device) -> str:
    """The launch tables' name of a device: `sm_90`, `gfx942`, or `interpreter`."""
    return _pretended or _architecture(device)


@cache
def _architecture(device: torch.device) -> str:
    if INTERPRETED or device.type != "cuda":
        return "interpreter"
    if HIP:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; in the interpreter 4, so that loops over slabs are walked too."""
    return MULTIPROCESSORS[_pretended] if _pretended else _multiprocessors(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    if _architecture(device) == "interpreter":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def pretending(name: str) -> Iterator[None]:
    """Within it every device has this architecture."""
    global _pretended
    previous, _pretended = _pretended, name
    try:
        yield
    finally:
        _pretended = previous
