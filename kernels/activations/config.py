"""Launch configurations of pointwise work on feature maps, and why."""

from functools import cache

from fastblocks.kernels.launch import LaunchConfig, config
from fastblocks.kernels.runtime import cdiv, power_of_two

MIN_RUN = 32  # elements of a row; below, a block would meet too many rows to sum each by itself
PROGRAMS_PER_SM = 4  # where programs keep sums of columns: each writes a row of partial sums, which is read again


@cache
def flat(inner: int) -> LaunchConfig:
    """Blocks no longer than a row of `inner` elements meet two rows at most, and two biases; RUNS is how many they can
    meet, 0 where that is not used. 8 elements per thread are one load of 16 bytes in 16 bits."""
    block = min(1024, max(256, power_of_two(inner + 1) // 2)) if inner >= MIN_RUN else 1024
    return config(block // 256, BLOCK=block, RUNS=cdiv(block - 1, inner) + 1 if inner >= MIN_RUN else 0)


@cache
def columns(width: int) -> LaunchConfig:
    """16 elements per thread and tensor; 128 columns are whole 16-byte loads."""
    block = min(128, max(16, power_of_two(width)))
    return config(4, BLOCK_M=2048 // block, BLOCK_N=block)


def gather(count: int) -> LaunchConfig:
    """All sums of a channel at once, up to 8 loads per thread: there are only as many programs as channels."""
    return config(1, BLOCK_P=128) if count <= 128 else config(4, BLOCK_P=1024)
