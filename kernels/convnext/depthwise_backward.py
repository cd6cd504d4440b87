"""Gradients of the depthwise convolution with layer normalization: LN's, the weights', and 1-D's gradient of x.

With x̂ and rstd kept by the forward pass and G = dy · norm_weight:

    du = rstd · (G − mean(G) − x̂ · mean(G · x̂))          over channels, for each position
    d norm_weight = Σ dy · x̂,   d norm_bias = Σ dy,   d bias = Σ du
    dx[i] = Σ_k weight[k] · du[o(i, k)],   d weight[k] = Σ_i x[i] · du[o(i, k)]

du is written once, (B, H', W', C), in dy's dtype. The gradient of x is the convolution of the other mode and runs in
`depthwise.convolve`; for a single row of few taps (1-D up to MAX_TAPS) it is computed in the pass over x and du that
the weights' gradient needs anyway.
Bytes per position and channel: du's pass reads dy and x̂ and writes du; the second reads x and du and writes dx.

Sums over positions: every program adds its share in registers, in the order of its tiles, and writes it to its own
row of a buffer; `_sum_splits_kernel` adds the rows in order. No atomics: the same bits every time.
"""

import torch
from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.convnext import config as table
from fastblocks.kernels.convnext.depthwise import _pack, _unpack, convolve, span, vector_of
from fastblocks.kernels.launch import launch
from fastblocks.kernels.matrix import load_matrix, store_matrix, strides, times
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.runtime import cdiv, tl, triton

# Most taps whose sums a program of the weights' gradient holds: 8 tiles of 8 float32 are 64 registers per thread.
MAX_TAPS = 8


