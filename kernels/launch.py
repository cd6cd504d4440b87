"""Launch configurations: what a kernel's tile sizes, warps and stages are on an architecture, and why.

Every choice carries its reason or its measurement beside it. There is no autotuning at run time: the first call of a
process compiles one configuration a kernel. `python -m benchmarks tune OP` measures candidates and prints an entry.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched. `blocks` holds its constexpr tile sizes by name, as a sorted tuple of pairs."""

    num_warps: int
    num_stages: int = 1
    blocks: tuple[tuple[str, int], ...] = ()

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    def keywords(self) -> dict[str, int]:
        """Everything as keyword arguments of a launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


def config(num_warps: int, num_stages: int = 1, **blocks: int) -> LaunchConfig:
    """`config(4, 2, BLOCK_M=64)` reads better than the dataclass."""
    return LaunchConfig(num_warps, num_stages, tuple(sorted(blocks.items())))


@dataclass(frozen=True)
class CompileCase:
    """One kernel as one launch compiles it, for reports that need no GPU."""

    label: str
    kernel: object  # the @triton.jit function
    signature: dict[str, str]
    constants: dict[str, object]
    config: LaunchConfig


# ---- attention -------------------------------------------------------------------------------------------------------
# Nothing here was timed yet: the sizes are predictions, held against the compiler's report of registers and spills.

# Their products read operands from shared memory; everywhere else (sm_80, sm_89, gfx942) operands take registers.
OPERANDS_IN_SHARED_MEMORY = ("sm_90", "sm_100", "sm_103")


def attention_is_whole(n_rows: int, block_d: int, element_size: int, architecture: str) -> bool:
    """Whether a program holds all keys of a head. Past 128 rows the operands of the loop over queries no longer fit:
    282 rows in backward spill 1 to 7 kB a thread in every shape tried, 4 to 16 warps; 128 rows of 64 channels with a
    window spill 216 bytes on sm_90, and their 96 kB would not fit an sm_89."""
    if element_size == 4:  # products without tensor cores keep their operands in registers
        return n_rows <= 64 and block_d <= 32
    return n_rows <= 128 and n_rows * block_d <= 128 * 32


def attention_config(kernel: str, n_rows: int, block_d: int, element_size: int, architecture: str) -> LaunchConfig:
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
