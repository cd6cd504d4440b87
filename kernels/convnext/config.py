"""Launch configurations of the ConvNeXt kernels: tile sizes, warps and stages, and why."""

from functools import cache

from fastblocks.kernels.launch import LaunchConfig, config
from fastblocks.kernels.runtime import cdiv, power_of_two

# Tensor cores take operands from shared memory; others want them in registers.
OPERANDS_IN_SHARED_MEMORY = ("sm_90", "sm_100", "sm_103")


@cache
def depthwise_conv(
    architecture: str,
    sm_count: int,
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

    RUN: consecutive outputs of a thread, which share inputs in registers; 8, which read 14 inputs of 7 taps, where 4
    read 10. Float32 takes one vector load's worth, 4, and strided kernels 4 at least: their runs read twice the inputs.
    Registers bound the tile: 32 float32 accumulators per thread take 120-160 registers. Large tiles of 4-byte inputs
    take 16, as do strided kernels (32 took 249) and the normalization of 64 channels; that of 128 takes 8: there five
    programs per SM beat two. 512 channels of 2 bytes take 64 in 4 warps, 168 registers, and three programs fit an SM.
    Without the normalization 32 channels in 2 warps make the most programs, two per SM at least.
    ROWS: rows of outputs that share inputs. Two read 8 rows of inputs instead of 14, and in 2 warps take so few
    registers that the programs of 32 channels are one wave. More channels have too few programs for it; sm_80 is bound
    by FMAs.
    Nothing here is timed; all of it is predicted.
    """
    accumulators, warps, wanted = 32, 2, 2 * sm_count
    block_c = max(16, power_of_two(channels if all_channels else min(channels, 32)))
    if all_channels:
        warps = 16 if block_c >= 1024 else 8 if block_c >= 256 else 4
        wanted = sm_count
        if block_c == 512 and itemsize == 2:
            warps, accumulators = 4, 64
        elif block_c >= 512 and itemsize == 4:
            accumulators = 16
        else:
            accumulators = {64: 16, 128: 8}.get(block_c, 32)
    if strided:
        accumulators = 16
    run = max(vector, 4) if strided or itemsize == 4 else 8
    rows = 1
    if run == 8 and channels <= 32 and sizes[0] > 1 and not strided and architecture != "sm_80":
        rows, warps, accumulators = 2, 2, 32
    runs = max(1, warps * 32 * accumulators // (block_c * run * rows))
    block_w = min(runs, power_of_two(-(-sizes[1] // run)), max(1, 32 // run) if sizes[0] > 1 else runs)
    block_h = min(runs // block_w, power_of_two(-(-sizes[0] // rows)))
    slices = batch * -(-channels // block_c)
    while block_h > 1 and slices * -(-sizes[0] // (block_h * rows)) * -(-sizes[1] // (block_w * run)) < wanted:
        block_h //= 2
    while block_w > 1 and slices * -(-sizes[0] // (block_h * rows)) * -(-sizes[1] // (block_w * run)) < wanted:
        block_w //= 2
    return config(warps, BLOCK_C=block_c, BLOCK_H=block_h, BLOCK_W=block_w, RUN=run, ROWS=rows)


@cache
def norm_backward(architecture: str, sm_count: int, *, channels: int, rows: int) -> tuple[LaunchConfig, int]:
    """Launch of LN's gradient, and how many programs share the rows.

    A tile of 2048 elements in 4 warps is 16 per thread; with three tiles of sums that is under 100 registers. Two (8
    warps) or four programs per SM: the second stage reads 12 bytes per channel and program.
    """
    block_c = max(16, power_of_two(channels))
    warps = 8 if block_c >= 1024 else 4
    block_m = max(1, warps * 512 // block_c)
    programs = max(1, min(-(-rows // block_m), sm_count * (2 if warps == 8 else 4)))
    return config(warps, BLOCK_C=block_c, BLOCK_M=block_m), programs


@cache
def grad_weight(
    architecture: str,
    sm_count: int,
    *,
    batch: int,
    channels: int,
    sizes: tuple[int, int],
    parts: int,
    fused: bool,
) -> tuple[LaunchConfig, int]:
    """Gradient of a depthwise convolution's weights, and how many splits share the positions.

    `parts` is how many programs (phases, rows and chunks of taps) share a split and a block of channels; `fused` is the
    gradient of x in the same pass. A program holds tiles of [channels, runs]: 7 of sums, 4 of x; fused, also 4 of dx
    and 7 of weights. Four elements per thread take 168 registers fused (8 took 255 and spilled on sm_90), else 80-128:
    three and four programs fit an SM, five of 32 channels. No more are launched, as a second wave of few would take as
    long as the first, and as many as share the tiles evenly. A prediction.
    """
    run = 4
    block_c = min(64, max(16, power_of_two(channels)))
    runs = 512 // block_c
    block_w = min(runs, power_of_two(-(-sizes[1] // run)))
    block_h = min(runs // block_w, power_of_two(sizes[0]))
    tiles = batch * -(-sizes[0] // block_h) * -(-sizes[1] // (block_w * run))
    most = max(1, (3 if fused else 4 if block_c == 64 else 5) * sm_count // (parts * -(-channels // block_c)))
    splits = cdiv(tiles, cdiv(tiles, most))
    return config(4, BLOCK_C=block_c, BLOCK_H=block_h, BLOCK_W=block_w, RUN=run), splits


@cache
def sum_splits(channels: int) -> LaunchConfig:
    """Second stage of sums over positions: 16 values per thread and step, as latency is all it costs; channels in whole
    memory sectors, few, for more programs. 525 splits of 64 channels: 4 µs predicted, 13 by 32 × 64 in 4 warps.
    """
    return config(8, BLOCK_S=128, BLOCK_C=min(32, max(16, power_of_two(channels))))


@cache
def mlp(channels: int, c_out: int, itemsize: int) -> LaunchConfig:
    """The fused MLP, forward and gradient of x.

    64 positions are one warpgroup's product, and make enough programs: 128 leave a second wave of few. The bytes that
    bind are the weights', which every program reads from L2: three stages keep two chunks on their way, and up to 32
    channels, where 6 or 7 programs per SM hide that latency, one. 4-byte inputs take 8 warps, for registers, and two
    stages, for shared memory. Predicted, not timed.
    """
    block_c, block_o = (max(16, power_of_two(c)) for c in (channels, c_out))
    warps, stages = (8, 2) if itemsize == 4 else (4, 1 if max(block_c, block_o) <= 32 else 3)
    return config(warps, stages, BLOCK_M=64, BLOCK_F=32, BLOCK_C=block_c, BLOCK_O=block_o)


@cache
def mlp_grad_weight(
    architecture: str, sm_count: int, *, batch: int, positions: int, channels: int, hidden: int, c_out: int
) -> tuple[LaunchConfig, int]:
    """The fused MLP's weights' gradients, and how many splits share the positions.

    A program holds a chunk of both weights as operands and of both gradients as accumulators. A chunk of 64 hidden
    units halves the passes over x and dy; it takes 137 and 244 registers per thread at 32 and 64 channels where tensor
    cores read operands from shared memory, and spills elsewhere. 32 take at most 168, and three programs fit an SM.
    Positions come 32 at a time, the next ones while these are multiplied; 64 take 229 registers and are not faster.
    Predicted, not timed.
    """
    block_c, block_o = (max(16, power_of_two(c)) for c in (channels, c_out))
    wide = architecture in OPERANDS_IN_SHARED_MEMORY and max(block_c, block_o) <= 64
    found = config(4, 2, BLOCK_M=32, BLOCK_F=64 if wide else 32, BLOCK_C=block_c, BLOCK_O=block_o)
    programs = sm_count * (2 if wide and max(block_c, block_o) > 32 else 3)
    tiles = batch * cdiv(positions, found["BLOCK_M"])
    return found, max(1, min(tiles, programs // cdiv(hidden, found["BLOCK_F"])))


@cache
def transposing(channels: int) -> LaunchConfig:
    """A transposing kernel: a tile is read along one side and written along the other; 64 × 64 fills sectors on
    both."""
    return config(8, BLOCK_S=64, BLOCK_C=min(64, max(16, power_of_two(channels))))


@cache
def pointwise(columns: int) -> LaunchConfig:
    """An elementwise kernel over rows of hidden units with a sum per column: 16 elements per thread and tensor, 128
    columns for whole 16-byte loads."""
    return config(4, BLOCK_M=16, BLOCK_F=min(128, max(16, power_of_two(columns))))


def splits(sm_count: int, tiles: int, columns: int) -> int:
    """How many splits share `tiles` tiles, at `columns` programs per split: 4 programs per SM."""
    return max(1, min(tiles, 4 * sm_count // columns))
