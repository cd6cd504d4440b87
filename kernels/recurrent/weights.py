"""Gradients of a recurrence's weights as products over all steps at once, for groups too large to sum them in the loop.

`∂W = Σ_{b,t} ∂preactivations_{b,t} · operand_{b,t}ᵀ` with x_t (W_ih) or h_{t-1} (W_hh) as operand: a small result from
a long sum, which a library's product parallelises badly. Here the B·T rows are cut into at most 32 slices of a fixed
length, each writes its sum in float32, and a second pass adds the slices in order: the same bits every time.
"""

import torch
from torch import Tensor

from fastblocks.kernels.launch import launch
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.recurrent import config as table
from fastblocks.kernels.reduce import sum_rows
from fastblocks.kernels.runtime import cdiv, tl, triton

SLICE = 1024  # fewest rows of B·T in a slice: fewer are not worth a partial result of S·H × K floats
SLICES = 32  # most slices: 48 tiles × 32 slices are 11 waves of 132 SMs at H 128, G 4


@triton.jit(do_not_specialize=["batch", "length", "groups", "slice_rows"])
def _recurrent_weight_gradient_kernel(
    grad_preactivations_ptr, operand_ptr, h_first_ptr, partial_ptr,
    batch, length, groups, slice_rows, partial_size,
    stride_row,
    H: tl.constexpr, K: tl.constexpr, GATES: tl.constexpr, DIRECTIONS: tl.constexpr,
    STATE: tl.constexpr,  # the operand is y, one step earlier
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grid (tiles of (4H, K), N·G, slices). A slice's gradient of one weight, to its row of partial (slices,
    partial_size).

    grad_preactivations: (G, B·T, N, H, 4). operand: x, or y if STATE; rows of B·T, stride_row apart. K: I, or H if
    STATE.
    """
    DTYPE: tl.constexpr = grad_preactivations_ptr.dtype.element_ty
    pair = tl.program_id(1)  # direction · G + group, as the weights have it
    direction = pair // groups
    group = pair % groups
    columns = tl.cdiv(K, BLOCK_K)
    offs_n = tl.program_id(0) // columns * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(0) % columns * BLOCK_K + tl.arange(0, BLOCK_K)
    gate = offs_n % 4
    mask_n = offs_n < 4 * H
    if GATES == 3:  # a GRU's U_n h has a gradient of its own, the fourth; W_n x has the third
        mask_n &= gate != (2 if STATE else 3)
        gate = tl.minimum(gate, 2)
    mask_k = offs_k < K
    rows = batch.to(tl.int64) * length
    begin = tl.program_id(2).to(tl.int64) * slice_rows
    end = tl.minimum(begin + slice_rows, rows)
    before = 1 - 2 * direction  # rows from a step back to the one whose state it reads
    channel = ((group * DIRECTIONS + direction) * H if STATE else group * K) + offs_k

    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for offset in range(begin, end, BLOCK_M):
        offs_m = offset + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        inside = (offset % length).to(tl.int32) + tl.arange(0, BLOCK_M)  # one 64-bit division per tile, not per row
        t = inside % length
        grad_rows = ((group * rows + offs_m) * DIRECTIONS + direction)[None, :]
        grad_ptrs = grad_preactivations_ptr + grad_rows * (4 * H) + offs_n[:, None]
        grad = tl.load(grad_ptrs, mask=mask_m[None, :] & (offs_n < 4 * H)[:, None], other=0.0)
        source, there = offs_m, mask_m
        if STATE:
            source -= before
            there &= t != (direction * (length - 1))  # the state before the first step is h_first
        ptrs = operand_ptr + source[:, None] * stride_row + channel[None, :]
        operand = round_to(tl.load(ptrs, mask=there[:, None] & mask_k[None, :], other=0.0), DTYPE)
        if STATE and h_first_ptr is not None:
            b = offset // length + inside // length
            ptrs = h_first_ptr + ((direction * batch + b) * groups * H + group * H)[:, None] + offs_k[None, :]
            first = tl.load(ptrs, mask=(mask_m & (there == 0))[:, None] & mask_k[None, :], other=0.0)
            operand = tl.where(there[:, None], operand, round_to(first, DTYPE))
        total = dot(grad, operand, PRECISION, total)

    ptr = partial_ptr + tl.program_id(2).to(tl.int64) * partial_size
    index = ((pair * GATES + gate) * H + offs_n // 4)[:, None] * K + offs_k[None, :]
    tl.store(ptr + index, total, mask=mask_n[:, None] & mask_k[None, :])


def weight_gradients(
    x: Tensor,
    y: Tensor,
    h_first: Tensor | None,
    grad_preactivations: Tensor,
    grad_weight_ih: Tensor,
    grad_weight_hh: Tensor,
    precision: str,
) -> None:
    """Fills the weights' gradients from those of the preactivations, (G, B·T, N, H, 4)."""
    batch, length, _ = x.shape
    directions, groups, rows, inputs = grad_weight_ih.shape
    hidden = grad_weight_hh.shape[3]
    slices = min(SLICES, cdiv(batch * length, SLICE))
    slice_rows = cdiv(batch * length, slices)
    partial = x.new_empty(slices, grad_weight_ih.numel() + grad_weight_hh.numel(), dtype=torch.float32)
    config = table.weight_gradient(grad_preactivations.dtype == torch.float32)
    for operand, size, first, out in (
        (x, inputs, None, partial),
        (y, hidden, h_first, partial[:, grad_weight_ih.numel() :]),
    ):
        tiles = cdiv(4 * hidden, config["BLOCK_N"]) * cdiv(size, config["BLOCK_K"])
        launch(
            _recurrent_weight_gradient_kernel, (tiles, directions * groups, slices), config, like=x,
            grad_preactivations_ptr=grad_preactivations, operand_ptr=operand, h_first_ptr=first, partial_ptr=out,
            batch=batch, length=length, groups=groups, slice_rows=slice_rows, partial_size=partial.shape[1],
            stride_row=operand.stride(1),
            H=hidden,
            K=size, GATES=rows // hidden, DIRECTIONS=directions, STATE=operand is y, PRECISION=precision,
        )  # fmt: skip
    sum_rows(partial, [grad_weight_ih, grad_weight_hh])
