"""Launch configurations: what a kernel's tile sizes, warps and stages are on an architecture, and why.

Every choice carries its reason or its measurement beside it. There is no autotuning at run time: the first call of a
process compiles one configuration a kernel. `python -m benchmarks tune OP` measures candidates and prints an entry.
"""

from dataclasses import dataclass
from functools import cache


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


# Recurrences. `units` is the tile's width, a power of two from 16 on; `fused` says that the input's projection and all
# gradients are made inside the time loop. Nothing here was timed: every entry is a prediction, made from the code that
# Triton 3.7 emits for sm_90 (GRU, bfloat16), by the rule that a lone program waits for its own chain of instructions.
#
# Products of 16 bits run transposed, weights · h with the batch in columns: an instruction takes 8 columns, so 8 rows
# of batch halve the work on the chain (units 16: 12 MUFU and 110 instructions a step; 16 rows of batch in rows: 24 and
# 166), twice as many programs fill twice as many multiprocessors, and at one warp h reaches its next product by two
# shuffles, without shared memory. A warp takes 16 units of a gate, so the layouts of sums, gates and state agree.
RECURRENT_FORWARD = {
    16: config(1, 3, BLOCK_B=8, TRANSPOSED=1),
    32: config(1, 3, BLOCK_B=8, TRANSPOSED=1),  # 80 registers; a second warp would need a barrier a step
    64: config(4, 3, BLOCK_B=8, TRANSPOSED=1),
    128: config(8, 3, BLOCK_B=8, TRANSPOSED=1),  # 96 KB of weights: one program a multiprocessor
}
RECURRENT_BACKWARD = {
    16: config(1, 3, BLOCK_B=8, TRANSPOSED=1),
    32: config(2, 3, BLOCK_B=8, TRANSPOSED=1),
    64: config(4, 3, BLOCK_B=8, TRANSPOSED=1),
    128: config(8, 3, BLOCK_B=8, TRANSPOSED=1),
}
# By units and LSTM. The weights' gradients are sums over the batch, a product's inner dimension: 16 rows at least.
RECURRENT_BACKWARD_FUSED = {
    (16, False): config(1, 3, BLOCK_B=16, TRANSPOSED=1),  # 171 registers, two groups of 8 units 254
    (16, True): config(4, 2, BLOCK_B=16, TRANSPOSED=1),  # two warps spill 8 bytes on sm_80 with two groups of 8 units
    (32, False): config(4, 2, BLOCK_B=16, TRANSPOSED=0),  # transposed, two of the four warps would repeat two others
    (32, True): config(4, 2, BLOCK_B=16, TRANSPOSED=0),
}
# Honest float32 has no tensor core: the products are FMAs, whose operands are read from shared memory; untransposed
# they take a third to a quarter of the loads. Warps are as many as keep the sums in registers.
RECURRENT_FLOAT32 = {
    16: config(4, 2, BLOCK_B=8, TRANSPOSED=0),  # one warp spills with two groups of 16 inputs
    32: config(4, 2, BLOCK_B=8, TRANSPOSED=0),
    64: config(8, 2, BLOCK_B=8, TRANSPOSED=0),
}
RECURRENT_FLOAT32_BACKWARD_FUSED = {16: config(8, 2, BLOCK_B=16, TRANSPOSED=0)}  # LSTM at 4 warps: 255 registers


def recurrent(units: int, lstm: bool, backward: bool, fused: bool, float32: bool) -> LaunchConfig:
    """A time loop's configuration."""
    if float32:
        return (RECURRENT_FLOAT32_BACKWARD_FUSED if backward and fused else RECURRENT_FLOAT32)[units]
    if backward:
        return RECURRENT_BACKWARD_FUSED[units, lstm] if fused else RECURRENT_BACKWARD[units]
    return RECURRENT_FORWARD[units]


def recurrent_largest(architecture: str, float32: bool) -> int:
    """The largest hidden size whose recurrent weights (LSTM, bytes: 4 · H² · 2 or 4) stay in shared memory.

    163 KB on sm_80, 227 KB from sm_90 on, 99 KB on the consumers' sm_86, sm_89 and sm_120, 64 KB on gfx942.
    """
    if architecture.startswith("gfx"):
        return 32 if float32 else 64
    return 64 if float32 or architecture in ("sm_86", "sm_89", "sm_120") else 128


# Gradients of the weights as one long product: 64 × 64 results a program keep 4 warps' sums in 32 registers.
RECURRENT_WEIGHTS = config(4, 3, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64)


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


