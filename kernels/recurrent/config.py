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
#
# HELD: of how many gates the weights stay in registers through the loop (`cell.hold`). The compiler would load each of
# them from shared memory in every step, half of a step's cycles at 128 units. There they are 64 registers a thread and
# gate: as many are held as spill nothing.
#
# Stages: a load from device memory takes 600 cycles, and a step of 16 units half as many.
FORWARD = {
    16: config(1, 4, BLOCK_B=8, TRANSPOSED=1, HELD=4),
    32: config(1, 3, BLOCK_B=8, TRANSPOSED=1, HELD=0),  # held they spill; a second warp would need a barrier per step
    64: config(4, 3, BLOCK_B=8, TRANSPOSED=1, HELD=4),
    128: config(8, 3, BLOCK_B=8, TRANSPOSED=1, HELD=3),  # 96 KB of weights: one program per SM
}
BACKWARD = {
    16: config(1, 3, BLOCK_B=8, TRANSPOSED=1, HELD=4),
    32: config(2, 3, BLOCK_B=8, TRANSPOSED=1, HELD=2),
    64: config(4, 3, BLOCK_B=8, TRANSPOSED=1, HELD=2),
    128: config(8, 3, BLOCK_B=8, TRANSPOSED=1, HELD=3),
}
# A first state takes registers, too; without one, forward spills 56 bytes a thread with Triton 3.6.
LSTM_128_FEWER_HELD = config(8, 3, BLOCK_B=8, TRANSPOSED=1, HELD=2)
# sm_80: the same code takes more registers there, and three stages of an LSTM's backward need 164 KB of shared
# memory, 1 more than there is.
SM_80_128 = config(8, 3, BLOCK_B=8, TRANSPOSED=1, HELD=1)
SM_80_LSTM_BACKWARD_128 = config(8, 2, BLOCK_B=8, TRANSPOSED=1, HELD=1)
# By units and LSTM. The weights' gradients are sums over the batch, a product's inner dimension: 16 rows at least. They
# are accumulated in registers, which leaves none to hold weights.
BACKWARD_FUSED = {
    (16, False): config(1, 4, BLOCK_B=16, TRANSPOSED=1, HELD=0),  # 32 inputs take 255 registers per thread
    (16, True): config(1, 3, BLOCK_B=16, TRANSPOSED=1, HELD=0),
    (32, False): config(4, 2, BLOCK_B=16, TRANSPOSED=0, HELD=0),  # transposed, two warps would duplicate the others
    (32, True): config(4, 2, BLOCK_B=16, TRANSPOSED=0, HELD=0),
}
# With 32 inputs one warp spills, and so do two with 16 rows; where groups do not fill their tiles, two with 32 do.
BACKWARD_FUSED_LSTM_32_INPUTS = config(2, 3, BLOCK_B=32, TRANSPOSED=1, HELD=0)
BACKWARD_FUSED_LSTM_32_INPUTS_PADDED = config(4, 3, BLOCK_B=32, TRANSPOSED=1, HELD=0)
# An LSTM's two warps spill here, too, and a GRU's one unless the groups fill their tiles and the architecture is sm_90.
BACKWARD_FUSED_32_INPUTS_STATE = config(4, 2, BLOCK_B=32, TRANSPOSED=1, HELD=0)
# IEEE float32 has no tensor core: the products are FMAs, whose operands are read from shared memory; untransposed they
# take a third to a quarter of the loads. As many warps as keep the accumulators in registers.
FLOAT32 = {
    16: config(4, 2, BLOCK_B=8, TRANSPOSED=0, HELD=0),  # one warp spills with two groups of 16 inputs
    32: config(4, 2, BLOCK_B=8, TRANSPOSED=0, HELD=0),
    64: config(8, 2, BLOCK_B=8, TRANSPOSED=0, HELD=0),
}
# An LSTM at 4 warps takes 255 registers per thread; a second stage spills and is not faster.
FLOAT32_BACKWARD_FUSED = {16: config(8, 1, BLOCK_B=16, TRANSPOSED=0, HELD=0)}
# In TF32 an LSTM of 32 inputs spills 24 bytes a thread there if it starts from a state.
TF32_BACKWARD_FUSED_LSTM_STATE = config(4, 2, BLOCK_B=32, TRANSPOSED=1, HELD=0)

# Steps per iteration of forward's time loop: 4 share two barriers, a branch and a wait for loads; 8 gain no more.
# Backward carries gates over iterations and is slower unrolled (predicted: 0.60 instead of 0.55 µs a step at 16 units).
FORWARD_UNROLL = 4


def forward_unroll(units: int, float32: bool, architecture: str) -> int:
    """Steps per iteration of forward's time loop. float32's products are hundreds of FMAs as it is.
    If unrolled on sm_80, an LSTM of 64 units spills, and one of 128 needs more shared memory than there is."""
    return FORWARD_UNROLL if not float32 and (units <= 32 or architecture == "sm_90") else 1


def time_loop(
    units: int,
    inputs: int,
    lstm: bool,
    backward: bool,
    fused: bool,
    float32: bool,
    architecture: str,
    state: bool = False,
    padded: bool = False,
    tf32: bool = False,
) -> LaunchConfig:
    """A time loop's configuration; `units`, `inputs`: its tile's; `state`: it starts from a given state; `padded`: a
    group is smaller than its part of the tile; `tf32`: float32's products are rounded to it."""
    if tf32 and backward and fused and lstm and state and inputs == 32:
        return TF32_BACKWARD_FUSED_LSTM_STATE
    if float32:
        return (FLOAT32_BACKWARD_FUSED if backward and fused else FLOAT32)[units]
    if backward and fused:
        one_warp = not lstm and (not state or (architecture == "sm_90" and not padded))
        if units == 16 and inputs == 32 and not one_warp:
            if state:
                return BACKWARD_FUSED_32_INPUTS_STATE
            return BACKWARD_FUSED_LSTM_32_INPUTS_PADDED if padded else BACKWARD_FUSED_LSTM_32_INPUTS
        return BACKWARD_FUSED[units, lstm]
    if units == 128 and architecture == "sm_80":
        return SM_80_LSTM_BACKWARD_128 if backward and lstm else SM_80_128
    if units == 128 and lstm and (state or (runtime.VERSION < (3, 7) and not backward)):
        return LSTM_128_FEWER_HELD
    return (BACKWARD if backward else FORWARD)[units]


# Bytes of shared memory of the kernel that needs most, an LSTM's backward, by units, as Triton 3.7 reports them.
SHARED, SHARED_FLOAT32 = {32: 45056, 64: 51200, 128: 163840}, {32: 39936, 64: 90112}


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
