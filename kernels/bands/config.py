"""Launch configurations of the band kernels: tile sizes, warps and stages, and why.

Nothing was timed yet: the choices are predictions from the machine code, checked against the compiler's report of
registers per thread and spills.
"""

from functools import cache

import torch
from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.launch import LaunchConfig, config
from fastblocks.kernels.runtime import cdiv, power_of_two, tl

PROGRAMS_PER_SM = 4  # that share the rows of the weights' gradients: two at a time


@cache
def to_bands(features: int) -> LaunchConfig:
    """16 lanes, a product's least: 16 of 64 mel bands have no more, and four programs are resident. Predicted under
    autocast 18 µs, with 32 lanes and two programs 22; with half of 128 features, read twice, far more."""
    return config(4, 2, BLOCK_M=64, BLOCK_L=16, BLOCK_N=_block_n(features, 128))


@cache
def to_bins(features: int) -> LaunchConfig:
    """Loops are short, so that a stage loaded ahead is often one too many, and a third resident program hides more:
    predicted 28 µs, with 128 features at a time 31, with two stages 34."""
    return config(4, 1, BLOCK_M=64, BLOCK_L=64, BLOCK_N=_block_n(features, 64))


@cache
def pack_weight(block_l: int, block_n: int) -> LaunchConfig:
    return config(4, BLOCK_L=block_l, BLOCK_R=min(32, block_n))


@cache
def grad_weight(features: int) -> LaunchConfig:
    """Long loops: three stages of 32 rows."""
    return config(4, 3, BLOCK_M=32, BLOCK_L=64, BLOCK_N=_block_n(features, 128))


@cache
def sum_slabs(features: int) -> LaunchConfig:
    block_n = _block_n(features, 128)
    return config(4, BLOCK_L=2048 // block_n, BLOCK_N=block_n)


def _block_n(features: int, most: int) -> int:
    return min(most, max(16, power_of_two(features)))


def slabs(blocks: int, tiles: int, like: Tensor) -> int:
    """How many slabs share the blocks of rows of the weights' gradients: as many programs as are resident together."""
    wanted = PROGRAMS_PER_SM * runtime.sm_count(like.device) // tiles
    return max(1, min(wanted, cdiv(blocks, 2)))


OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and runtime.allows_tf32() else "ieee"


def product(dtype: torch.dtype) -> dict:
    """How operands are rounded to `dtype` and multiplied, as arguments of a kernel."""
    return {"DTYPE": OPERANDS[dtype], "PRECISION": precision(dtype)}


def unsupported_reason(x: Tensor, *others: Tensor) -> str:
    """Why the kernels do not take x with these weights; an empty string if they do."""
    for tensor in others:
        if tensor.dtype not in OPERANDS:
            return f"no kernel for weights in {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.device != x.device:
            return f"weights on {tensor.device}, input on {x.device}"
        if tensor.numel() == 0:
            return "the weights are empty"
    if not torch.is_autocast_enabled(x.device.type) and any(tensor.dtype != x.dtype for tensor in others):
        return "x and the weights have different dtypes"
    return ""
