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
    divisible: tuple[str, ...] = ()  # integer arguments that are multiples of 16 there, which a launch finds out
