"""Depthwise convolution in 1-D and 2-D as one gather, with layer normalization of the result where it is wanted.

    u[b, o, c] = bias[c] + Σ_k weight[c, k] · x[b, c, i(o, k)]          i = o·s − p + k,  or transposed (o + p − k)/s
    y[b, o, :] = (u − mean(u)) · rstd · norm_weight + norm_bias          over channels, rstd = 1/sqrt(var(u) + eps)

The same kernel is the forward pass of both modes and, without the normalization, the gradient of x of both modes (the
gradient of a convolution is the transposed one, and the other way round).

Layouts: x is read through its strides, channels first or last, without a copy; y, x̂ (normalized, before LN's affine)
and rstd are (B, H', W', C) and (B, H', W'), contiguous. 1-D is 2-D with H = 1.
Bytes per position and channel, forward: x once, y once, x̂ once where it is kept. FLOPs: 2·taps.

Why it is fast: a program holds BLOCK_H × (BLOCK_W · RUN) positions × BLOCK_C channels as float32 in registers. A
thread's RUN consecutive positions share what they read: where x is channels first and aligned, the RUN inputs are one
vector load, taken apart in registers, and the taps of an output are registers of its neighbours; a 7-tap convolution
reads 3 vectors for 8 outputs instead of 56 scalars, and every weight once for BLOCK_H · RUN outputs instead of once for
each. Strided and transposed convolutions run the same loop: a transposed one is split by phase (o + p) mod s, and
within a phase it is a stride-1 convolution with ceil(k/s) taps.
"""

from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.convnext import config as table
from fastblocks.kernels.launch import launch
from fastblocks.kernels.matrix import strides, times
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.runtime import tl, triton

# Most taps of a kernel row that are unrolled; longer rows are split into chunks: 63 unrolled taps took 12 s to compile
# and spilled. A multiple of every vector length, so that chunks start where memory is aligned.
MAX_TAPS = 16


