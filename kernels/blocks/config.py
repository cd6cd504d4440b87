"""Which way a block takes, and launch configurations of its kernels: tile sizes, warps and stages, and why.

Nothing was timed yet: the choices are predictions from the machine code, checked against the compiler's report of
registers per thread and spills.
"""

from functools import cache

import torch
from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.launch import LaunchConfig, config
from fastblocks.kernels.runtime import cdiv, power_of_two

# Most channels, in 16 bits, for which the norms' products and the MLP run in kernels of their own. Above, their tiles
# spill (256 channels), and the library's products with the kernels of `rows` between them are predicted to win.
FUSED_CHANNELS = 128
RECOMPUTED_CHANNELS = 64  # up to which the MLP's weight gradient recomputes the hidden units; above, that spills

OPERANDS_IN_SHARED_MEMORY = ("sm_90", "sm_100", "sm_103")  # elsewhere operands take registers


def fuses(channels: int, dtype: torch.dtype) -> bool:
    """Whether a block of this width, with products in this dtype, runs in fused kernels rather than the library's."""
    return dtype != torch.float32 and channels <= FUSED_CHANNELS


def fuses_backward(channels: int, weight: Tensor) -> bool:
    """The same of its backward pass, with products in the dtype and on the device of a weight.

    Above RECOMPUTED_CHANNELS the hidden units' gradients are stored on the way, for products of their own. Predicted at
    N 72192, C 128, H100: 300 µs, the library's products with the kernels of `rows` 440; H200: 290 and 307. Where
    operands take registers, 128 rows spill: there the library multiplies.
    """
    roomy = runtime.architecture(weight.device) in (*OPERANDS_IN_SHARED_MEMORY, "interpreter")
    return fuses(channels, weight.dtype) and (roomy or channels <= RECOMPUTED_CHANNELS)


def of_kernel(kernel: str, architecture: str, channels: int) -> LaunchConfig:
    """The launch of one kernel."""
    block_c = max(16, power_of_two(channels))
    wide, roomy = block_c > 64, architecture in OPERANDS_IN_SHARED_MEMORY
    if kernel == "norm_linear_forward":
        # One stage: two hold the next chunk of W in shared memory that a second resident program needs (48-59 µs
        # instead of 37.5).
        return config(8 if wide else 4, 1, BLOCK_M=128 if roomy else 64, BLOCK_N=128 if roomy else 64, BLOCK_C=block_c)
    if kernel == "norm_linear_grad_x":
        return config(4, 2, BLOCK_M=64, BLOCK_N=32, BLOCK_C=block_c)
    if kernel == "block_mlp_forward":
        if not roomy:
            return config(4, 2, BLOCK_M=64, BLOCK_F=32, BLOCK_C=block_c)
        # Three stages: Triton waits for every product, so that of two no copy would be in flight (99 µs instead of 74).
        return config(8 if wide else 4, 3, BLOCK_M=128, BLOCK_F=32, BLOCK_C=block_c)
    if kernel == "block_mlp_grad_x":
        if wide:  # stores the hidden units' gradients: 250 registers; 64 units would need 208 KB of shared memory
            return config(8, 3, BLOCK_M=128, BLOCK_F=32, BLOCK_C=block_c)
        return config(4, 3 if roomy else 2, BLOCK_M=64, BLOCK_F=32, BLOCK_C=block_c)
    if kernel == "block_mlp_grad_weight":
        if not roomy:
            return config(8, 2, BLOCK_M=32, BLOCK_F=64, BLOCK_C=block_c)
        return config(8, 3, BLOCK_M=64, BLOCK_F=128, BLOCK_C=block_c)
    return config(8, 3 if roomy else 2, BLOCK_M=64, BLOCK_N=128 if roomy else 64, BLOCK_C=block_c)


def slabs(n_rows: int, channels: int, device: torch.device) -> int:
    """How many slabs share the rows of a weight gradient: one program for every SM together. At 64 channels qkv and the
    MLP have two programs a slab; at 128, where the hidden units were stored, three and a multiple of it."""
    return max(1, min(cdiv(n_rows, 64), runtime.sm_count(device) // (2 if channels <= RECOMPUTED_CHANNELS else 3)))


@cache
def pack(channels: int) -> LaunchConfig:
    """Weights into their packed form: some 50 programs at 128 channels, as many as there is work for."""
    return config(4, BLOCK_R=16, BLOCK_C=min(64, max(16, power_of_two(channels))))


@cache
def unpack(channels: int, slabs: int) -> LaunchConfig:
    """Gradients out of the packed form: 16 rows in flight per column, of as many slabs as there are."""
    block_s = min(16, power_of_two(slabs))
    block_c = min(128, max(16, power_of_two(channels)))
    return config(4, BLOCK_S=block_s, BLOCK_R=16 // block_s, BLOCK_C=block_c)
