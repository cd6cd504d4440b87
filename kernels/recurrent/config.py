"""Launch configurations of the recurrent kernels: tile sizes, warps and stages, and why."""

from fastblocks.kernels.launch import LaunchConfig, config

# Recurrences. `units` is the tile's width, a power of two from 16 on; `fused` says that the input's projection and all
# gradients are made inside the time loop. Nothing here was timed: every entry is a prediction, made from the code that
# Triton 3.7 emits for sm_90 (GRU, bfloat16), by the rule that a lone program waits for its own chain of instructions.
#
# Products of 16 bits run transposed, weights · h with the batch in columns: an instruction takes 8 columns, so 8 rows
# of batch halve the work on the chain (units 16: 12 MUFU and 110 instructions a step; 16 rows of batch in rows: 24 and
# 166), twice as many programs fill twice as many multiprocessors, and at one warp h reaches its next product by two
# shuffles, without shared memory. A warp takes 16 units of a gate, so the layouts of sums, gates and state agree.
FORWARD = {
    16: config(1, 3, BLOCK_B=8, TRANSPOSED=1),
    32: config(1, 3, BLOCK_B=8, TRANSPOSED=1),  # 80 registers; a second warp would need a barrier a step
    64: config(4, 3, BLOCK_B=8, TRANSPOSED=1),
    128: config(8, 3, BLOCK_B=8, TRANSPOSED=1),  # 96 KB of weights: one program a multiprocessor
}
BACKWARD = {
    16: config(1, 3, BLOCK_B=8, TRANSPOSED=1),
    32: config(2, 3, BLOCK_B=8, TRANSPOSED=1),
    64: config(4, 3, BLOCK_B=8, TRANSPOSED=1),
    128: config(8, 3, BLOCK_B=8, TRANSPOSED=1),
}
# By units and LSTM. The weights' gradients are sums over the batch, a product's inner dimension: 16 rows at least.
BACKWARD_FUSED = {
    (16, False): config(1, 3, BLOCK_B=16, TRANSPOSED=1),  # 171 registers, two groups of 8 units 254
    (16, True): config(4, 2, BLOCK_B=16, TRANSPOSED=1),  # two warps spill 8 bytes on sm_80 with two groups of 8 units
    (32, False): config(4, 2, BLOCK_B=16, TRANSPOSED=0),  # transposed, two of the four warps would repeat two others
    (32, True): config(4, 2, BLOCK_B=16, TRANSPOSED=0),
}
# Honest float32 has no tensor core: the products are FMAs, whose operands are read from shared memory; untransposed
# they take a third to a quarter of the loads. Warps are as many as keep the sums in registers.
FLOAT32 = {
    16: config(4, 2, BLOCK_B=8, TRANSPOSED=0),  # one warp spills with two groups of 16 inputs
    32: config(4, 2, BLOCK_B=8, TRANSPOSED=0),
    64: config(8, 2, BLOCK_B=8, TRANSPOSED=0),
}
FLOAT32_BACKWARD_FUSED = {16: config(8, 2, BLOCK_B=16, TRANSPOSED=0)}  # LSTM at 4 warps: 255 registers


def time_loop(units: int, lstm: bool, backward: bool, fused: bool, float32: bool) -> LaunchConfig:
    """A time loop's configuration."""
    if float32:
        return (FLOAT32_BACKWARD_FUSED if backward and fused else FLOAT32)[units]
    if backward:
        return BACKWARD_FUSED[units, lstm] if fused else BACKWARD[units]
    return FORWARD[units]


def largest_hidden(architecture: str, float32: bool) -> int:
    """The largest hidden size whose recurrent weights (LSTM, bytes: 4 · H² · 2 or 4) stay in shared memory.

    163 KB on sm_80, 227 KB from sm_90 on, 99 KB on the consumers' sm_86, sm_89 and sm_120, 64 KB on gfx942.
    """
    if architecture.startswith("gfx"):
        return 32 if float32 else 64
    return 64 if float32 or architecture in ("sm_86", "sm_89", "sm_120") else 128


# Gradients of the weights as one long product: 64 × 64 results a program keep 4 warps' sums in 32 registers.
WEIGHTS = config(4, 3, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64)