@triton.jit
def _unpack(tile, N: tl.constexpr):
    """[C, W, N] as N tiles [C, W]: in registers, where a thread holds the last dimension."""
    BLOCK_C: tl.constexpr = tile.shape[0]
    BLOCK_W: tl.constexpr = tile.shape[1]
    LEVELS: tl.constexpr = 0 if N == 1 else (1 if N == 2 else (2 if N == 4 else 3))
    parts = (tile,)  # part i holds the elements i, i + len(parts), i + 2·len(parts), …
    for level in tl.static_range(LEVELS):
        evens = ()
        odds = ()
        for i in tl.static_range(2**level):
            even, odd = tl.split(tl.reshape(parts[i], [BLOCK_C, BLOCK_W, N // 2 ** (level + 1), 2]))
            evens = evens + (even,)
            odds = odds + (odd,)
        parts = evens + odds
    flat = ()
    for i in tl.static_range(N):
        flat = flat + (tl.reshape(parts[i], [BLOCK_C, BLOCK_W]),)
    return flat


@triton.jit
def _pack(parts, N: tl.constexpr):
    """N tiles [C, W] as one [C, W, N], the inverse of `_unpack`."""
    BLOCK_C: tl.constexpr = parts[0].shape[0]
    BLOCK_W: tl.constexpr = parts[0].shape[1]
    LEVELS: tl.constexpr = 0 if N == 1 else (1 if N == 2 else (2 if N == 4 else (3 if N == 8 else 4)))
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(N // 2 ** (level + 1)):
            pair = tl.join(parts[i], parts[i + N // 2 ** (level + 1)])
            joined = joined + (tl.reshape(pair, [BLOCK_C, BLOCK_W, 2 ** (level + 1)]),)
        parts = joined
    return tl.reshape(parts[0], [BLOCK_C, BLOCK_W, N])


@triton.jit
def _accumulate(
    acc, x, weights, valid,
    D: tl.constexpr, STEP: tl.constexpr, TAPS: tl.constexpr, GUARD: tl.constexpr, RUN: tl.constexpr,
    ROWS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Adds input number D of a run, times its tap, to every output of the run that it reaches, in rows FIRST to
    LAST."""
    updated = ()
    for r in tl.static_range(ROWS):
        for f in tl.static_range(RUN):
            total = acc[r * RUN + f]
            if r >= FIRST and r < LAST and D - f * STEP >= 0 and D - f * STEP < TAPS:
                weight = weights[(D - f * STEP) * (LAST - FIRST) + r - FIRST]
                if GUARD:  # a zero weight is not enough: the input may be Inf
                    total += tl.where(valid[D - f * STEP], x, 0.0) * weight
                else:
                    total += x * weight
            updated = updated + (total,)
    return updated


@triton.jit
def _add_row(
    acc, x_ptrs, weight_ptrs, i, offs_h, offs_w, mask_c, first_h, first_w, tap_h, tap_w, H, W,
    stride_x_h, stride_x_w, stride_weight_k,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, GAP_H: tl.constexpr,
    GAP_W: tl.constexpr, SIGN_H: tl.constexpr, SIGN_W: tl.constexpr, TAPS: tl.constexpr, VECTOR: tl.constexpr,
    INDEX_INT64: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Adds row i of the inputs, or chunk i of longer ones, to the outputs that it reaches, those of rows FIRST to LAST.

    x_ptrs: a run's first input, were there no padding. To it is added what is constant or the same for all threads, for
    sums of 32-bit offsets would be computed for every load.
    """
    ALL_TAPS_W: tl.constexpr = (KERNEL_W + GAP_W - 1) // GAP_W
    CHUNKS: tl.constexpr = (ALL_TAPS_W + TAPS - 1) // TAPS
    GUARD: tl.constexpr = KERNEL_W % GAP_W != 0 or ALL_TAPS_W % TAPS != 0  # some taps are beyond the kernel
    PAD_W: tl.constexpr = KERNEL_W // 2
    SPAN: tl.constexpr = (RUN - 1) * STEP_W + TAPS  # inputs of a run
    SLACK: tl.constexpr = (VECTOR - PAD_W % VECTOR) % VECTOR  # inputs before the first, to align loads
    VECTORS: tl.constexpr = (SLACK + SPAN + VECTOR - 1) // VECTOR
    i_h = i // CHUNKS
    i_w = i % CHUNKS * TAPS
    h = offs_h * (ROWS * STEP_H) + (first_h + i_h)
    mask_h = (h >= 0) & (h < H)
    if KERNEL_H % GAP_H != 0:  # not all phases have the last tap; ROWS is 1
        mask_h &= tap_h + i_h * SIGN_H < KERNEL_H
    row_ptrs = x_ptrs + times(first_h + i_h, stride_x_h, INDEX_INT64)
    weights = ()  # tap by tap, those of rows FIRST to LAST
    valid = ()
    for v in tl.static_range(VECTORS):
        if VECTOR > 1:
            w = offs_w + i_w + (v * VECTOR - PAD_W - SLACK)
            mask = mask_c[:, None] & (mask_h & (w >= 0) & (w < W))[None, :]
            ptrs = row_ptrs + (i_w + (v * VECTOR - PAD_W - SLACK))
            ptrs = ptrs[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
            parts = _unpack(tl.load(ptrs, mask=mask[:, :, None], other=0.0), VECTOR)
        else:
            w = offs_w * STEP_W + (first_w + i_w + v)
            mask = mask_c[:, None] & (mask_h & (w >= 0) & (w < W))[None, :]
            ptrs = row_ptrs + times(first_w + i_w + v, stride_x_w, INDEX_INT64)
            parts = (tl.load(ptrs, mask=mask, other=0.0),)
        for e in tl.static_range(VECTOR):
            if v * VECTOR + e >= SLACK and v * VECTOR + e - SLACK < SPAN:
                if v * VECTOR + e - SLACK < TAPS:
                    kernel_w = tap_w + (i_w + (v * VECTOR + e - SLACK)) * SIGN_W
                    is_tap = (kernel_w >= 0) & (kernel_w < KERNEL_W)
                    valid = valid + (is_tap,)
                    for r in tl.static_range(FIRST, LAST):
                        kernel_h = tap_h + (i_h - r) * SIGN_H
                        mask_k = mask_c & (kernel_h < KERNEL_H) & is_tap
                        offs_k = (kernel_h * KERNEL_W + kernel_w) * stride_weight_k
                        weight = tl.load(weight_ptrs + offs_k, mask=mask_k, other=0.0).to(tl.float32)
                        weights = weights + (weight[:, None],)
                x = parts[e].to(tl.float32)
                acc = _accumulate(
                    acc, x, weights, valid, v * VECTOR + e - SLACK, STEP_W, TAPS, GUARD, RUN, ROWS, FIRST, LAST
                )
    return acc


@triton.jit
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, normalized_ptr, rstd_ptr,
    H, W, H_OUT, W_OUT, blocks_h, blocks_w,
    stride_x_b, stride_x_c, stride_x_h, stride_x_w, stride_y_b, stride_y_c, stride_y_h, stride_y_w, stride_weight_c,
    stride_weight_k,
    eps,
    C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, TAPS: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX_INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grid (B · blocks_h · blocks_w · phases, blocks of C), phases fastest (1 unless TRANSPOSED).

    x, y: (B, C, H, W) by strides. weight: (C, taps) by strides. With norm_weight a block holds all channels, and y is
    normalized over them; normalized (x̂, laid out as y) and rstd are stored where there is memory for them. TAPS: of a
    kernel row, unrolled at a time. VECTOR: consecutive positions in one load, 1 for any strides.
    CHANNELS_LAST: stride_x_w is C. RUN: consecutive outputs that share inputs. ROWS: rows of them that do, 1 unless the
    stride is 1.
    """
    STEP_H: tl.constexpr = 1 if TRANSPOSED else STRIDE_H  # in x, from one output of a phase to the next
    STEP_W: tl.constexpr = 1 if TRANSPOSED else STRIDE_W
    GAP_H: tl.constexpr = STRIDE_H if TRANSPOSED else 1  # the same in y, and between the taps of a phase
    GAP_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1
    SIGN_H: tl.constexpr = -GAP_H if TRANSPOSED else 1  # a transposed convolution takes its taps in reverse
    SIGN_W: tl.constexpr = -GAP_W if TRANSPOSED else 1
    TAPS_H: tl.constexpr = (KERNEL_H + GAP_H - 1) // GAP_H
    ALL_TAPS_W: tl.constexpr = (KERNEL_W + GAP_W - 1) // GAP_W
    CHUNKS: tl.constexpr = (ALL_TAPS_W + TAPS - 1) // TAPS
    PAD_H: tl.constexpr = KERNEL_H // 2
    PAD_W: tl.constexpr = KERNEL_W // 2

    pid = tl.program_id(0)
    phase_w = pid % GAP_W
    pid = pid // GAP_W
    phase_h = pid % GAP_H
    pid = pid // GAP_H
    start_w = (pid % blocks_w) * (BLOCK_W * RUN)
    pid = pid // blocks_w
    start_h = (pid % blocks_h) * BLOCK_H
    batch = (pid // blocks_h).to(tl.int64)
    if TRANSPOSED:
        first_h = (phase_h + PAD_H) // GAP_H - (TAPS_H - 1)
        first_w = (phase_w + PAD_W) // GAP_W - (ALL_TAPS_W - 1)
        tap_h = (phase_h + PAD_H) % GAP_H + (TAPS_H - 1) * GAP_H
        tap_w = (phase_w + PAD_W) % GAP_W + (ALL_TAPS_W - 1) * GAP_W
    else:
        first_h = -PAD_H
        first_w = -PAD_W
        tap_h = 0
        tap_w = 0

    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_q = tl.arange(0, BLOCK_H * BLOCK_W)  # runs
    offs_h = start_h + offs_q // BLOCK_W
    offs_w = start_w + offs_q % BLOCK_W * RUN
    if VECTOR > 1:  # the launcher checked that these are multiples of VECTOR; this tells the compiler
        stride_x_b = stride_x_b // VECTOR * VECTOR
        stride_x_c = stride_x_c // VECTOR * VECTOR
        stride_x_h = stride_x_h // VECTOR * VECTOR
    if CHANNELS_LAST and ROWS == 1:  # for the compiler: taps are constants apart; two rows take 116 registers then
        stride_x_w = C
    x_ptr += batch * stride_x_b
    offs = times(offs_h * (ROWS * STEP_H), stride_x_h, INDEX_INT64) + times(offs_w * STEP_W, stride_x_w, INDEX_INT64)
    x_ptrs = x_ptr + (times(offs_c, stride_x_c, INDEX_INT64)[:, None] + offs[None, :])
    weight_ptrs = weight_ptr + offs_c * stride_weight_c

    start = tl.zeros([BLOCK_C, BLOCK_H * BLOCK_W], tl.float32)
    if bias_ptr is not None:
        start += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None]
    acc = ()  # ROWS · RUN tiles [BLOCK_C, BLOCK_H * BLOCK_W]
    for _ in tl.static_range(ROWS * RUN):
        acc = acc + (start,)
    # Inputs row by row, long ones TAPS taps at a time. The first and the last do not reach all ROWS rows of outputs.
    EDGE: tl.constexpr = (ROWS - 1) * CHUNKS
    for i in tl.static_range(EDGE):
        acc = _add_row(
            acc, x_ptrs, weight_ptrs, i, offs_h, offs_w, mask_c, first_h, first_w, tap_h, tap_w, H, W,
            stride_x_h, stride_x_w, stride_weight_k,
            KERNEL_H, KERNEL_W, STEP_H, STEP_W, GAP_H, GAP_W, SIGN_H, SIGN_W, TAPS, VECTOR, INDEX_INT64, RUN, ROWS,
            0, i // CHUNKS + 1,
        )  # fmt: skip
    for i in range(EDGE, TAPS_H * CHUNKS):
        acc = _add_row(
            acc, x_ptrs, weight_ptrs, i, offs_h, offs_w, mask_c, first_h, first_w, tap_h, tap_w, H, W,
            stride_x_h, stride_x_w, stride_weight_k,
            KERNEL_H, KERNEL_W, STEP_H, STEP_W, GAP_H, GAP_W, SIGN_H, SIGN_W, TAPS, VECTOR, INDEX_INT64, RUN, ROWS,
            0, ROWS,
        )  # fmt: skip
    for i in tl.static_range(EDGE):
        acc = _add_row(
            acc, x_ptrs, weight_ptrs, TAPS_H * CHUNKS + i, offs_h, offs_w, mask_c, first_h, first_w, tap_h, tap_w, H, W,
            stride_x_h, stride_x_w, stride_weight_k,
            KERNEL_H, KERNEL_W, STEP_H, STEP_W, GAP_H, GAP_W, SIGN_H, SIGN_W, TAPS, VECTOR, INDEX_INT64, RUN, ROWS,
            i // CHUNKS + 1, ROWS,
        )  # fmt: skip

    u = _pack(acc, ROWS * RUN)  # [BLOCK_C, BLOCK_H * BLOCK_W, ROWS * RUN]
    offs_r = tl.arange(0, ROWS * RUN)[None, :]
    h = (offs_h[:, None] * ROWS + offs_r // RUN) * GAP_H + phase_h  # [BLOCK_H * BLOCK_W, ROWS * RUN]
    w = (offs_w[:, None] + offs_r % RUN) * GAP_W + phase_w
    mask_q = (h < H_OUT) & (w < W_OUT)
    mask = mask_c[:, None, None] & mask_q[None, :, :]
    offs_y = times(h, stride_y_h, INDEX_INT64) + times(w, stride_y_w, INDEX_INT64)
    offs_y = offs_y[None, :, :] + times(offs_c, stride_y_c, INDEX_INT64)[:, None, None]
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        mean = tl.sum(u, axis=0) * (1.0 / C)  # masked channels are 0
        u = tl.where(mask_c[:, None, None], u - mean[None, :, :], 0.0)
        rstd = tl.rsqrt(tl.sum(u * u, axis=0) * (1.0 / C) + eps)
        u *= rstd[None, :, :]
        if rstd_ptr is not None:
            tl.store(rstd_ptr + batch * H_OUT * W_OUT + h * W_OUT + w, rstd, mask=mask_q)
            normalized_ptr += batch * stride_y_b
            tl.store(normalized_ptr + offs_y, round_to(u, normalized_ptr.dtype.element_ty), mask=mask)
        u = u * norm_weight[:, None, None] + norm_bias[:, None, None]
    tl.store(y_ptr + batch * stride_y_b + offs_y, round_to(u, y_ptr.dtype.element_ty), mask=mask)


def vector_of(x: Tensor, aligned_width: int) -> int:
    """How many consecutive positions of x, (B, C, H, W) by strides, one aligned load may take: 8, 4, 2, or 1."""
    if x.stride(3) != 1:
        return 1
    vector = 16 // x.element_size()  # 16 bytes are the widest load
    while vector > 1 and (
        aligned_width % vector
        or x.data_ptr() % (vector * x.element_size())
        or any(x.stride(i) % vector for i in range(3) if x.shape[i] > 1)
    ):
        vector //= 2
    return vector


def convolve(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    transposed: bool,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    normalized: Tensor | None = None,
    rstd: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Launches the kernel on x and y, (B, C, H, W), and weight, (C, taps), all by strides.

    With norm_weight the result is normalized; x̂, where it is kept, and y then have the memory layout (B, H', W', C).
    """
    batch, channels, height, width = x.shape
    height_out, width_out = y.shape[2:]
    gaps = stride if transposed else (1, 1)
    vector = vector_of(x, width) if stride == (1, 1) else 1
    config = table.depthwise_conv(
        runtime.architecture(x.device),
        runtime.sm_count(x.device),
        batch=batch,
        channels=channels,
        sizes=(-(-height_out // gaps[0]), -(-width_out // gaps[1])),
        itemsize=x.element_size(),
        vector=vector,
        strided=stride != (1, 1),
        all_channels=norm_weight is not None,
    )
    blocks_h = -(-height_out // (gaps[0] * config["BLOCK_H"] * config["ROWS"]))
    blocks_w = -(-width_out // (gaps[1] * config["BLOCK_W"] * config["RUN"]))
    grid = (batch * blocks_h * blocks_w * gaps[0] * gaps[1], -(-channels // config["BLOCK_C"]))
    # The kernel's offsets into x go on to the end of the last tile.
    down = blocks_h * config["BLOCK_H"] * config["ROWS"] * (1 if transposed else stride[0])
    right = blocks_w * config["BLOCK_W"] * config["RUN"] * (1 if transposed else stride[1])
    reach = channels * x.stride(1) + down * x.stride(2) + right * x.stride(3)
    launch(
        _conv_kernel, grid, config, like=x,
        x_ptr=x, weight_ptr=weight, bias_ptr=bias, norm_weight_ptr=norm_weight, norm_bias_ptr=norm_bias, y_ptr=y,
        normalized_ptr=normalized, rstd_ptr=rstd,
        H=height, W=width, H_OUT=height_out, W_OUT=width_out, blocks_h=blocks_h, blocks_w=blocks_w,
        **strides("x", x, "bchw"), **strides("y", y, "bchw"), **strides("weight", weight, "ck"),
        eps=eps,
        C=channels, KERNEL_H=kernel[0], KERNEL_W=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        TRANSPOSED=transposed, TAPS=min(-(-kernel[1] // gaps[1]), MAX_TAPS), VECTOR=vector,
        CHANNELS_LAST=x.stride(3) == channels,
        INDEX_INT64=max(span(x), reach, span(y)) >= 2**31,
    )  # fmt: skip


def span(x: Tensor) -> int:
    """How far apart, in elements, the first and the last element of one sample of x lie."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
