"""A pointwise MLP with its hidden activations never leaving the chip: forward, gradient of x, gradients of the weights.

    gelu:    y = gelu(x W1ᵀ + b1) W2ᵀ + b2 + residual
    swiglu:  y = (silu(x W1ᵀ) ∘ x W3ᵀ) W2ᵀ + residual

x is (N, C), contiguous rows; y, the residual and dy are (B, C_out, S) by strides with B·S = N: channels first or last,
the store transposes. A program takes BLOCK_M positions of one sample and loops over the hidden units in chunks of
BLOCK_F: two products (three gated) and the activation per chunk. Nothing but x is kept for backward; the hidden units
are recomputed there. Products accumulate in float32; hidden units are rounded to x's dtype, as between two
layers.
Bytes per position: x, residual and y once; FLOPs 4·C·F forward, 6·C·F for dx and 8·C·F for the weights (2 and 4·C·F of
them recomputed).

The weights' gradients are summed over slabs of positions in registers and then over slabs in fixed order.
"""

import torch
from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.convnext import config
from fastblocks.kernels.launch import launch
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.reduce import sum_rows
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit
def _normal_cdf(x, EXACT: tl.constexpr):
    """Φ(x) and exp(-x²/2).

    EXACT is libdevice's erf. Otherwise Abramowitz and Stegun 7.1.26, off by less than 8e-8, for results that are
    rounded to 16 bits: about half the instructions, and its exponential is the one that the derivative needs.
    """
    bell = tl.exp2(x * x * -0.7213475204444817)
    if EXACT:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        t = 1.0 / (1.0 + 0.23164190 * tl.abs(x))
        tail = (
            t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))) * bell
        )
        cdf = tl.where(x >= 0.0, 1.0 - tail, tail)
    return cdf, bell


