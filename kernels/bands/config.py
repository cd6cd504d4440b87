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
OPERANDS_IN_SHARED_MEMORY = ("sm_90", "sm_100", "sm_103")
PIECE, BLOCK, TILE = 16, 64, 64  # lanes at a time: on the way to bands, to bins, of the weights' gradients


@cache
def to_bands(features: int) -> LaunchConfig:
    """16 lanes, a product's least: 16 of 64 mel bands have no more, and four programs are resident. Predicted under
    autocast 18 µs, with 32 lanes and two programs 22; with half of 128 features, read twice, far more."""
    return config(4, 2, BLOCK_M=64, BLOCK_L=PIECE, BLOCK_N=_block_n(features, 128))


def to_bins(features: int, like: Tensor, dtype: torch.dtype) -> LaunchConfig:
    """128 rows share a tile of the weights where operands are multiplied from shared memory, of which three stages take
    90 KB: predicted 26 µs under autocast, with 64 rows 29 to 34. Elsewhere they take registers."""
    roomy = runtime.architecture(like.device) in OPERANDS_IN_SHARED_MEMORY and dtype != torch.float32
    return _to_bins(features, roomy)


@cache
def _to_bins(features: int, roomy: bool) -> LaunchConfig:
    warps, stages, rows = (8, 3, 128) if roomy else (4, 1, 64)
    return config(warps, stages, BLOCK_M=rows, BLOCK_L=BLOCK, BLOCK_N=_block_n(features, 64))


@cache
def pack_weight(block_l: int, block_n: int) -> LaunchConfig:
    return config(4, BLOCK_L=block_l, BLOCK_R=min(32, block_n))


@cache
def grad_weight(features: int) -> LaunchConfig:
    """Long loops: three stages of 32 rows."""
    return config(4, 3, BLOCK_M=32, BLOCK_L=TILE, BLOCK_N=_block_n(features, 128))


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