@triton.jit
def _store(ptr, offs, x, mask):
    tl.store(ptr + offs, round_to(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward_kernel(
    grad_y_ptr, normalized_ptr, rstd_ptr, norm_weight_ptr, grad_u_ptr, partial_ptr,
    n_rows,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_u (rows, C), and partial (splits, 3, C): each split's sums of dy · x̂, dy and du. grid (splits,)."""
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    norm_weight = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_bias = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_u = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M
        grad = load_matrix(grad_y_ptr, rows, offs_c, n_rows, C).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        normalized = load_matrix(normalized_ptr, rows, offs_c, n_rows, C).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        sum_weight += grad * normalized
        sum_bias += grad
        grad *= norm_weight
        mean = tl.sum(grad, axis=1)[:, None] / C
        slope = tl.sum(grad * normalized, axis=1)[:, None] / C
        grad_u = tl.where(mask_c[None, :], (grad - mean - normalized * slope) * rstd, 0.0)
        sum_u += grad_u  # rows beyond the last have rstd 0
        store_matrix(grad_u_ptr, grad_u, rows, offs_c, n_rows, C)
    partial_ptr += tl.program_id(0) * 3 * C + offs_c
    tl.store(partial_ptr, tl.sum(sum_weight, axis=0), mask=mask_c)
    tl.store(partial_ptr + C, tl.sum(sum_bias, axis=0), mask=mask_c)
    tl.store(partial_ptr + 2 * C, tl.sum(sum_u, axis=0), mask=mask_c)


@triton.jit
def _grad_weight_kernel(
    x_ptr, grad_u_ptr, weight_ptr, grad_x_ptr, partial_ptr,
    H, W, H_OUT, W_OUT, blocks_h, blocks_w, n_tiles, n_splits,
    stride_x_b, stride_x_c, stride_x_h, stride_x_w, stride_grad_x_b, stride_grad_x_c, stride_grad_x_h, stride_grad_x_w,
    C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, TAPS: tl.constexpr, VECTOR: tl.constexpr, INDEX_INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Sums of x · du for TAPS taps of one kernel row, over one split of positions; grad_x, too, where wanted.

    grid (splits · phases · kernel rows · chunks of TAPS, blocks of C), chunks fastest. x, grad_x: (B, C, H, W) by
    strides. grad_u: (B, H_OUT, W_OUT, C). weight: (taps, C). partial: (splits, taps, C) float32. The splits share the
    n_tiles tiles of positions in turn. VECTOR, RUN: as in `depthwise`.
    """
    # Positions and taps as in the convolution of the other mode, which is the gradient of x: from x to u.
    STEP_H: tl.constexpr = STRIDE_H if TRANSPOSED else 1
    STEP_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1
    GAP_H: tl.constexpr = 1 if TRANSPOSED else STRIDE_H
    GAP_W: tl.constexpr = 1 if TRANSPOSED else STRIDE_W
    ALL_TAPS_H: tl.constexpr = (KERNEL_H + GAP_H - 1) // GAP_H
    ALL_TAPS_W: tl.constexpr = (KERNEL_W + GAP_W - 1) // GAP_W
    CHUNKS: tl.constexpr = (ALL_TAPS_W + TAPS - 1) // TAPS
    PAD_H: tl.constexpr = KERNEL_H // 2
    PAD_W: tl.constexpr = KERNEL_W // 2
    SPAN: tl.constexpr = (RUN - 1) * STEP_W + TAPS

    pid = tl.program_id(0)
    tap_w = pid % CHUNKS * TAPS  # the first of this program's taps, all of one row
    pid = pid // CHUNKS
    tap_h = pid % ALL_TAPS_H
    pid = pid // ALL_TAPS_H
    phase_w = pid % GAP_W
    phase_h = pid // GAP_W % GAP_H
    split = pid // (GAP_W * GAP_H)
    if TRANSPOSED:
        first_h = tap_h - PAD_H
        first_w = tap_w - PAD_W
    else:
        first_h = (phase_h + PAD_H) // GAP_H - (ALL_TAPS_H - 1) + tap_h
        first_w = (phase_w + PAD_W) // GAP_W - (ALL_TAPS_W - 1) + tap_w

    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_q = tl.arange(0, BLOCK_H * BLOCK_W)
    if VECTOR > 1:
        stride_x_b = stride_x_b // VECTOR * VECTOR
        stride_x_c = stride_x_c // VECTOR * VECTOR
        stride_x_h = stride_x_h // VECTOR * VECTOR
    offs_xc = times(offs_c, stride_x_c, INDEX_INT64)
    if TRANSPOSED:
        kernel_h = tap_h
    else:
        kernel_h = (phase_h + PAD_H) % GAP_H + (ALL_TAPS_H - 1 - tap_h) * GAP_H
    sums = ()
    kernel_ws = ()
    weights = ()
    for j in tl.static_range(TAPS):
        sums = sums + (tl.zeros([BLOCK_C, BLOCK_H * BLOCK_W], tl.float32),)
        if TRANSPOSED:
            kernel_w = tap_w + j
        else:
            kernel_w = (phase_w + PAD_W) % GAP_W + (ALL_TAPS_W - 1 - tap_w - j) * GAP_W
        kernel_ws = kernel_ws + (kernel_w,)
        if grad_x_ptr is not None:
            weight = tl.load(weight_ptr + kernel_w * C + offs_c, mask=mask_c & (kernel_w < KERNEL_W), other=0.0)
            weights = weights + (weight.to(tl.float32)[:, None],)

    for tile in range(split, n_tiles, n_splits):
        start_w = tile % blocks_w * (BLOCK_W * RUN)
        start_h = tile // blocks_w % blocks_h * BLOCK_H
        batch = (tile // (blocks_w * blocks_h)).to(tl.int64)
        q_h = start_h + offs_q // BLOCK_W
        q_w = start_w + offs_q % BLOCK_W * RUN
        h = q_h * GAP_H + phase_h
        mask_h = h < H
        offs_h = times(h, stride_x_h, INDEX_INT64)
        x_batch_ptr = x_ptr + batch * stride_x_b
        if VECTOR > 1:
            mask = mask_c[:, None] & (mask_h & (q_w < W))[None, :]
            offs = (offs_xc[:, None] + (offs_h + q_w)[None, :])[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
            runs = _unpack(tl.load(x_batch_ptr + offs, mask=mask[:, :, None], other=0.0), VECTOR)
        else:
            runs = ()
            for f in tl.static_range(RUN):
                w = (q_w + f) * GAP_W + phase_w
                offs_w = times(w, stride_x_w, INDEX_INT64)
                mask = mask_c[:, None] & (mask_h & (w < W))[None, :]
                offs = offs_xc[:, None] + (offs_h + offs_w)[None, :]
                runs = runs + (tl.load(x_batch_ptr + offs, mask=mask, other=0.0),)
        u_h = q_h * STEP_H + first_h
        mask_u = mask_h & (u_h >= 0) & (u_h < H_OUT)
        u_batch_ptr = grad_u_ptr + batch * H_OUT * W_OUT * C
        grad_x = ()
        if grad_x_ptr is not None:
            for _ in tl.static_range(RUN):
                grad_x = grad_x + (tl.zeros([BLOCK_C, BLOCK_H * BLOCK_W], tl.float32),)
        for d in tl.static_range(SPAN):
            u_w = q_w * STEP_W + (first_w + d)
            mask = mask_c[:, None] & (mask_u & (u_w >= 0) & (u_w < W_OUT))[None, :]
            row = times(u_h, W_OUT, INDEX_INT64) + u_w
            grad_u = tl.load(u_batch_ptr + offs_c[:, None] + (row * C)[None, :], mask=mask, other=0.0).to(tl.float32)
            updated_sums = ()
            for j in tl.static_range(TAPS):
                total = sums[j]
                for f in tl.static_range(RUN):
                    if f * STEP_W + j == d:
                        total += runs[f].to(tl.float32) * grad_u
                updated_sums = updated_sums + (total,)
            sums = updated_sums
            if grad_x_ptr is not None:
                updated = ()
                for f in tl.static_range(RUN):
                    total = grad_x[f]
                    for j in tl.static_range(TAPS):
                        if f * STEP_W + j == d:
                            if j == 0 and KERNEL_W % GAP_W != 0:  # not a tap of every phase
                                is_tap = (phase_w + PAD_W) % GAP_W + (ALL_TAPS_W - 1) * GAP_W < KERNEL_W
                                total += tl.where(is_tap, grad_u, 0.0) * weights[j]
                            else:
                                total += grad_u * weights[j]
                    updated = updated + (total,)
                grad_x = updated
        if grad_x_ptr is not None:
            total = _pack(grad_x, RUN)  # [BLOCK_C, BLOCK_H * BLOCK_W, RUN]
            w = (q_w[:, None] + tl.arange(0, RUN)[None, :]) * GAP_W + phase_w
            mask = mask_c[:, None, None] & (mask_h[:, None] & (w < W))[None, :, :]
            offs = times(h, stride_grad_x_h, INDEX_INT64)[:, None] + times(w, stride_grad_x_w, INDEX_INT64)
            offs = offs[None, :, :] + times(offs_c, stride_grad_x_c, INDEX_INT64)[:, None, None]
            _store(grad_x_ptr + batch * stride_grad_x_b, offs, total, mask)

    partial_ptr += (split * KERNEL_H + kernel_h) * KERNEL_W * C + offs_c
    for j in tl.static_range(TAPS):
        is_tap = (kernel_h < KERNEL_H) & (kernel_ws[j] >= 0) & (kernel_ws[j] < KERNEL_W)
        tl.store(partial_ptr + kernel_ws[j] * C, tl.sum(sums[j], axis=1), mask=mask_c & is_tap)


@triton.jit
def _sum_splits_kernel(
    weight_partial_ptr, norm_partial_ptr, grad_weight_ptr, grad_norm_weight_ptr, grad_norm_bias_ptr, grad_bias_ptr,
    weight_splits, norm_splits,
    C: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the splits' partial sums of the two kernels above. grid (TAPS + 3, blocks of C)."""
    column = tl.program_id(0)  # a tap, or beyond them norm_weight, norm_bias, bias
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if column < TAPS:
        source_ptr = weight_partial_ptr + column * C
        stride = TAPS * C
        n_splits = weight_splits
    else:
        source_ptr = norm_partial_ptr + (column - TAPS) * C
        stride = 3 * C
        n_splits = norm_splits
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, n_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        mask = (splits < n_splits)[:, None] & mask_c[None, :]
        total += tl.load(source_ptr + splits[:, None] * stride + offs_c[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if column < TAPS:
        _store(grad_weight_ptr, offs_c * TAPS + column, result, mask_c)
    if column == TAPS:
        _store(grad_norm_weight_ptr, offs_c, result, mask_c)
    if column == TAPS + 1:
        _store(grad_norm_bias_ptr, offs_c, result, mask_c)
    if grad_bias_ptr is not None:
        if column == TAPS + 2:
            _store(grad_bias_ptr, offs_c, result, mask_c)


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    normalized: Tensor,
    rstd: Tensor,
    grad_x: Tensor | None,
    grads: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    transposed: bool,
) -> None:
    """Fills grad_x, where one is wanted, and grads: of the weight, norm_weight, norm_bias and bias, where there are.

    x and grad_x are (B, C, H, W) by strides, weight (taps, C) and contiguous, grad_y and normalized (B, H', W', C).
    """
    batch, channels, height, width = x.shape
    height_out, width_out = grad_y.shape[1:3]
    grad_weight, grad_norm_weight, grad_norm_bias, grad_bias = grads
    architecture, sm_count = runtime.architecture(x.device), runtime.sm_count(x.device)

    rows = rstd.numel()
    config, norm_splits = table.norm_backward(architecture, sm_count, channels=channels, rows=rows)
    grad_u = torch.empty_like(grad_y)
    norm_partial = torch.empty((norm_splits, 3, channels), dtype=torch.float32, device=x.device)
    launch(
        _norm_backward_kernel, (norm_splits,), config, like=x,
        grad_y_ptr=grad_y, normalized_ptr=normalized, rstd_ptr=rstd, norm_weight_ptr=norm_weight, grad_u_ptr=grad_u,
        partial_ptr=norm_partial,
        n_rows=rows,
        C=channels,
    )  # fmt: skip

    gaps = (1, 1) if transposed else stride
    taps_h, taps_w = (-(-k // gap) for k, gap in zip(kernel, gaps, strict=True))
    taps = min(taps_w, MAX_TAPS)
    parts = gaps[0] * gaps[1] * taps_h * -(-taps_w // taps)
    vector = vector_of(x, width) if gaps[1] == 1 else 1
    fused = grad_x is not None and kernel[0] == 1 and stride[0] == 1 and taps == taps_w
    config, splits = table.grad_weight(
        architecture,
        sm_count,
        batch=batch,
        channels=channels,
        sizes=(-(-height // gaps[0]), -(-width // gaps[1])),
        parts=parts,
        fused=fused,
    )
    vector = config["RUN"] if vector >= config["RUN"] else 1
    blocks_h = -(-height // (gaps[0] * config["BLOCK_H"]))
    blocks_w = -(-width // (gaps[1] * config["BLOCK_W"] * config["RUN"]))
    taps_all = kernel[0] * kernel[1]
    weight_partial = torch.empty((splits, taps_all, channels), dtype=torch.float32, device=x.device)
    launch(
        _grad_weight_kernel, (parts * splits, cdiv(channels, config["BLOCK_C"])), config, like=x,
        x_ptr=x, grad_u_ptr=grad_u, weight_ptr=weight, grad_x_ptr=grad_x if fused else None,
        partial_ptr=weight_partial,
        H=height, W=width, H_OUT=height_out, W_OUT=width_out, blocks_h=blocks_h, blocks_w=blocks_w,
        n_tiles=batch * blocks_h * blocks_w, n_splits=splits,
        **strides("x", x, "bchw"), **strides("grad_x", grad_x if fused else None, "bchw"),
        C=channels, KERNEL_H=kernel[0], KERNEL_W=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        TRANSPOSED=transposed, TAPS=taps, VECTOR=vector,
        INDEX_INT64=max(span(x), height_out * width_out * channels) >= 2**31,
    )  # fmt: skip
    if grad_x is not None and not fused:
        gradient = grad_u.permute(0, 3, 1, 2)
        convolve(gradient, weight.t(), grad_x, kernel=kernel, stride=stride, transposed=not transposed)

    config = table.sum_splits(channels)
    launch(
        _sum_splits_kernel, (taps_all + 3, cdiv(channels, config["BLOCK_C"])), config, like=x,
        weight_partial_ptr=weight_partial, norm_partial_ptr=norm_partial, grad_weight_ptr=grad_weight,
        grad_norm_weight_ptr=grad_norm_weight, grad_norm_bias_ptr=grad_norm_bias, grad_bias_ptr=grad_bias,
        weight_splits=splits, norm_splits=norm_splits,
        C=channels, TAPS=taps_all,
    )  # fmt: skip
