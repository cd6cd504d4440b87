"""The one place that imports Triton and knows interpreter, device and architecture."""

from functools import cache

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRETED", "architecture", "multiprocessors", "tl", "triton", "unsupported_reason"]

# Triton reads TRITON_INTERPRET when a kernel is decorated, so it has to be set before this module is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret


def unsupported_reason(device: torch.device) -> str:
    """Why no kernel can run on this device; an empty string if one can."""
    if INTERPRETED or device.type == "cuda":
        return ""
    return f"the input is on {device.type}; Triton needs a GPU, or TRITON_INTERPRET=1 set before Python starts"


@cache
def architecture(device: torch.device) -> str:
    """The launch tables' name of a device: `sm_90`, `gfx942`, or `interpreter`."""
    if INTERPRETED or device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; in the interpreter 4, so that loops over slabs are walked too."""
    if architecture(device) == "interpreter":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
