"""A pointwise MLP with its hidden activations never leaving the chip: forward, gradient of x, gradients of the weights.

    y = gelu(x W1ᵀ + b1) W2ᵀ + b2 + residual

x is (N, C), contiguous rows; y, the residual and dy are (B, C_out, S) by strides with B·S = N: channels first or last,
the store transposes. A program takes BLOCK_M positions of one sample and loops over the hidden units in chunks of
BLOCK_F: two products and the activation per chunk. Nothing but x is kept for backward; the hidden units
are recomputed there. Products accumulate in float32; hidden units are rounded to x's dtype, as between two
layers.
Bytes per position: x, residual and y once; FLOPs 4·C·F forward, 6·C·F for dx and 8·C·F for the weights (2 and 4·C·F of
them recomputed).

The weights' gradients are sums over positions: each program adds its split of them in registers, and the splits' sums
are added in a fixed order.
"""

import torch
from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.convnext import config as table
from fastblocks.kernels.launch import LaunchConfig, launch
from fastblocks.kernels.matrix import load_matrix, load_transposed, store_matrix, strides, times
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.reduce import sum_rows
from fastblocks.kernels.runtime import cdiv, tl, triton

# The approximation is a polynomial up to |x| = CLAMP and constant beyond.
CLAMP = tl.constexpr(4.5)


@triton.jit
def activate(x, EXACT: tl.constexpr):
    """GELU, x · Φ(x). EXACT is libdevice's erf.

    Otherwise, for results that are rounded to 16 bits, Φ(x) − 1/2 = x · P(x² − CLAMP²), off by less than 7e-5: 12
    instructions, none of them an exponential or a reciprocal (erf by Abramowitz and Stegun's 7.1.26 takes 24). In
    x² − CLAMP² all terms have one sign, so nothing cancels, and the first alone makes Φ(±CLAMP) exactly 0 and 1. The
    coefficients are the minimax fit under that condition.
    """
    if EXACT:
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    z = tl.clamp(x, -CLAMP, CLAMP, propagate_nan=tl.PropagateNan.ALL)
    t = z * z - CLAMP * CLAMP
    p = 3.69845026e-8 + t * (1.57610081e-9 + t * 3.00000927e-11)
    p = 6.95704875e-6 + t * (3.21708467e-6 + t * (4.40004527e-7 + t * p))
    p = 0.5 / CLAMP + t * (-0.00273082615 + t * (0.000121013167 + t * p))
    return x * (0.5 + z * p)


@triton.jit
def slope(x, EXACT: tl.constexpr):
    """GELU's derivative, Φ(x) + x · φ(x); unless EXACT approximated in the same way, off by less than 8e-5."""
    if EXACT:
        bell = tl.exp2(x * x * -0.7213475204444817)
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * bell * 0.3989422804014327
    z = tl.clamp(x, -CLAMP, CLAMP, propagate_nan=tl.PropagateNan.ALL)
    t = z * z - CLAMP * CLAMP
    p = -5.16111953e-8 + t * (-1.70845882e-9 + t * -2.452691e-11)
    p = -4.71813655e-5 + t * (-8.28717839e-6 + t * (-8.51367417e-7 + t * p))
    p = 0.5 / CLAMP + t * (-0.00290232338 + t * (-0.000141990706 + t * (-0.000157088754 + t * p)))
    return 0.5 + z * p


@triton.jit
def position_pointers(ptr, batch, start_s, offs_m, offs_c, stride_b, stride_c, stride_s, INDEX_INT64: tl.constexpr):
    """Pointers [positions, channels] into a (B, C, S) tensor by strides; positions start_s + offs_m of one sample."""
    ptr += batch * stride_b + start_s.to(tl.int64) * stride_s
    return ptr + (times(offs_m, stride_s, INDEX_INT64)[:, None] + times(offs_c, stride_c, INDEX_INT64)[None, :])


@triton.jit
def load_vector(ptr, offs, n):
    return tl.load(ptr + offs, mask=offs < n, other=0.0).to(tl.float32)


