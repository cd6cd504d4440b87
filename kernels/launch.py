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


def attention_is_whole(n_rows: int, block_d: int, element_size: int, architecture: str) -> bool:
    """Whether a program holds all keys of a head. Past 128 rows the operands of the loop over queries no longer fit:
    282 rows in backward spill 1 to 7 kB a thread in every shape tried, 4 to 16 warps."""
    if element_size == 4:  # products without tensor cores keep their operands in registers
        return n_rows <= 64 and block_d <= 32
    return n_rows <= 128 and n_rows * block_d <= 128 * 64


def attention_config(kernel: str, n_rows: int, block_d: int, element_size: int, architecture: str) -> LaunchConfig:
    """The launch of one attention kernel; block_d is the padded head size."""
    if kernel.startswith("whole"):
        return config(4 if n_rows <= 64 else 8, 1, BLOCK_M=128)
    if element_size == 4:
        if block_d <= 64:
            return config(8, 1, BLOCK_M=32, BLOCK_N=32)
        return config(8, 1, BLOCK_M=16, BLOCK_N=16)
    if block_d > 64:
        return config(8, 1, BLOCK_M=64, BLOCK_N=32) if kernel != "grad_key" else config(8, 1, BLOCK_M=32, BLOCK_N=64)
    if kernel == "grad_key":
        return config(8, 2, BLOCK_M=32, BLOCK_N=128) if block_d <= 32 else config(4, 2, BLOCK_M=32, BLOCK_N=64)
    return config(8, 2, BLOCK_M=128, BLOCK_N=64)
