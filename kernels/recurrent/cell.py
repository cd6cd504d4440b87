"""Parts of the recurrent kernels: packed weight tiles, products in either orientation, gates.

A tile packs groups side by side, each with its H hidden units padded to BLOCK_H (and I inputs to BLOCK_I), so that
small groups still fill a tensor core's tile: its weights are block-diagonal, with zeros off the diagonal that are never
read. Gates are numbered as torch orders them: r, z, n of a GRU; i, f, g, o of an LSTM. Both need four preactivations
per unit and step, because a GRU's n needs `U_n h + c_n` (c_n the bias) apart from W_n x: that is its number 3. A GRU's
tuples of four weights repeat the third.

TRANSPOSED tiles have the batch in columns: the weights are then the first operand of a product, and 8 rows of batch
fill a tensor core's instruction instead of 16.
"""

# ruff: noqa: RET505, SIM300 -- Triton compiles what follows a taken `if` as well; DTYPE is a variable

from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import tl, triton


@triton.jit
def tanh(x, ACTIVATION: tl.constexpr):
    """Hardware: one instruction, relative error 2^-11; fast: absolute error 2^-23; exact: relative error 2^-22."""
    if ACTIVATION == "hardware":
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    # exp(-2|x|) is in (0, 1], so nothing overflows; a quotient of exp(2x) is NaN from 45 on.
    magnitude = tl.abs(x)
    decay = tl.exp(-2.0 * magnitude)
    result = (1.0 - decay) / (1.0 + decay)
    if ACTIVATION == "exact":  # 1 - decay cancels for small x; there the odd polynomial of Cephes' tanhf
        square = x * x
        series = -5.70498872745e-3 * square + 2.06390887954e-2
        series = series * square - 5.37397155531e-2
        series = series * square + 1.33314422036e-1
        series = (series * square - 3.33332819422e-1) * square
        result = tl.where(magnitude < 0.625, magnitude + magnitude * series, result)
    return tl.where(x < 0, -result, result)


@triton.jit
def sigmoid(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "hardware":
        return 0.5 * tanh(0.5 * x, ACTIVATION) + 0.5
    # exp(-x) as the compiler would lower it, but in one product: LLVM aborts vectorizing negations (Triton 3.9, sm_90).
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))  # where exp2 overflows to infinity, 0 is right


@triton.jit
def activate(preactivations, LSTM: tl.constexpr, ACTIVATION: tl.constexpr, IN_CHAIN: tl.constexpr):
    """From a step's four preactivations to what is kept: r, z, n, U_n h + c_n of a GRU; i, f, g, o of an LSTM.

    IN_CHAIN: the next step waits for it, as in forward.
    """
    gate0 = sigmoid(preactivations[0], ACTIVATION)
    gate1 = sigmoid(preactivations[1], ACTIVATION)
    if LSTM:
        return gate0, gate1, tanh(preactivations[2], ACTIVATION), sigmoid(preactivations[3], ACTIVATION)
    if IN_CHAIN:  # not a sum: the compiler would start W_n x from r · (U_n h), a product more from state to state
        new = tl.fma(gate0, preactivations[3], preactivations[2])
    else:
        new = preactivations[2] + gate0 * preactivations[3]
    return gate0, gate1, tanh(new, ACTIVATION), preactivations[3]


@triton.jit
def across(vector, ROWS: tl.constexpr):
    """[N] as [N, 1] if ROWS, else as [1, N]."""
    if ROWS:
        return vector[:, None]
    else:
        return vector[None, :]