@triton.jit
def _mlp_forward_kernel(
    x_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, residual_ptr, y_ptr,
    S, blocks_s,
    stride_residual_b, stride_residual_c, stride_residual_s, stride_y_b, stride_y_c, stride_y_s,
    C: tl.constexpr, F: tl.constexpr, C_OUT: tl.constexpr, EXACT: tl.constexpr, INDEX_INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """grid (B · blocks_s,), with blocks_s tiles of BLOCK_M positions per sample.

    weight1: (F, C), weight2: (C_OUT, F), F the hidden units. EXACT: erf, not its approximation.
    """
    batch = (tl.program_id(0) // blocks_s).to(tl.int64)
    start_s = tl.program_id(0) % blocks_s * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    offs_o = tl.arange(0, BLOCK_O)
    x_ptr += (batch * S + start_s) * C  # tiles of 64-bit offsets would cost two registers an element
    x = load_matrix(x_ptr, offs_m, offs_c, S - start_s, C)  # [BLOCK_M, BLOCK_C]
    y = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    bias1 = load_vector(bias1_ptr, tl.arange(0, BLOCK_F), F)
    for start in range(0, F, BLOCK_F):
        offs_f = start + tl.arange(0, BLOCK_F)
        next_bias1 = load_vector(bias1_ptr, offs_f + BLOCK_F, F)
        pre = dot(x, load_transposed(weight1_ptr, offs_f, offs_c, F, C), "ieee") + bias1[None, :]
        bias1 = next_bias1
        hidden = round_to(activate(pre, EXACT), x.dtype)
        y = dot(hidden, load_transposed(weight2_ptr, offs_o, offs_f, C_OUT, F), "ieee", y)
    y += load_vector(bias2_ptr, offs_o, C_OUT)[None, :]
    mask = (offs_m < S - start_s)[:, None] & (offs_o < C_OUT)[None, :]
    if residual_ptr is not None:
        ptrs = position_pointers(
            residual_ptr, batch, start_s, offs_m, offs_o,
            stride_residual_b, stride_residual_c, stride_residual_s, INDEX_INT64,
        )  # fmt: skip
        y += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    ptrs = position_pointers(y_ptr, batch, start_s, offs_m, offs_o, stride_y_b, stride_y_c, stride_y_s, INDEX_INT64)
    tl.store(ptrs, round_to(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mlp_grad_x_kernel(
    grad_y_ptr, x_ptr, weight1_ptr, bias1_ptr, weight2_ptr, grad_x_ptr,
    S, blocks_s,
    stride_grad_y_b, stride_grad_y_c, stride_grad_y_s,
    C: tl.constexpr, F: tl.constexpr, C_OUT: tl.constexpr, EXACT: tl.constexpr, INDEX_INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """grid (B · blocks_s,), as forward. Recomputes pre of each chunk of hidden units."""
    batch = (tl.program_id(0) // blocks_s).to(tl.int64)
    start_s = tl.program_id(0) % blocks_s * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    offs_o = tl.arange(0, BLOCK_O)
    start_row = (batch * S + start_s) * C
    x = load_matrix(x_ptr + start_row, offs_m, offs_c, S - start_s, C)  # [BLOCK_M, BLOCK_C]
    ptrs = position_pointers(
        grad_y_ptr, batch, start_s, offs_m, offs_o, stride_grad_y_b, stride_grad_y_c, stride_grad_y_s, INDEX_INT64
    )
    mask = (offs_m < S - start_s)[:, None] & (offs_o < C_OUT)[None, :]
    grad_y = round_to(tl.load(ptrs, mask=mask, other=0.0), x.dtype)  # [BLOCK_M, BLOCK_O]
    grad_x = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    bias1 = load_vector(bias1_ptr, tl.arange(0, BLOCK_F), F)
    for start in range(0, F, BLOCK_F):
        offs_f = start + tl.arange(0, BLOCK_F)
        next_bias1 = load_vector(bias1_ptr, offs_f + BLOCK_F, F)
        weight1 = load_matrix(weight1_ptr, offs_f, offs_c, F, C)
        pre = dot(x, tl.trans(weight1), "ieee") + bias1[None, :]
        bias1 = next_bias1
        grad_hidden = dot(grad_y, load_matrix(weight2_ptr, offs_o, offs_f, C_OUT, F), "ieee")
        grad_pre = round_to(grad_hidden * slope(pre, EXACT), x.dtype)
        grad_x = dot(grad_pre, weight1, "ieee", grad_x)
    store_matrix(grad_x_ptr + start_row, grad_x, offs_m, offs_c, S - start_s, C)


@triton.jit
def _mlp_grad_weight_kernel(
    grad_y_ptr, x_ptr, weight1_ptr, bias1_ptr, weight2_ptr, partial_ptr,
    S, blocks_s, n_tiles,
    stride_grad_y_b, stride_grad_y_c, stride_grad_y_s,
    C: tl.constexpr, F: tl.constexpr, C_OUT: tl.constexpr, EXACT: tl.constexpr, INDEX_INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """grid (chunks of F, splits); splits share the n_tiles = B · blocks_s tiles of positions in turn.

    A row of `partial`, one per split, is [dW1 (F, C) | dW2 (C_out, F) | db1 (F) | db2 (C_out)].
    """
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    offs_o = tl.arange(0, BLOCK_O)
    weight1 = load_matrix(weight1_ptr, offs_f, offs_c, F, C)
    weight2 = load_matrix(weight2_ptr, offs_o, offs_f, C_OUT, F)
    bias1 = load_vector(bias1_ptr, offs_f, F)[None, :]
    grad_weight1 = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    grad_weight2 = tl.zeros([BLOCK_O, BLOCK_F], tl.float32)
    grad_bias1 = tl.zeros([BLOCK_F], tl.float32)
    grad_bias2 = tl.zeros([BLOCK_O], tl.float32)
    for tile in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        batch = (tile // blocks_s).to(tl.int64)
        start_s = (tile % blocks_s).to(tl.int64) * BLOCK_M
        x = load_matrix(x_ptr + (batch * S + start_s) * C, offs_m, offs_c, S - start_s, C)  # [BLOCK_M, BLOCK_C]
        ptrs = position_pointers(
            grad_y_ptr, batch, start_s, offs_m, offs_o, stride_grad_y_b, stride_grad_y_c, stride_grad_y_s, INDEX_INT64
        )
        mask = (offs_m < S - start_s)[:, None] & (offs_o < C_OUT)[None, :]
        grad_y = tl.load(ptrs, mask=mask, other=0.0)
        grad_bias2 += tl.sum(grad_y.to(tl.float32), axis=0)
        grad_y = round_to(grad_y, x.dtype)  # [BLOCK_M, BLOCK_O]
        pre = dot(x, tl.trans(weight1), "ieee") + bias1
        grad_pre = dot(grad_y, weight2, "ieee") * slope(pre, EXACT)
        grad_bias1 += tl.sum(grad_pre, axis=0)  # rows beyond the last have a gradient of 0
        grad_weight2 = dot(tl.trans(grad_y), round_to(activate(pre, EXACT), x.dtype), "ieee", grad_weight2)
        grad_weight1 = dot(tl.trans(round_to(grad_pre, x.dtype)), x, "ieee", grad_weight1)
    partial_ptr += tl.program_id(1).to(tl.int64) * (F * C + C_OUT * F + F + C_OUT)
    store_matrix(partial_ptr, grad_weight1, offs_f, offs_c, F, C)
    store_matrix(partial_ptr + F * C, grad_weight2, offs_o, offs_f, C_OUT, F)
    partial_ptr += F * C + C_OUT * F
    tl.store(partial_ptr + offs_f, grad_bias1, mask=offs_f < F)
    if tl.program_id(0) == 0:  # every program of the split has the same sum
        tl.store(partial_ptr + F + offs_o, grad_bias2, mask=offs_o < C_OUT)


def _shared(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> dict:
    """The arguments that all three kernels share."""
    return {
        "x_ptr": x, "weight1_ptr": weight1, "bias1_ptr": bias1, "weight2_ptr": weight2,
        "C": x.shape[1], "F": weight1.shape[0], "C_OUT": weight2.shape[0], "EXACT": x.dtype == torch.float32,
    }  # fmt: skip


def _config(x: Tensor, weight2: Tensor) -> LaunchConfig:
    return table.mlp(x.shape[1], weight2.shape[0], x.element_size())


def fused_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Fills y (B, C_out, S) by strides, like the residual, from x (N, C); x and the weights in one dtype."""
    batch, c_out, positions = y.shape
    config = _config(x, weight2)
    blocks_s = cdiv(positions, config["BLOCK_M"])
    spans = [c_out * tensor.stride(1) for tensor in (y, residual) if tensor is not None]
    launch(
        _mlp_forward_kernel, (batch * blocks_s,), config, like=x, **_shared(x, weight1, bias1, weight2),
        bias2_ptr=bias2, residual_ptr=residual, y_ptr=y,
        S=positions, blocks_s=blocks_s,
        **strides("residual", residual, "bcs"), **strides("y", y, "bcs"),
        INDEX_INT64=max(spans) >= 2**31,
    )  # fmt: skip


def fused_backward(
    grad_y: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    grad_x: Tensor | None,
    grads: list[Tensor] | None,
) -> None:
    """Fills grad_x and grads: of weight1, weight2, bias1 and bias2. None: not wanted."""
    batch, c_out, positions = grad_y.shape
    shared = {
        **_shared(x, weight1, bias1, weight2),
        "grad_y_ptr": grad_y,
        "S": positions,
        **strides("grad_y", grad_y, "bcs"),
        "INDEX_INT64": c_out * grad_y.stride(1) >= 2**31,
    }
    if grad_x is not None:
        config = _config(x, weight2)
        blocks_s = cdiv(positions, config["BLOCK_M"])
        grid = (batch * blocks_s,)
        launch(_mlp_grad_x_kernel, grid, config, like=x, grad_x_ptr=grad_x, blocks_s=blocks_s, **shared)
    if grads is not None:
        config, splits = table.mlp_grad_weight(
            runtime.architecture(x.device),
            runtime.sm_count(x.device),
            batch=batch,
            positions=positions,
            channels=x.shape[1],
            hidden=weight1.shape[0],
            c_out=c_out,
        )
        blocks_s = cdiv(positions, config["BLOCK_M"])
        partial = torch.empty((splits, sum(g.numel() for g in grads)), dtype=torch.float32, device=x.device)
        launch(
            _mlp_grad_weight_kernel, (cdiv(weight1.shape[0], config["BLOCK_F"]), splits), config, like=x,
            partial_ptr=partial,
            blocks_s=blocks_s, n_tiles=batch * blocks_s,
            **shared,
        )  # fmt: skip
        sum_rows(partial, grads)