# ---- ConvNeXt --------------------------------------------------------------------------------------------------------


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@cache
def depthwise_conv(
    architecture: str,
    multiprocessors: int,
    *,
    batch: int,
    channels: int,
    sizes: tuple[int, int],
    itemsize: int,
    vector: int,
    strided: bool,
    all_channels: bool,
) -> LaunchConfig:
    """Depthwise convolution, forward and gradient of x.

    RUN: the outputs of a thread that share their inputs in registers; one vector load's worth, or 4.
    Registers bound the tile: 32 float32 accumulators a thread compile to 64-196 registers. 16 warps with 4-byte inputs
    take 16 (32 spilled 8 bytes on sm_90), and strided kernels, whose runs read twice the inputs (32 took 249).
    Nothing here is timed; that smaller tiles pay where the grid would not fill the device is a prediction.
    """
    run = max(vector, 4)
    block_c = _power_of_two(channels) if all_channels else min(64, _power_of_two(channels))
    block_c = max(16, block_c)
    warps = 16 if block_c >= 512 else 8 if block_c >= 64 and all_channels else 4
    accumulators = 16 if strided or (warps == 16 and itemsize == 4) else 32
    runs = max(1, warps * 32 * accumulators // (block_c * run))
    block_w = min(runs, _power_of_two(-(-sizes[1] // run)), max(1, 32 // run) if sizes[0] > 1 else runs)
    block_h = min(runs // block_w, _power_of_two(sizes[0]))
    slices = batch * -(-channels // block_c)
    while block_h > 1 and slices * -(-sizes[0] // block_h) * -(-sizes[1] // (block_w * run)) < multiprocessors:
        block_h //= 2
    while block_w > 1 and slices * -(-sizes[0] // block_h) * -(-sizes[1] // (block_w * run)) < multiprocessors:
        block_w //= 2
    return config(warps, BLOCK_C=block_c, BLOCK_H=block_h, BLOCK_W=block_w, RUN=run)


@cache
def norm_backward(architecture: str, multiprocessors: int, *, channels: int, rows: int) -> tuple[LaunchConfig, int]:
    """LN's gradient and how many programs share the rows.

    A tile of 2048 elements in 4 warps is 16 a thread; with three tiles of sums that is under 100 registers. Two
    programs a multiprocessor: the second stage reads 12 bytes a channel and program.
    """
    block_c = max(16, _power_of_two(channels))
    warps = 8 if block_c >= 1024 else 4
    block_m = max(1, warps * 512 // block_c)
    programs = max(1, min(-(-rows // block_m), multiprocessors * (2 if warps == 8 else 4)))
    return config(warps, BLOCK_C=block_c, BLOCK_M=block_m), programs


@cache
def grad_weight(
    architecture: str,
    multiprocessors: int,
    *,
    batch: int,
    channels: int,
    sizes: tuple[int, int],
    parts: int,
    fused: bool,
) -> tuple[LaunchConfig, int]:
    """Gradient of a depthwise convolution's weights, and how many slabs of positions there are.

    `parts` is how many programs (phases, rows and chunks of taps) share a slab and a block of channels; `fused` is the
    gradient of x in the same pass. Tiles of [channels, runs]: 7 of sums, 4 of x, fused 4 of dx and 7 of weights more;
    at 8 elements a thread 56 + 32 registers, at 4 fused 88 (8 took 255 and spilled on sm_90). About 4 programs a
    multiprocessor is a prediction.
    """
    run = 4
    block_c = min(64, max(16, _power_of_two(channels)))
    runs = (1024 if block_c == 64 else 512) // block_c
    block_w = min(runs, _power_of_two(-(-sizes[1] // run)))
    block_h = min(runs // block_w, _power_of_two(sizes[0]))
    tiles = batch * -(-sizes[0] // block_h) * -(-sizes[1] // (block_w * run))
    slabs = max(1, min(tiles, 4 * multiprocessors // (parts * -(-channels // block_c))))
    warps = 8 if fused and block_c == 64 else 4
    return config(warps, BLOCK_C=block_c, BLOCK_H=block_h, BLOCK_W=block_w, RUN=run), slabs


@cache
def sum_slabs(channels: int) -> LaunchConfig:
    """Second stage of sums over positions: 32 slabs a step, whole sectors of channels."""
    return config(4, BLOCK_S=32, BLOCK_C=min(64, max(16, _power_of_two(channels))))


@cache
def sum_rows() -> LaunchConfig:
    """Second stage of sums: 32 rows × 128 columns a step, 32 loads of a thread in flight."""
    return config(4, BLOCK_S=32, BLOCK_N=128)


@cache
def mlp(architecture: str, which: str, channels: int, c_out: int, itemsize: int, gated: bool) -> LaunchConfig:
    """The fused MLP: the largest tiles that spill on neither sm_80 nor sm_90 (64 and 128 channels, 16 bits).

    Weights' gradients hold both weights' chunks as operands and both gradients as sums: 32 × 32 takes 168-241
    registers at 64 channels, 64 rows or hidden units spill there, and everything does at 128. Not timed.
    """
    block_c, block_o = (max(16, _power_of_two(c)) for c in (channels, c_out))
    wide = max(block_c, block_o) >= 128 or itemsize == 4
    blocks = {"BLOCK_C": block_c, "BLOCK_O": block_o}
    if which == "forward":
        if wide:
            return config(8, 2, BLOCK_M=64, BLOCK_F=32, **blocks)
        return config(4, 2, BLOCK_M=64 if gated else 128, BLOCK_F=64, **blocks)
    if which == "grad_x":
        return config(8 if wide else 4, 2, BLOCK_M=64, BLOCK_F=32, **blocks)
    return config(4, 1, BLOCK_M=32, BLOCK_F=32, **blocks)


@cache
def transposing(channels: int) -> LaunchConfig:
    """A tile that is read along one side and written along the other: 64 × 64 fills sectors on both."""
    return config(8, BLOCK_S=64, BLOCK_C=min(64, max(16, _power_of_two(channels))))


@cache
def pointwise(columns: int) -> LaunchConfig:
    """Rows of hidden units with a sum a column: 8 elements a thread and tensor, 128 columns for whole 16-byte loads."""
    return config(4, BLOCK_M=16, BLOCK_F=min(128, max(16, _power_of_two(columns))))


def slabs(multiprocessors: int, tiles: int, columns: int) -> int:
    """Programs that share `tiles` rows of tiles, `columns` programs beside each other: 4 a multiprocessor."""
    return max(1, min(tiles, 4 * multiprocessors // columns))
