"""A block's weights in the form that its products read, in one launch; and the gradients of that form taken apart.

    packed = [ W_qkv ∘ s₁ (3C, C) | W_out (C, C) | W_gate ∘ s₂ (F', C) | W_up ∘ s₂ (F', C) | W_downᵀ (F', C) ]

One flat tensor in the products' dtype; a block without attention has the last three parts. The scale of each norm is
folded into the columns of the weight behind it, so that products read the normalized rows x̂ themselves; F hidden units
are padded with rows of zeros to F', a multiple of PAD: 341 rows of W_down would be odd numbers of elements, which no
vector load takes, and every tile of hidden units is an aligned block without a mask. All of that is exact but for one
rounding to the products' dtype, which the weights alone would get, too.

Nothing is held from call to call: `parameter.data.mul_(…)`, as moving averages of weights do it, changes neither
address nor version of a parameter, and packing anew costs one launch and some 3 µs (a prediction).

Backward: G, the gradient of the packed weights, comes as partial sums, (slabs, numbers). ∂W = G ∘ s and
∂s = Σ_rows W ∘ G, so the scales' gradients need no pass over the block's rows. Slabs are added in a fixed order.
Bytes: the weights once, the packed ones once; backward: partial sums, weights and gradients once.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fastblocks.kernels.blocks import config
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.reduce import sum_rows
from fastblocks.kernels.runtime import cdiv, tl, triton

PAD = 32  # hidden units: every BLOCK_F of the forward and grad_x kernels divides it


@triton.jit
def _pack_kernel(
    weight_qkv_ptr, weight_out_ptr, weight_gate_ptr, weight_up_ptr, weight_down_ptr, scale_attention_ptr,
    scale_mlp_ptr, packed_ptr,
    C: tl.constexpr, F: tl.constexpr, F_PAD: tl.constexpr, HAS_ATTENTION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (blocks of max(3C, F_PAD) rows, blocks of columns): a program takes the same rows of every part."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs = offs_r[:, None] * C + offs_c[None, :]
    dtype = packed_ptr.dtype.element_ty
    if HAS_ATTENTION:
        scale = tl.load(scale_attention_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        mask = (offs_r < 3 * C)[:, None] & mask_c[None, :]
        weight = tl.load(weight_qkv_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(packed_ptr + offs, round_to(weight * scale[None, :], dtype), mask=mask)
        mask = (offs_r < C)[:, None] & mask_c[None, :]
        weight = tl.load(weight_out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(packed_ptr + 3 * C * C + offs, round_to(weight, dtype), mask=mask)
        packed_ptr += 4 * C * C
    scale = tl.load(scale_mlp_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    mask = (offs_r < F)[:, None] & mask_c[None, :]
    mask_pad = (offs_r < F_PAD)[:, None] & mask_c[None, :]
    gate = tl.load(weight_gate_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(packed_ptr + offs, round_to(gate * scale[None, :], dtype), mask=mask_pad)
    up = tl.load(weight_up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(packed_ptr + F_PAD * C + offs, round_to(up * scale[None, :], dtype), mask=mask_pad)
    down = tl.load(weight_down_ptr + offs_c[None, :] * F + offs_r[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(packed_ptr + 2 * F_PAD * C + offs, round_to(down, dtype), mask=mask_pad)


@triton.jit
def _sum_slabs(partial_ptr, offs, mask, slabs, stride_slab, BLOCK_S: tl.constexpr):
    """A tile of a part, [BLOCK_R, BLOCK_C], summed over slabs in float32."""
    offs_s = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, offs.shape[0], offs.shape[1]], tl.float32)
    for start in range(0, slabs, BLOCK_S):
        rows = (start + offs_s).to(tl.int64)[:, None, None] * stride_slab
        inside = (start + offs_s < slabs)[:, None, None] & mask[None, :, :]
        total += tl.load(partial_ptr + rows + offs[None, :, :], mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _unpack_kernel(
    partial_ptr, weight_qkv_ptr, weight_gate_ptr, weight_up_ptr, scale_attention_ptr, scale_mlp_ptr, grad_qkv_ptr,
    grad_out_ptr, grad_gate_ptr, grad_up_ptr, grad_down_ptr, grad_scales_ptr,
    slabs_qkv, slabs_rest,
    stride_slab,
    C: tl.constexpr, F: tl.constexpr, F_PAD: tl.constexpr, HAS_ATTENTION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (blocks of max(3C, F) rows, blocks of columns): a program takes the same rows of every part.

    grad_scales (blocks of rows, 2C or C) gets their share of the scales' gradients: attention's, then the MLP's.
    """
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs = offs_r[:, None] * C + offs_c[None, :]  # [BLOCK_R, BLOCK_C]
    grad_scales_ptr += tl.program_id(0) * (2 * C if HAS_ATTENTION else C)
    if HAS_ATTENTION:
        mask = (offs_r < 3 * C)[:, None] & mask_c[None, :]
        grad = _sum_slabs(partial_ptr, offs, mask, slabs_qkv, stride_slab, BLOCK_S)
        scale = tl.load(scale_attention_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        tl.store(grad_qkv_ptr + offs, round_to(grad * scale[None, :], grad_qkv_ptr.dtype.element_ty), mask=mask)
        weight = tl.load(weight_qkv_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_scales_ptr + offs_c, tl.sum(grad * weight, axis=0), mask=mask_c)
        mask = (offs_r < C)[:, None] & mask_c[None, :]
        grad = _sum_slabs(partial_ptr + 3 * C * C, offs, mask, slabs_rest, stride_slab, BLOCK_S)
        tl.store(grad_out_ptr + offs, round_to(grad, grad_out_ptr.dtype.element_ty), mask=mask)
        partial_ptr += 4 * C * C
        grad_scales_ptr += C
    mask = (offs_r < F)[:, None] & mask_c[None, :]
    scale = tl.load(scale_mlp_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    grad = _sum_slabs(partial_ptr, offs, mask, slabs_rest, stride_slab, BLOCK_S)
    tl.store(grad_gate_ptr + offs, round_to(grad * scale[None, :], grad_gate_ptr.dtype.element_ty), mask=mask)
    grad_scale = grad * tl.load(weight_gate_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad = _sum_slabs(partial_ptr + F_PAD * C, offs, mask, slabs_rest, stride_slab, BLOCK_S)
    tl.store(grad_up_ptr + offs, round_to(grad * scale[None, :], grad_up_ptr.dtype.element_ty), mask=mask)
    grad_scale += grad * tl.load(weight_up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_scales_ptr + offs_c, tl.sum(grad_scale, axis=0), mask=mask_c)
    grad = _sum_slabs(partial_ptr + 2 * F_PAD * C, offs, mask, slabs_rest, stride_slab, BLOCK_S)
    offs = offs_c[None, :] * F + offs_r[:, None]
    tl.store(grad_down_ptr + offs, round_to(grad, grad_down_ptr.dtype.element_ty), mask=mask)


def padded(hidden: int) -> int:
    """F', the hidden units with padding."""
    return cdiv(hidden, PAD) * PAD


def numbers(channels: int, hidden: int, attention: bool) -> int:
    """How many numbers the packed weights have."""
    return (4 * channels * channels if attention else 0) + 3 * padded(hidden) * channels


def parts(packed: Tensor, channels: int) -> list[Tensor]:
    """Views of a block's packed weights, (numbers,): of qkv, out and MLP."""
    square = channels * channels
    # unsafe: the views do not know of each other, as no gradient flows through them
    return packed.unsafe_split_with_sizes((3 * square, square, packed.numel() - 4 * square))


@lru_cache(maxsize=1024)
def _pack_launch(hidden: int, channels: int, attention: bool) -> Prepared:
    chosen, rows = config.pack(channels), max(3 * channels if attention else 0, padded(hidden))
    return Prepared(
        _pack_kernel, (cdiv(rows, chosen["BLOCK_R"]), cdiv(channels, chosen["BLOCK_C"])), chosen, C=channels, F=hidden,
        F_PAD=padded(hidden), HAS_ATTENTION=attention,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _unpack_launch(
    hidden: int, channels: int, attention: bool, slabs_qkv: int, slabs_rest: int, stride_slab: int
) -> tuple[Prepared, int]:
    """The launch, and its blocks of rows."""
    chosen = config.unpack(channels, slabs_rest)
    blocks_r = cdiv(max(3 * channels if attention else 0, hidden), chosen["BLOCK_R"])
    prepared = Prepared(
        _unpack_kernel, (blocks_r, cdiv(channels, chosen["BLOCK_C"])), chosen, slabs_qkv=slabs_qkv,
        slabs_rest=slabs_rest, stride_slab=stride_slab, C=channels, F=hidden, F_PAD=padded(hidden),
        HAS_ATTENTION=attention,
    )  # fmt: skip
    return prepared, blocks_r


def pack(
    weight_qkv: Tensor | None,
    weight_out: Tensor | None,
    weight_gate: Tensor,
    weight_up: Tensor,
    weight_down: Tensor,
    scale_attention: Tensor | None,
    scale_mlp: Tensor,
    packed: Tensor,
) -> None:
    """Fills `packed`, flat. All are contiguous; qkv, out and scale_attention are None for a block without attention."""
    prepared = _pack_launch(*weight_gate.shape, weight_qkv is not None)
    prepared(
        packed, weight_qkv_ptr=weight_qkv, weight_out_ptr=weight_out, weight_gate_ptr=weight_gate,
        weight_up_ptr=weight_up, weight_down_ptr=weight_down, scale_attention_ptr=scale_attention,
        scale_mlp_ptr=scale_mlp, packed_ptr=packed,
    )  # fmt: skip


def unpack(
    partial: Tensor,
    slabs_qkv: int,
    slabs_rest: int,
    weight_qkv: Tensor | None,
    weight_out: Tensor | None,
    weight_gate: Tensor,
    weight_up: Tensor,
    weight_down: Tensor,
    scale_attention: Tensor | None,
    scale_mlp: Tensor,
) -> list[Tensor | None]:
    """Gradients of the weights and scales, in their order, from partial (slabs, numbers): the first slabs_qkv slabs
    hold the gradient of qkv, the first slabs_rest that of everything else."""
    hidden, channels = weight_gate.shape
    attention = weight_qkv is not None
    parameters = (weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp)
    grads = [None if p is None else torch.empty_like(p) for p in parameters]  # contiguous, as they are
    prepared, blocks_r = _unpack_launch(hidden, channels, attention, slabs_qkv, slabs_rest, partial.stride(0))
    scales = 2 if attention else 1
    grad_scales = partial.new_empty((blocks_r, scales * channels), dtype=torch.float32)
    prepared(
        partial, partial_ptr=partial, weight_qkv_ptr=weight_qkv, weight_gate_ptr=weight_gate, weight_up_ptr=weight_up,
        scale_attention_ptr=scale_attention, scale_mlp_ptr=scale_mlp, grad_qkv_ptr=grads[0], grad_out_ptr=grads[1],
        grad_gate_ptr=grads[2], grad_up_ptr=grads[3], grad_down_ptr=grads[4], grad_scales_ptr=grad_scales,
    )  # fmt: skip
    sum_rows(grad_scales, grads[5:] if attention else grads[6:])
    return grads