@triton.jit
def weight_index(
    first, offs_u, offs_k, H, BLOCK_H, K, BLOCK_K, GATES: tl.constexpr, UNITS_FIRST: tl.constexpr
):  # fmt: skip
    """Offsets into (N·G, GATES·H, K), and their mask; `first` is direction · G + group of the tile's first group."""
    u = across(offs_u, UNITS_FIRST)
    k = across(offs_k, not UNITS_FIRST)
    mask = (u // BLOCK_H == k // BLOCK_K) & (u % BLOCK_H < H) & (k % BLOCK_K < K)
    return ((first + u // BLOCK_H) * (GATES * H) + u % BLOCK_H) * K + k % BLOCK_K, mask


@triton.jit
def load_weights(
    ptr, first, offs_u, offs_k, H, BLOCK_H, K, BLOCK_K,
    LSTM: tl.constexpr, UNITS_FIRST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The weight tiles of all gates, block-diagonal: [units, k] if UNITS_FIRST, else [k, units]."""
    GATES: tl.constexpr = 4 if LSTM else 3
    index, mask = weight_index(first, offs_u, offs_k, H, BLOCK_H, K, BLOCK_K, GATES, UNITS_FIRST)
    w0 = round_to(tl.load(ptr + index, mask=mask, other=0.0), DTYPE)
    w1 = round_to(tl.load(ptr + index + H * K, mask=mask, other=0.0), DTYPE)
    w2 = round_to(tl.load(ptr + index + 2 * H * K, mask=mask, other=0.0), DTYPE)
    w3 = w2
    if LSTM:
        w3 = round_to(tl.load(ptr + index + 3 * H * K, mask=mask, other=0.0), DTYPE)
    return w0, w1, w2, w3


@triton.jit
def hold(weights, COUNT: tl.constexpr, LSTM: tl.constexpr, DTYPE: tl.constexpr):
    """The same tiles; the first COUNT stay in registers through a loop. The compiler would load a product's first
    operand from shared memory again in every iteration."""
    w0 = times_identity(weights[0], COUNT > 0, DTYPE)
    w1 = times_identity(weights[1], COUNT > 1, DTYPE)
    w2 = times_identity(weights[2], COUNT > 2, DTYPE)
    w3 = w2
    if LSTM:
        w3 = times_identity(weights[3], COUNT > 3, DTYPE)
    return w0, w1, w2, w3


@triton.jit
def times_identity(weight, APPLY: tl.constexpr, DTYPE: tl.constexpr):
    """weight, exactly, as a product's result: that is in registers already where a first operand wants it."""
    if APPLY:
        rows = tl.arange(0, weight.shape[0])
        # Not the comparison itself: the interpreter gets bool to bfloat16 wrong.
        identity = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0).to(DTYPE)
        weight = round_to(dot(identity, weight, "ieee"), DTYPE)
    return weight


@triton.jit
def load_biases(
    bias_ih_ptr, bias_hh_ptr, first, offs_u, H, BLOCK_H, LSTM: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """The bias of each of the four preactivations; zeros where there are no biases."""
    GATES: tl.constexpr = 4 if LSTM else 3
    unit = across(offs_u, TRANSPOSED)
    if bias_ih_ptr is None:
        b0 = tl.zeros(unit.shape, tl.float32)
        return b0, b0, b0, b0
    else:
        index = (first + unit // BLOCK_H) * (GATES * H) + unit % BLOCK_H
        mask = unit % BLOCK_H < H
        b0 = load_float(bias_ih_ptr + index, mask) + load_float(bias_hh_ptr + index, mask)
        b1 = load_float(bias_ih_ptr + index + H, mask) + load_float(bias_hh_ptr + index + H, mask)
        b2 = load_float(bias_ih_ptr + index + 2 * H, mask)
        b3 = load_float(bias_hh_ptr + index + 2 * H, mask)
        if LSTM:
            b2 += b3
            b3 = load_float(bias_ih_ptr + index + 3 * H, mask) + load_float(bias_hh_ptr + index + 3 * H, mask)
        return b0, b1, b2, b3


@triton.jit
def load_float(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_padded(ptrs, mask, PADDED: tl.constexpr):
    """Load without a mask where there is no padding, so that the load is as wide as possible."""
    if PADDED:
        return tl.load(ptrs, mask=mask, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_quads(ptrs, mask, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    """Load each unit's four adjacent values as one 64-bit word (float32: two): one tile per step, not four."""
    low = load_padded(ptrs, mask, PADDED)
    if DTYPE == tl.float32:
        return low, load_padded(ptrs + 1, mask, PADDED)
    else:
        return low, low


@triton.jit
def unpack(low, high, DTYPE: tl.constexpr):
    """The four values of `load_quads`, in float32."""
    if DTYPE == tl.float32:
        return as_float(low, 0, DTYPE), as_float(low, 32, DTYPE), as_float(high, 0, DTYPE), as_float(high, 32, DTYPE)
    else:
        return as_float(low, 0, DTYPE), as_float(low, 16, DTYPE), as_float(low, 32, DTYPE), as_float(low, 48, DTYPE)


@triton.jit
def as_float(words, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    bits = words >> SHIFT
    if DTYPE == tl.float32:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def as_word(values, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        bits = values.to(tl.uint32, bitcast=True)
    else:
        bits = round_to(values, DTYPE).to(tl.uint16, bitcast=True)
    return bits.to(tl.int64) << SHIFT


@triton.jit
def store_quads(ptrs, v0, v1, v2, v3, mask, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        tl.store(ptrs, as_word(v0, 0, DTYPE) | as_word(v1, 32, DTYPE), mask=mask)
        tl.store(ptrs + 1, as_word(v2, 0, DTYPE) | as_word(v3, 32, DTYPE), mask=mask)
    else:
        low = as_word(v0, 0, DTYPE) | as_word(v1, 16, DTYPE)
        tl.store(ptrs, low | as_word(v2, 32, DTYPE) | as_word(v3, 48, DTYPE), mask=mask)


@triton.jit
def product(activations, weights, accumulator, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator + activations · weights; transposed: accumulator + weights · activations."""
    if TRANSPOSED:
        return dot(weights, activations, PRECISION, accumulator)
    else:
        return dot(activations, weights, PRECISION, accumulator)


@triton.jit
def outer_product(left, right, accumulator, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator + the sum over the batch of left · rightᵀ, [k, units]; transposed: its transpose, [units, k], so that
    `right`, another product's result, is the first operand: it is in the layout of one already."""
    if TRANSPOSED:
        return dot(right, tl.trans(left), PRECISION, accumulator)
    else:
        return dot(tl.trans(left), right, PRECISION, accumulator)


@triton.jit
def input_preactivations(
    x, weights, SHAPE: tl.constexpr, LSTM: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """W x of a step: the input's part of the preactivations, zero for a GRU's number 3."""
    nothing = tl.zeros(SHAPE, tl.float32)
    s0 = product(x, weights[0], nothing, TRANSPOSED, PRECISION)
    s1 = product(x, weights[1], nothing, TRANSPOSED, PRECISION)
    s2 = product(x, weights[2], nothing, TRANSPOSED, PRECISION)
    s3 = nothing
    if LSTM:
        s3 = product(x, weights[3], nothing, TRANSPOSED, PRECISION)
    return s0, s1, s2, s3


@triton.jit
def state_preactivations(
    h, weights, preactivations, LSTM: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):
    """The preactivations plus U h, the hidden state's part."""
    s0 = product(h, weights[0], preactivations[0], TRANSPOSED, PRECISION)
    s1 = product(h, weights[1], preactivations[1], TRANSPOSED, PRECISION)
    if LSTM:
        s2 = product(h, weights[2], preactivations[2], TRANSPOSED, PRECISION)
        return s0, s1, s2, product(h, weights[3], preactivations[3], TRANSPOSED, PRECISION)
    else:
        return s0, s1, preactivations[2], product(h, weights[2], preactivations[3], TRANSPOSED, PRECISION)


@triton.jit
def store_weights(
    ptr, first, offs_u, offs_k, H, BLOCK_H, K, BLOCK_K, LSTM: tl.constexpr, UNITS_FIRST: tl.constexpr, tiles
):
    """Store the diagonal blocks of [units, k] tiles if UNITS_FIRST, else of [k, units], gate by gate."""
    GATES: tl.constexpr = 4 if LSTM else 3
    index, mask = weight_index(first, offs_u, offs_k, H, BLOCK_H, K, BLOCK_K, GATES, UNITS_FIRST)
    tl.store(ptr + index, tiles[0], mask=mask)
    tl.store(ptr + index + H * K, tiles[1], mask=mask)
    tl.store(ptr + index + 2 * H * K, tiles[2], mask=mask)
    if LSTM:
        tl.store(ptr + index + 3 * H * K, tiles[3], mask=mask)