@triton.jit
def _activate(pre, up, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == "gelu":
        cdf, _ = _normal_cdf(pre, EXACT)
        hidden = pre * cdf
    else:
        hidden = pre * tl.sigmoid(pre) * up
    return hidden


@triton.jit
def _activate_backward(pre, up, grad, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Recomputes hidden, and the gradients of pre and up."""
    if ACTIVATION == "gelu":
        cdf, bell = _normal_cdf(pre, EXACT)
        hidden = pre * cdf
        grad_pre = grad * (cdf + pre * bell * 0.3989422804014327)
        grad_up = grad_pre
    else:
        sigmoid = tl.sigmoid(pre)
        swish = pre * sigmoid
        hidden = swish * up
        grad_pre = grad * up * (sigmoid + swish * (1.0 - sigmoid))
        grad_up = grad * swish
    return hidden, grad_pre, grad_up


@triton.jit
def _mlp_forward_kernel(
    x_ptr,
    weight1_ptr,
    bias1_ptr,
    weight3_ptr,
    weight2_ptr,
    bias2_ptr,
    residual_ptr,
    y_ptr,
    S,
    blocks_s,
    stride_residual_b,
    stride_residual_c,
    stride_residual_s,
    stride_y_b,
    stride_y_c,
    stride_y_s,
    C: tl.constexpr,
    F: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    INDEX_INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """grid (B · blocks_s,), with blocks_s tiles of BLOCK_M positions per sample.

    weight1, weight3 (gated only): (F, C), weight2: (C_OUT, F), F the hidden units. EXACT: erf, not its approximation.
    """
    batch = (tl.program_id(0) // blocks_s).to(tl.int64)
    start_s = tl.program_id(0) % blocks_s * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    offs_o = tl.arange(0, BLOCK_O)
    mask_s = start_s + offs_m < S
    mask_c = offs_c < C
    mask_o = offs_o < C_OUT
    x_ptr += (batch * S + start_s) * C  # tiles of 64-bit offsets would cost two registers an element
    offs_x = offs_m[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + offs_x, mask=mask_s[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_M, BLOCK_C]
    y = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for start in range(0, F, BLOCK_F):
        offs_f = start + tl.arange(0, BLOCK_F)
        mask_f = offs_f < F
        offs_1 = offs_f[None, :] * C + offs_c[:, None]  # [BLOCK_C, BLOCK_F]
        mask_1 = mask_f[None, :] & mask_c[:, None]
        pre = dot(x, tl.load(weight1_ptr + offs_1, mask=mask_1, other=0.0), "ieee")
        if HAS_BIAS:
            pre += tl.load(bias1_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == "swiglu":
            up = dot(x, tl.load(weight3_ptr + offs_1, mask=mask_1, other=0.0), "ieee")
        else:
            up = pre
        hidden = round_to(_activate(pre, up, ACTIVATION, EXACT), x.dtype)
        offs_2 = offs_o[None, :] * F + offs_f[:, None]  # [BLOCK_F, BLOCK_O]
        weight2 = tl.load(weight2_ptr + offs_2, mask=mask_f[:, None] & mask_o[None, :], other=0.0)
        y = dot(hidden, weight2, "ieee", y)
    if HAS_BIAS:
        y += tl.load(bias2_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)[None, :]
    mask = mask_s[:, None] & mask_o[None, :]
    if INDEX_INT64:
        offs_m = offs_m.to(tl.int64)
        offs_o = offs_o.to(tl.int64)
    start_s = start_s.to(tl.int64)
    if HAS_RESIDUAL:
        residual_ptr += batch * stride_residual_b + start_s * stride_residual_s
        offs = offs_m[:, None] * stride_residual_s + offs_o[None, :] * stride_residual_c
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y_ptr += batch * stride_y_b + start_s * stride_y_s
    offs = offs_m[:, None] * stride_y_s + offs_o[None, :] * stride_y_c
    tl.store(y_ptr + offs, round_to(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mlp_grad_x_kernel(
    grad_y_ptr,
    x_ptr,
    weight1_ptr,
    bias1_ptr,
    weight3_ptr,
    weight2_ptr,
    grad_x_ptr,
    S,
    blocks_s,
    stride_grad_y_b,
    stride_grad_y_c,
    stride_grad_y_s,
    C: tl.constexpr,
    F: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEX_INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """grid (B · blocks_s,), as forward. Recomputes pre (and up) of each chunk of hidden units."""
    batch = (tl.program_id(0) // blocks_s).to(tl.int64)
    start_s = tl.program_id(0) % blocks_s * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    offs_o = tl.arange(0, BLOCK_O)
    mask_s = start_s + offs_m < S
    mask_c = offs_c < C
    mask_o = offs_o < C_OUT
    x_ptr += (batch * S + start_s) * C  # tiles of 64-bit offsets would cost two registers an element
    offs_x = offs_m[:, None] * C + offs_c[None, :]
    mask_x = mask_s[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_C]
    grad_y_ptr += batch * stride_grad_y_b + start_s.to(tl.int64) * stride_grad_y_s
    if INDEX_INT64:
        offs_y = offs_m[:, None] * stride_grad_y_s + offs_o.to(tl.int64)[None, :] * stride_grad_y_c
    else:
        offs_y = offs_m[:, None] * stride_grad_y_s + offs_o[None, :] * stride_grad_y_c
    grad_y = tl.load(grad_y_ptr + offs_y, mask=mask_s[:, None] & mask_o[None, :], other=0.0)
    grad_y = round_to(grad_y, x.dtype)  # [BLOCK_M, BLOCK_O]
    grad_x = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, F, BLOCK_F):
        offs_f = start + tl.arange(0, BLOCK_F)
        mask_f = offs_f < F
        offs_1 = offs_f[:, None] * C + offs_c[None, :]  # [BLOCK_F, BLOCK_C]
        mask_1 = mask_f[:, None] & mask_c[None, :]
        weight1 = tl.load(weight1_ptr + offs_1, mask=mask_1, other=0.0)
        pre = dot(x, tl.trans(weight1), "ieee")
        if HAS_BIAS:
            pre += tl.load(bias1_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == "swiglu":
            weight3 = tl.load(weight3_ptr + offs_1, mask=mask_1, other=0.0)
            up = dot(x, tl.trans(weight3), "ieee")
        else:
            up = pre
        offs_2 = offs_o[:, None] * F + offs_f[None, :]  # [BLOCK_O, BLOCK_F]
        weight2 = tl.load(weight2_ptr + offs_2, mask=mask_o[:, None] & mask_f[None, :], other=0.0)
        grad_hidden = dot(grad_y, weight2, "ieee")
        _, grad_pre, grad_up = _activate_backward(pre, up, grad_hidden, ACTIVATION, EXACT)
        grad_x = dot(round_to(grad_pre, x.dtype), weight1, "ieee", grad_x)
        if ACTIVATION == "swiglu":
            grad_x = dot(round_to(grad_up, x.dtype), weight3, "ieee", grad_x)
    grad_x_ptr += (batch * S + start_s) * C
    tl.store(grad_x_ptr + offs_x, round_to(grad_x, grad_x_ptr.dtype.element_ty), mask=mask_x)


@triton.jit
def _mlp_grad_weight_kernel(
    grad_y_ptr,
    x_ptr,
    weight1_ptr,
    bias1_ptr,
    weight3_ptr,
    weight2_ptr,
    partial_ptr,
    S,
    blocks_s,
    n_tiles,
    stride_grad_y_b,
    stride_grad_y_c,
    stride_grad_y_s,
    C: tl.constexpr,
    F: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEX_INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """grid (chunks of F, slabs); slabs share the n_tiles = B · blocks_s tiles of positions in turn.

    A row of `partial`, one per slab, is [dW1 (F, C) | dW2 (C_out, F) | dW3 (F, C) if gated, or db1 (F) | db2 (C_out)].
    """
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_c = tl.arange(0, BLOCK_C)
    offs_o = tl.arange(0, BLOCK_O)
    mask_f = offs_f < F
    mask_c = offs_c < C
    mask_o = offs_o < C_OUT
    offs_1 = offs_f[:, None] * C + offs_c[None, :]  # [BLOCK_F, BLOCK_C]
    offs_2 = offs_o[:, None] * F + offs_f[None, :]  # [BLOCK_O, BLOCK_F]
    mask_1 = mask_f[:, None] & mask_c[None, :]
    mask_2 = mask_o[:, None] & mask_f[None, :]
    weight1 = tl.load(weight1_ptr + offs_1, mask=mask_1, other=0.0)
    weight2 = tl.load(weight2_ptr + offs_2, mask=mask_2, other=0.0)
    grad_weight1 = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    grad_weight2 = tl.zeros([BLOCK_O, BLOCK_F], tl.float32)
    if ACTIVATION == "swiglu":
        weight3 = tl.load(weight3_ptr + offs_1, mask=mask_1, other=0.0)
        grad_weight3 = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias1 = tl.load(bias1_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)[None, :]
        grad_bias1 = tl.zeros([BLOCK_F], tl.float32)
        grad_bias2 = tl.zeros([BLOCK_O], tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    offs_x = offs_m[:, None] * C + offs_c[None, :]
    if INDEX_INT64:
        offs_y = offs_m[:, None] * stride_grad_y_s + offs_o.to(tl.int64)[None, :] * stride_grad_y_c
    else:
        offs_y = offs_m[:, None] * stride_grad_y_s + offs_o[None, :] * stride_grad_y_c
    for tile in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        batch = (tile // blocks_s).to(tl.int64)
        start_s = (tile % blocks_s).to(tl.int64) * BLOCK_M
        mask_s = start_s + offs_m < S
        x_tile_ptr = x_ptr + (batch * S + start_s) * C
        x = tl.load(x_tile_ptr + offs_x, mask=mask_s[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_M, BLOCK_C]
        grad_y_tile_ptr = grad_y_ptr + batch * stride_grad_y_b + start_s * stride_grad_y_s
        grad_y = tl.load(grad_y_tile_ptr + offs_y, mask=mask_s[:, None] & mask_o[None, :], other=0.0)
        if HAS_BIAS:
            grad_bias2 += tl.sum(grad_y.to(tl.float32), axis=0)
        grad_y = round_to(grad_y, x.dtype)  # [BLOCK_M, BLOCK_O]
        pre = dot(x, tl.trans(weight1), "ieee")
        if HAS_BIAS:
            pre += bias1
        if ACTIVATION == "swiglu":
            up = dot(x, tl.trans(weight3), "ieee")
        else:
            up = pre
        grad_hidden = dot(grad_y, weight2, "ieee")
        hidden, grad_pre, grad_up = _activate_backward(pre, up, grad_hidden, ACTIVATION, EXACT)
        if HAS_BIAS:  # rows beyond the last have a gradient of 0
            grad_bias1 += tl.sum(grad_pre, axis=0)
        grad_weight2 = dot(tl.trans(grad_y), round_to(hidden, x.dtype), "ieee", grad_weight2)
        grad_weight1 = dot(tl.trans(round_to(grad_pre, x.dtype)), x, "ieee", grad_weight1)
        if ACTIVATION == "swiglu":
            grad_weight3 = dot(tl.trans(round_to(grad_up, x.dtype)), x, "ieee", grad_weight3)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    COLUMNS: tl.constexpr = F * C + C_OUT * F + (F * C if GATED else 0) + (F + C_OUT if HAS_BIAS else 0)
    partial_ptr += tl.program_id(1).to(tl.int64) * COLUMNS
    tl.store(partial_ptr + offs_1, grad_weight1, mask=mask_1)
    partial_ptr += F * C
    tl.store(partial_ptr + offs_2, grad_weight2, mask=mask_2)
    partial_ptr += C_OUT * F
    if ACTIVATION == "swiglu":
        tl.store(partial_ptr + offs_1, grad_weight3, mask=mask_1)
        partial_ptr += F * C
    if HAS_BIAS:
        tl.store(partial_ptr + offs_f, grad_bias1, mask=mask_f)
        if tl.program_id(0) == 0:  # every program of the slab has the same sum
            tl.store(partial_ptr + F + offs_o, grad_bias2, mask=mask_o)


def fused_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight3: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    activation: str,
) -> None:
    """Fills y (B, C_out, S) by strides, like the residual, from x (N, C). Gated if weight3 is given; x, weights in one
    dtype."""
    batch, c_out, positions = y.shape
    chosen = config.mlp(
        runtime.architecture(x.device), "forward", x.shape[1], c_out, x.element_size(), weight3 is not None
    )
    blocks_s = cdiv(positions, chosen["BLOCK_M"])
    strides = (0, 0, 0) if residual is None else residual.stride()
    launch(
        _mlp_forward_kernel,
        (batch * blocks_s,),
        chosen,
        like=x,
        x_ptr=x,
        weight1_ptr=weight1,
        bias1_ptr=bias1,
        weight3_ptr=weight3,
        weight2_ptr=weight2,
        bias2_ptr=bias2,
        residual_ptr=residual,
        y_ptr=y,
        S=positions,
        blocks_s=blocks_s,
        stride_residual_b=strides[0],
        stride_residual_c=strides[1],
        stride_residual_s=strides[2],
        stride_y_b=y.stride(0),
        stride_y_c=y.stride(1),
        stride_y_s=y.stride(2),
        C=x.shape[1],
        F=weight1.shape[0],
        C_OUT=c_out,
        ACTIVATION=activation,
        EXACT=x.dtype == torch.float32,
        HAS_BIAS=bias1 is not None,
        HAS_RESIDUAL=residual is not None,
        INDEX_INT64=max(c_out * y.stride(1), c_out * strides[1]) >= 2**31,
    )


def fused_backward(
    grad_y: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight3: Tensor | None,
    weight2: Tensor,
    grad_x: Tensor | None,
    grads: list[Tensor] | None,
    activation: str,
) -> None:
    """Fills grad_x and grads: of weight1, weight2, then of weight3 (gated) or bias1 and bias2. None: not wanted."""
    batch, c_out, positions = grad_y.shape
    channels, hidden = x.shape[1], weight1.shape[0]
    architecture = runtime.architecture(x.device)
    shared = {
        "grad_y_ptr": grad_y,
        "x_ptr": x,
        "weight1_ptr": weight1,
        "bias1_ptr": bias1,
        "weight3_ptr": weight3,
        "weight2_ptr": weight2,
        "S": positions,
        "stride_grad_y_b": grad_y.stride(0),
        "stride_grad_y_c": grad_y.stride(1),
        "stride_grad_y_s": grad_y.stride(2),
        "C": channels,
        "F": hidden,
        "C_OUT": c_out,
        "ACTIVATION": activation,
        "EXACT": x.dtype == torch.float32,
        "HAS_BIAS": bias1 is not None,
        "INDEX_INT64": c_out * grad_y.stride(1) >= 2**31,
    }
    gated = weight3 is not None
    if grad_x is not None:
        chosen = config.mlp(architecture, "grad_x", channels, c_out, x.element_size(), gated)
        blocks_s = cdiv(positions, chosen["BLOCK_M"])
        grid = (batch * blocks_s,)
        launch(_mlp_grad_x_kernel, grid, chosen, like=x, grad_x_ptr=grad_x, blocks_s=blocks_s, **shared)
    if grads is not None:
        chosen = config.mlp(architecture, "grad_weight", channels, c_out, x.element_size(), gated)
        blocks_s, chunks = cdiv(positions, chosen["BLOCK_M"]), cdiv(hidden, chosen["BLOCK_F"])
        slabs = max(1, min(batch * blocks_s, runtime.sm_count(x.device) // chunks))
        partial = torch.empty((slabs, sum(g.numel() for g in grads)), dtype=torch.float32, device=x.device)
        launch(
            _mlp_grad_weight_kernel,
            (chunks, slabs),
            chosen,
            like=x,
            partial_ptr=partial,
            blocks_s=blocks_s,
            n_tiles=batch * blocks_s,
            **shared,
        )
        sum_rows(partial, grads)
