"""Launch configurations of the attention kernels: tile sizes, warps and stages, and why.

Nothing here was timed yet: the sizes are predictions, held against the compiler's report of registers and spills.
"""

from fastblocks.kernels.launch import LaunchConfig, config

# Their products read operands from shared memory; everywhere else (sm_80, sm_89, gfx942) operands take registers.
OPERANDS_IN_SHARED_MEMORY = ("sm_90", "sm_100", "sm_103")


def is_short(n_rows: int, block_d: int, element_size: int, architecture: str) -> bool:
    """Whether a program holds all keys of a head. Past 128 rows the operands of the loop over queries no longer fit:
    282 rows in backward spill 1 to 7 kB a thread in every shape tried, 4 to 16 warps; 128 rows of 64 channels with a
    window spill 216 bytes on sm_90, and their 96 kB would not fit an sm_89."""
    if element_size == 4:  # products without tensor cores keep their operands in registers
        return n_rows <= 64 and block_d <= 32
    return n_rows <= 128 and n_rows * block_d <= 128 * 32


def launch_config(kernel: str, n_rows: int, block_d: int, element_size: int, architecture: str) -> LaunchConfig:
    """The launch of one attention kernel; block_d is the padded head size.

    Predictions: a block of 128 queries reads its window's keys and table rows, which cost twice the bytes of a key in
    bfloat16, from L2 half as often as one of 64. Blocks of keys are larger than the blocks of queries that pass by,
    for the same reason. Two stages, because three hold twice the table in shared memory.
    """
    if kernel.startswith("whole"):  # a warpgroup for every 64 rows
        return config(4 if n_rows <= 64 else 8, 1, BLOCK_M=128)
    if kernel.startswith("register"):  # tiles of 16 rows: more warps would only repeat each other's operands
        return config(4, 1, BLOCK_N=64 if element_size == 2 and block_d <= 64 else 32 if block_d <= 128 else 16)
    if element_size == 4 and kernel == "grad_key" and block_d <= 32:
        return config(4, 1, BLOCK_M=32, BLOCK_N=32)  # of 8 warps ptxas makes 64 registers and a spill on sm_80
    if element_size == 4:  # no tensor cores: 4 warps spill 300 bytes a thread at D = 64
        return config(8, 1, BLOCK_M=32, BLOCK_N=32) if block_d <= 64 else config(8, 1, BLOCK_M=16, BLOCK_N=16)
    if block_d > 64:
        return config(8, 1, BLOCK_M=32, BLOCK_N=32) if kernel == "grad_key" else config(8, 1, BLOCK_M=64, BLOCK_N=32)
    roomy = architecture in OPERANDS_IN_SHARED_MEMORY
    if kernel == "grad_key":
        if block_d <= 32:
            return config(8, 2, BLOCK_M=32, BLOCK_N=128)
        return config(4 if roomy else 8, 2, BLOCK_M=32, BLOCK_N=64)  # 4 warps spill 8 bytes a thread on sm_80
    if kernel == "grad_query" and block_d > 32 and not roomy:
        return config(8, 2, BLOCK_M=64, BLOCK_N=64)  # 128 queries spill 648 bytes a thread on sm_80
    return config(8, 2, BLOCK_M=128, BLOCK_N=64)
