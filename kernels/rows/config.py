"""Launch configurations of the row-wise kernels: tile sizes and warps, and why."""

from functools import cache

from fastblocks.kernels.launch import LaunchConfig, config
from fastblocks.kernels.runtime import power_of_two

PROGRAMS_PER_SM = 4  # where programs keep sums of columns: each writes a row of partial sums, which is read again


@cache
def rms_norm(channels: int) -> LaunchConfig:
    """A row stays in registers: 16 elements per thread and tensor, in 4 warps or as many as the row needs."""
    block_c = max(8, power_of_two(channels))
    warps = min(16, max(4, block_c // 512))
    return config(warps, BLOCK_M=max(1, warps * 512 // block_c), BLOCK_C=block_c)


@cache
def swiglu(columns: int) -> LaunchConfig:
    """16 elements per thread and tensor; 128 columns are whole 16-byte loads of a warp's half or more."""
    return config(4, BLOCK_M=16, BLOCK_F=min(128, max(16, power_of_two(columns))))
