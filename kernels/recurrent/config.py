"""Launch configurations of the recurrent kernels: tile sizes, warps and stages, and why."""

from fastblocks.kernels import runtime
from fastblocks.kernels.launch import LaunchConfig, config

# Time loops. `units` is the tile's width, a power of two from 16 on; `fused`: the input's projection and all gradients
# are computed inside the time loop. Nothing here was timed: every entry is a prediction from the code that Triton 3.7
# emits for sm_90 (GRU, bfloat16), assuming that the latency of a step's chain of dependent instructions is what counts.
#
# Products of 16 bits run transposed, weights · h with the batch in columns: an instruction takes 8 columns, so 8 rows
# of batch halve the work on the chain (units 16: 12 MUFU and 110 instructions a step; 16 rows of batch in rows: 24 and
# 166), twice as many programs fill twice as many SMs, and at one warp h reaches its next product by two
# shuffles, without shared memory. A warp takes 16 units of a gate: preactivations, gates and state share a layout.
FORWARD = {
    16: config(1, 3, BLOCK_B=8, TRANSPOSED=1),
    32: config(1, 3, BLOCK_B=8, TRANSPOSED=1),  # 80 registers per thread; a second warp would need a barrier per step
    64: config(4, 3, BLOCK_B=8, TRANSPOSED=1),
    128: config(8, 3, BLOCK_B=8, TRANSPOSED=1),  # 96 KB of weights: one program per SM
}
BACKWARD = {
    16: config(1, 3, BLOCK_B=8, TRANSPOSED=1),
    32: config(2, 3, BLOCK_B=8, TRANSPOSED=1),
    64: config(4, 3, BLOCK_B=8, TRANSPOSED=1),
    128: config(8, 3, BLOCK_B=8, TRANSPOSED=1),
}
# With a first state, three stages of an LSTM need 164 KB, 1 more than sm_80 has.
BACKWARD_STATE_128 = config(8, 2, BLOCK_B=8, TRANSPOSED=1)
# By units and LSTM. The weights' gradients are sums over the batch, a product's inner dimension: 16 rows at least.
BACKWARD_FUSED = {
    (16, False): config(1, 3, BLOCK_B=16, TRANSPOSED=1),  # 171 registers per thread, with two groups of 8 units 254
    (16, True): config(4, 2, BLOCK_B=16, TRANSPOSED=1),  # two warps spill 8 bytes on sm_80 with two groups of 8 units
    (32, False): config(4, 2, BLOCK_B=16, TRANSPOSED=0),  # transposed, two of the four warps would duplicate the others
    (32, True): config(4, 2, BLOCK_B=16, TRANSPOSED=0),
}
# IEEE float32 has no tensor core: the products are FMAs, whose operands are read from shared memory; untransposed they
# take a third to a quarter of the loads. As many warps as keep the accumulators in registers.
FLOAT32 = {
    16: config(4, 2, BLOCK_B=8, TRANSPOSED=0),  # one warp spills with two groups of 16 inputs
    32: config(4, 2, BLOCK_B=8, TRANSPOSED=0),
    64: config(8, 2, BLOCK_B=8, TRANSPOSED=0),
}
FLOAT32_BACKWARD_FUSED = {16: config(8, 2, BLOCK_B=16, TRANSPOSED=0)}  # LSTM at 4 warps: 255 registers per thread


def time_loop(units: int, lstm: bool, backward: bool, fused: bool, float32: bool, state: bool = False) -> LaunchConfig:
    """A time loop's configuration; `state`: it starts from a given state."""
    if float32:
        return (FLOAT32_BACKWARD_FUSED if backward and fused else FLOAT32)[units]
    if backward:
        if fused:
            return BACKWARD_FUSED[units, lstm]
        return BACKWARD_STATE_128 if state and lstm and units == 128 else BACKWARD[units]
    return FORWARD[units]


# Bytes of shared memory of the kernel that needs most, an LSTM's backward, by units, as Triton 3.7 reports them.
SHARED, SHARED_FLOAT32 = {32: 45056, 64: 51200, 128: 155648}, {32: 39936, 64: 90112}


def largest_hidden(architecture: str, float32: bool) -> int:
    """The largest hidden size whose recurrent weights, and what goes with them, an architecture can keep on chip."""
    room = runtime.shared_memory(architecture)
    return max(units for units, size in (SHARED_FLOAT32 if float32 else SHARED).items() if size <= room)


# Gradients of the weights as one long product: 64 × 64 results per program are 32 accumulators per thread in 4 warps.
WEIGHTS = config(4, 3, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64)
# With a first state a tile has two sources, y and h_first: in float32 4 warps spill 336 bytes per thread.
WEIGHTS_FLOAT32 = config(8, 3, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64)


def weight_gradient(float32: bool) -> LaunchConfig:
    """The weights' gradients where the time loop does not sum them."""
    return WEIGHTS_FLOAT32 if float32 else WEIGHTS
