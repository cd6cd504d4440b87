"""The rival of the row-wise operations."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from benchmarks.providers.skipped import Skipped


def liger(device: torch.device, kind: str) -> Callable:
    """Liger's RMSNorm, SwiGLU, or SwiGLU between two products."""
    if find_spec("liger_kernel") is None:
        raise Skipped("liger-kernel is not installed")
    if device.type != "cuda":
        raise Skipped("Liger's kernels need a GPU")
    from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu

    if kind == "norm":
        return lambda x, scale: liger_rms_norm(x, scale, 1e-6, in_place=False)
    if kind == "swiglu":
        return liger_swiglu
    return lambda x, gate, up, down: F.linear(liger_swiglu(F.linear(x, gate), F.linear(x, up)), down)
