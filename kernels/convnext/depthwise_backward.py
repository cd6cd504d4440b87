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
row of a buffer; `_sum_slabs_kernel` adds the rows in order. No atomics: the same bits every time.
"""

import torch
from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.convnext import config
from fastblocks.kernels.convnext.depthwise import _pack, _unpack, convolve, span, vector_of
from fastblocks.kernels.launch import launch
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.runtime import cdiv, tl, triton

# Most taps whose sums a program of the weights' gradient holds: 8 tiles of 8 float32 are 64 registers per thread.
MAX_TAPS = 8


@triton.jit
def _norm_backward_kernel(
    grad_y_ptr,
    normalized_ptr,
    rstd_ptr,
    norm_weight_ptr,
    grad_u_ptr,
    partial_ptr,
    n_rows,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_u (rows, C), and partial (programs, 3, C): each program's sums of dy · x̂, dy and du. grid (programs,)."""
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    norm_weight = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_bias = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_u = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M
        mask_m = rows < n_rows
        mask = mask_m[:, None] & mask_c[None, :]
        offs = rows[:, None] * C + offs_c[None, :]
        grad = tl.load(grad_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        normalized = tl.load(normalized_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)[:, None]
        sum_weight += grad * normalized
        sum_bias += grad
        grad *= norm_weight
        mean = tl.sum(grad, axis=1)[:, None] / C
        slope = tl.sum(grad * normalized, axis=1)[:, None] / C
        grad_u = tl.where(mask_c[None, :], (grad - mean - normalized * slope) * rstd, 0.0)
        sum_u += grad_u  # rows beyond the last have rstd 0
        tl.store(grad_u_ptr + offs, round_to(grad_u, grad_u_ptr.dtype.element_ty), mask=mask)
    partial_ptr += tl.program_id(0) * 3 * C + offs_c
    tl.store(partial_ptr, tl.sum(sum_weight, axis=0), mask=mask_c)
    tl.store(partial_ptr + C, tl.sum(sum_bias, axis=0), mask=mask_c)
    tl.store(partial_ptr + 2 * C, tl.sum(sum_u, axis=0), mask=mask_c)


@triton.jit
def _grad_weight_kernel(
    x_ptr,
    grad_u_ptr,
    weight_ptr,
    grad_x_ptr,
    partial_ptr,
    H,
    W,
    H_OUT,
    W_OUT,
    blocks_h,
    blocks_w,
    n_tiles,
    n_slabs,
    stride_x_b,
    stride_x_c,
    stride_x_h,
    stride_x_w,
    stride_grad_x_b,
    stride_grad_x_c,
    stride_grad_x_h,
    stride_grad_x_w,
    C: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAPS: tl.constexpr,
    GRAD_X: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX_INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    RUN: tl.constexpr,
):
    """Sums of x · du for TAPS taps of one kernel row, over one slab of positions; GRAD_X: also the gradient of x.

    grid (slabs · phases · kernel rows · chunks of TAPS, blocks of C), chunks fastest. x, grad_x: (B, C, H, W) by
    strides. grad_u: (B, H_OUT, W_OUT, C). weight: (taps, C). partial: (phases, slabs, rows, taps of a phase, C)
    float32. The slabs share the n_tiles tiles of positions in turn. VECTOR, RUN: as in `depthwise`.
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
    slab = pid // (GAP_W * GAP_H)
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
    offs_xc = offs_c.to(tl.int64) * stride_x_c if INDEX_INT64 else offs_c * stride_x_c
    sums = ()
    weights = ()
    for j in tl.static_range(TAPS):
        sums = sums + (tl.zeros([BLOCK_C, BLOCK_H * BLOCK_W], tl.float32),)
        if GRAD_X:
            if TRANSPOSED:
                kernel_w = tap_w + j
            else:
                kernel_w = (phase_w + PAD_W) % GAP_W + (ALL_TAPS_W - 1 - j) * GAP_W
            weight = tl.load(weight_ptr + kernel_w * C + offs_c, mask=mask_c & (kernel_w < KERNEL_W), other=0.0)
            weights = weights + (weight.to(tl.float32)[:, None],)

    for tile in range(slab, n_tiles, n_slabs):
        start_w = tile % blocks_w * (BLOCK_W * RUN)
        start_h = tile // blocks_w % blocks_h * BLOCK_H
        batch = (tile // (blocks_w * blocks_h)).to(tl.int64)
        q_h = start_h + offs_q // BLOCK_W
        q_w = start_w + offs_q % BLOCK_W * RUN
        h = q_h * GAP_H + phase_h
        mask_h = h < H
        offs_h = h.to(tl.int64) * stride_x_h if INDEX_INT64 else h * stride_x_h
        x_batch_ptr = x_ptr + batch * stride_x_b
        if VECTOR > 1:
            mask = mask_c[:, None] & (mask_h & (q_w < W))[None, :]
            offs = (offs_xc[:, None] + (offs_h + q_w)[None, :])[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
            runs = _unpack(tl.load(x_batch_ptr + offs, mask=mask[:, :, None], other=0.0), VECTOR)
        else:
            runs = ()
            for f in tl.static_range(RUN):
                w = (q_w + f) * GAP_W + phase_w
                offs_w = w.to(tl.int64) * stride_x_w if INDEX_INT64 else w * stride_x_w
                mask = mask_c[:, None] & (mask_h & (w < W))[None, :]
                offs = offs_xc[:, None] + (offs_h + offs_w)[None, :]
                runs = runs + (tl.load(x_batch_ptr + offs, mask=mask, other=0.0),)
        u_h = q_h * STEP_H + first_h
        mask_u = mask_h & (u_h >= 0) & (u_h < H_OUT)
        u_batch_ptr = grad_u_ptr + batch * H_OUT * W_OUT * C
        grad_x = ()
        if GRAD_X:
            for _ in tl.static_range(RUN):
                grad_x = grad_x + (tl.zeros([BLOCK_C, BLOCK_H * BLOCK_W], tl.float32),)
        for d in tl.static_range(SPAN):
            u_w = q_w * STEP_W + (first_w + d)
            mask = mask_c[:, None] & (mask_u & (u_w >= 0) & (u_w < W_OUT))[None, :]
            row = u_h.to(tl.int64) * W_OUT + u_w if INDEX_INT64 else u_h * W_OUT + u_w
            grad_u = tl.load(u_batch_ptr + offs_c[:, None] + (row * C)[None, :], mask=mask, other=0.0).to(tl.float32)
            updated_sums = ()
            for j in tl.static_range(TAPS):
                total = sums[j]
                for f in tl.static_range(RUN):
                    if f * STEP_W + j == d:
                        total += runs[f].to(tl.float32) * grad_u
                updated_sums = updated_sums + (total,)
            sums = updated_sums
            if GRAD_X:
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
        if GRAD_X:
            total = _pack(grad_x, RUN)  # [BLOCK_C, BLOCK_H * BLOCK_W, RUN]
            w = (q_w[:, None] + tl.arange(0, RUN)[None, :]) * GAP_W + phase_w
            mask = mask_c[:, None, None] & (mask_h[:, None] & (w < W))[None, :, :]
            if INDEX_INT64:
                offs = h.to(tl.int64)[:, None] * stride_grad_x_h + w.to(tl.int64) * stride_grad_x_w
                offs = offs[None, :, :] + (offs_c.to(tl.int64) * stride_grad_x_c)[:, None, None]
            else:
                offs = h[:, None] * stride_grad_x_h + w * stride_grad_x_w
                offs = offs[None, :, :] + (offs_c * stride_grad_x_c)[:, None, None]
            tl.store(
                grad_x_ptr + batch * stride_grad_x_b + offs, round_to(total, grad_x_ptr.dtype.element_ty), mask=mask
            )

    partial_ptr += ((((phase_h * GAP_W + phase_w) * n_slabs + slab) * ALL_TAPS_H + tap_h) * ALL_TAPS_W + tap_w) * C
    for j in tl.static_range(TAPS):
        tl.store(partial_ptr + j * C + offs_c, tl.sum(sums[j], axis=1), mask=mask_c & (tap_w + j < ALL_TAPS_W))


@triton.jit
def _sum_slabs_kernel(
    weight_partial_ptr,
    norm_partial_ptr,
    grad_weight_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    grad_bias_ptr,
    weight_slabs,
    norm_slabs,
    C: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    GAP_H: tl.constexpr,
    GAP_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the slabs' partial sums of the two kernels above. grid (taps + 3, blocks of C)."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    TAPS_H: tl.constexpr = (KERNEL_H + GAP_H - 1) // GAP_H
    TAPS_W: tl.constexpr = (KERNEL_W + GAP_W - 1) // GAP_W
    column = tl.program_id(0)  # a tap, or beyond them norm_weight, norm_bias, bias
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if column < TAPS:
        h = column // KERNEL_W
        w = column % KERNEL_W
        if TRANSPOSED:
            phase = 0
            tap = column
        else:
            phase = (h + KERNEL_H * GAP_H - KERNEL_H // 2) % GAP_H * GAP_W
            phase += (w + KERNEL_W * GAP_W - KERNEL_W // 2) % GAP_W
            tap = (TAPS_H - 1 - h // GAP_H) * TAPS_W + TAPS_W - 1 - w // GAP_W
        source_ptr = weight_partial_ptr + (phase * weight_slabs * (TAPS_H * TAPS_W) + tap) * C
        stride = TAPS_H * TAPS_W * C
        n_slabs = weight_slabs
    else:
        source_ptr = norm_partial_ptr + (column - TAPS) * C
        stride = 3 * C
        n_slabs = norm_slabs
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, n_slabs, BLOCK_S):
        slabs = start + tl.arange(0, BLOCK_S)
        mask = (slabs < n_slabs)[:, None] & mask_c[None, :]
        total += tl.load(source_ptr + slabs[:, None] * stride + offs_c[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if column < TAPS:
        tl.store(
            grad_weight_ptr + offs_c * TAPS + column, round_to(result, grad_weight_ptr.dtype.element_ty), mask=mask_c
        )
    if column == TAPS:
        tl.store(grad_norm_weight_ptr + offs_c, round_to(result, grad_norm_weight_ptr.dtype.element_ty), mask=mask_c)
    if column == TAPS + 1:
        tl.store(grad_norm_bias_ptr + offs_c, round_to(result, grad_norm_bias_ptr.dtype.element_ty), mask=mask_c)
    if HAS_BIAS:  # a constexpr: without a bias its pointer is None
        if column == TAPS + 2:
            tl.store(grad_bias_ptr + offs_c, round_to(result, grad_bias_ptr.dtype.element_ty), mask=mask_c)


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
    chosen, programs = config.norm_backward(architecture, sm_count, channels=channels, rows=rows)
    grad_u = torch.empty_like(grad_y)
    norm_partial = torch.empty((programs, 3, channels), dtype=torch.float32, device=x.device)
    launch(
        _norm_backward_kernel,
        (programs,),
        chosen,
        like=x,
        grad_y_ptr=grad_y,
        normalized_ptr=normalized,
        rstd_ptr=rstd,
        norm_weight_ptr=norm_weight,
        grad_u_ptr=grad_u,
        partial_ptr=norm_partial,
        n_rows=rows,
        C=channels,
    )

    gaps = (1, 1) if transposed else stride
    taps_h, taps_w = (-(-k // gap) for k, gap in zip(kernel, gaps, strict=True))
    taps = min(taps_w, MAX_TAPS)
    parts = gaps[0] * gaps[1] * taps_h * -(-taps_w // taps)
    vector = vector_of(x, width) if gaps[1] == 1 else 1
    fused = grad_x is not None and kernel[0] == 1 and stride[0] == 1 and taps == taps_w
    chosen, slabs = config.grad_weight(
        architecture,
        sm_count,
        batch=batch,
        channels=channels,
        sizes=(-(-height // gaps[0]), -(-width // gaps[1])),
        parts=parts,
        fused=fused,
    )
    vector = chosen["RUN"] if vector >= chosen["RUN"] else 1
    grad_x_strides = grad_x.stride() if fused else (0, 0, 0, 0)
    blocks_h = -(-height // (gaps[0] * chosen["BLOCK_H"]))
    blocks_w = -(-width // (gaps[1] * chosen["BLOCK_W"] * chosen["RUN"]))
    weight_partial = torch.empty(
        (gaps[0] * gaps[1], slabs, taps_h * taps_w, channels), dtype=torch.float32, device=x.device
    )
    launch(
        _grad_weight_kernel,
        (parts * slabs, cdiv(channels, chosen["BLOCK_C"])),
        chosen,
        like=x,
        x_ptr=x,
        grad_u_ptr=grad_u,
        weight_ptr=weight,
        grad_x_ptr=grad_x if fused else None,
        partial_ptr=weight_partial,
        H=height,
        W=width,
        H_OUT=height_out,
        W_OUT=width_out,
        blocks_h=blocks_h,
        blocks_w=blocks_w,
        n_tiles=batch * blocks_h * blocks_w,
        n_slabs=slabs,
        stride_x_b=x.stride(0),
        stride_x_c=x.stride(1),
        stride_x_h=x.stride(2),
        stride_x_w=x.stride(3),
        stride_grad_x_b=grad_x_strides[0],
        stride_grad_x_c=grad_x_strides[1],
        stride_grad_x_h=grad_x_strides[2],
        stride_grad_x_w=grad_x_strides[3],
        C=channels,
        KERNEL_H=kernel[0],
        KERNEL_W=kernel[1],
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        TRANSPOSED=transposed,
        TAPS=taps,
        GRAD_X=fused,
        VECTOR=vector,
        INDEX_INT64=max(span(x), height_out * width_out * channels) >= 2**31,
    )
    if grad_x is not None and not fused:
        convolve(
            grad_u.permute(0, 3, 1, 2),
            weight,
            (1, channels),
            None,
            None,
            None,
            grad_x,
            None,
            None,
            kernel=kernel,
            stride=stride,
            transposed=not transposed,
            normalize=False,
        )

    chosen = config.sum_slabs(channels)
    launch(
        _sum_slabs_kernel,
        (kernel[0] * kernel[1] + 3, cdiv(channels, chosen["BLOCK_C"])),
        chosen,
        like=x,
        weight_partial_ptr=weight_partial,
        norm_partial_ptr=norm_partial,
        grad_weight_ptr=grad_weight,
        grad_norm_weight_ptr=grad_norm_weight,
        grad_norm_bias_ptr=grad_norm_bias,
        grad_bias_ptr=grad_bias,
        weight_slabs=slabs,
        norm_slabs=programs,
        C=channels,
        KERNEL_H=kernel[0],
        KERNEL_W=kernel[1],
        GAP_H=gaps[0],
        GAP_W=gaps[1],
        TRANSPOSED=transposed,
        HAS_BIAS=grad_bias is not None,
    )
