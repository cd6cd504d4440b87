"""Gradients of the bands' weights and biases, sums over all rows (b, t).

    ∂W_k[l, n] = Σ_rows s[row, lane l of k] · e[row, n, k]       s = x, e = ∂y; unsplit: s = ∂y / window, e = x
    ∂bias_k    = Σ_rows e[row, :, k];                            unsplit: Σ_rows s[row, lanes of k]

A program takes a tile of a band's lanes and a slab of rows, and writes float32 partial sums; a second kernel adds the
slabs in a fixed order and writes zeros for the lanes past a band's end, which the weights have and nothing reads.

Bytes: the spectrum and bands once, both again from L2 for each further tile of a wide band; 4 · slabs · lanes · N
written and read; the gradient once. FLOPs 2 · B · T · lanes · N.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastblocks.kernels.bands import config
from fastblocks.kernels.bands.plan import Plan
from fastblocks.kernels.bands.spectrum import lane_offsets, of_bands, of_spectrum
from fastblocks.kernels.launch import launch
from fastblocks.kernels.matrix import strides, times
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit
def _grad_weight_kernel(
    spectrum_ptr, window_ptr, bands_ptr, partial_ptr, partial_bias_ptr, bands_table_ptr, tiles_ptr,
    T, blocks_t, n_blocks,
    stride_spectrum_b, stride_spectrum_t, stride_spectrum_f, stride_spectrum_c,
    stride_bands_b, stride_bands_t, stride_bands_k,
    stride_slab,
    N: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr, INDEX_INT64: tl.constexpr,
    BIAS_OF_LANES: tl.constexpr,  # sums of the spectrum's lanes, not of the bands' features
    DTYPE: tl.constexpr,  # of the product's operands
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grid (tiles of lanes, slabs, blocks of N): blocks of rows, blocks_t a sample, are dealt to slabs in turn.

    A slab of `partial` is (all_lanes, N), one of `partial_bias` (all_lanes,) or (K, N).
    """
    tiles_ptr += 4 * tl.program_id(0)
    k = tl.load(tiles_ptr)
    first = tl.load(tiles_ptr + 1)
    lanes = first + tl.arange(0, BLOCK_L)
    at = tl.load(tiles_ptr + 3) + tl.arange(0, BLOCK_L)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_l, mask_n = lanes < tl.load(tiles_ptr + 2), offs_n < N
    offs_x = lane_offsets(lanes, stride_spectrum_f, stride_spectrum_c, CHANNELS, FLAT, INDEX_INT64)
    bands_ptr += k.to(tl.int64) * stride_bands_k
    offs_y = times(offs_n, 1, INDEX_INT64)
    offs_m = tl.arange(0, BLOCK_M)
    if window_ptr is not None:
        window = tl.load(window_ptr + lanes // CHANNELS, mask=mask_l, other=1.0).to(tl.float32)
    total = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    total_bias = tl.zeros([BLOCK_L if BIAS_OF_LANES else BLOCK_N], tl.float32)
    for block in range(tl.program_id(1), n_blocks, tl.num_programs(1)):
        sample = tl.full([], 1, tl.int64) * (block // blocks_t)
        start_t = tl.full([], BLOCK_M, tl.int64) * (block % blocks_t)
        mask_m = (start_t + offs_m < T)[:, None]
        x_ptrs = spectrum_ptr + sample * stride_spectrum_b + start_t * stride_spectrum_t
        y_ptrs = bands_ptr + sample * stride_bands_b + start_t * stride_bands_t
        x_ptrs += times(offs_m, stride_spectrum_t, INDEX_INT64)[:, None] + offs_x[None, :]
        y_ptrs += times(offs_m, stride_bands_t, INDEX_INT64)[:, None] + offs_y[None, :]
        x = tl.load(x_ptrs, mask=mask_m & mask_l[None, :], other=0.0)  # [BLOCK_M, BLOCK_L]
        y = tl.load(y_ptrs, mask=mask_m & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        if window_ptr is not None:
            x = x.to(tl.float32) / window[None, :]
        total_bias += tl.sum((x if BIAS_OF_LANES else y).to(tl.float32), axis=0)
        total = dot(tl.trans(round_to(x, DTYPE)), round_to(y, DTYPE), PRECISION, total)
    slab = tl.program_id(1).to(tl.int64) * stride_slab
    offs = at.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(partial_ptr + slab + offs, total, mask=mask_l[:, None] & mask_n[None, :])
    if BIAS_OF_LANES:
        tl.store(partial_bias_ptr + slab + at, total_bias, mask=mask_l & (tl.program_id(2) == 0))
    else:
        is_first = first == tl.load(bands_table_ptr + 4 * k)  # of the band's tiles
        tl.store(partial_bias_ptr + slab + k * N + offs_n, total_bias, mask=mask_n & is_first)


@triton.jit
def _sum_slabs_kernel(
    partial_ptr, partial_bias_ptr, bands_table_ptr, grad_weight_ptr, grad_bias_ptr,
    slabs, width,
    stride_slab, stride_weight_k, stride_weight_l, stride_weight_n,
    N: tl.constexpr, BIAS_OF_LANES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grid (K, blocks of lanes, blocks of N). width: lanes of a band in the weight."""
    k = tl.program_id(0)
    offs_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.load(bands_table_ptr + 4 * k + 1)
    at = tl.load(bands_table_ptr + 4 * k + 2)
    mask_n = offs_n < N
    mask = (offs_l < lanes)[:, None] & mask_n[None, :]
    partial_ptrs = partial_ptr + ((at + offs_l).to(tl.int64)[:, None] * N + offs_n[None, :])
    total = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    for _ in range(tl.where(tl.program_id(1) * BLOCK_L < lanes, slabs, 0)):  # beyond a band's lanes there are zeros
        total += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += stride_slab
    weight_ptrs = grad_weight_ptr + k.to(tl.int64) * stride_weight_k
    weight_ptrs += offs_l[:, None] * stride_weight_l + offs_n[None, :] * stride_weight_n
    total = round_to(total, grad_weight_ptr.dtype.element_ty)
    tl.store(weight_ptrs, total, mask=(offs_l < width)[:, None] & mask_n[None, :])
    if BIAS_OF_LANES:
        bias_ptrs = partial_bias_ptr + at + offs_l
        mask_bias = offs_l < lanes
        bias_l = tl.zeros([BLOCK_L], tl.float32)
        for _ in range(slabs):
            bias_l += tl.load(bias_ptrs, mask=mask_bias, other=0.0)
            bias_ptrs += stride_slab
        bias_l = round_to(bias_l, grad_bias_ptr.dtype.element_ty)
        tl.store(grad_bias_ptr + k * width + offs_l, bias_l, mask=(offs_l < width) & (tl.program_id(2) == 0))
    elif tl.program_id(1) == 0:
        bias_ptrs = partial_bias_ptr + k * N + offs_n
        bias_n = tl.zeros([BLOCK_N], tl.float32)
        for _ in range(slabs):
            bias_n += tl.load(bias_ptrs, mask=mask_n, other=0.0)
            bias_ptrs += stride_slab
        tl.store(grad_bias_ptr + k * N + offs_n, round_to(bias_n, grad_bias_ptr.dtype.element_ty), mask=mask_n)


def empty_gradients(needs, make_x: Callable[[], Tensor], weight: Tensor, bias: Tensor) -> list[Tensor | None]:
    """Of x, weight and bias, None where none is needed; those of weight and bias are computed together."""
    needed = needs[1] or needs[2]
    others = [torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None for t in (weight, bias)]
    return [make_x() if needs[0] else None, *others]


def grad_weight(
    spectrum: Tensor, window: Tensor | None, bands: Tensor, grad_weight: Tensor, grad_bias: Tensor, plan: Plan,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Fills grad_weight (K, lanes, N) by strides, and grad_bias: contiguous (K, N) after a split, (K, lanes) after an
    unsplit, which has a window."""
    batch, features, length, n_bands = bands.shape
    of_lanes, width = window is not None, grad_weight.shape[1]
    if all(t.stride(0) == length * t.stride(2) for t in (spectrum, bands)):  # samples follow one another: one of them
        batch, length = 1, batch * length
    chosen, tiles = config.grad_weight(features), plan.tiles.shape[0]
    blocks_n = cdiv(features, chosen["BLOCK_N"])
    blocks_t = cdiv(length, chosen["BLOCK_M"])
    slabs = config.slabs(batch * blocks_t, tiles * blocks_n, spectrum)
    biases = plan.lanes if of_lanes else n_bands * features
    partial = torch.empty((slabs, plan.lanes * features + biases), dtype=torch.float32, device=spectrum.device)
    shared = {
        "partial_ptr": partial, "partial_bias_ptr": partial[:, plan.lanes * features :], "bands_table_ptr": plan.bands,
        "stride_slab": partial.shape[1], "N": features, "BIAS_OF_LANES": of_lanes,
    }  # fmt: skip
    arguments = {**of_spectrum(spectrum), "T": length}
    arguments["INDEX_INT64"] |= chosen["BLOCK_M"] * max(spectrum.stride(2), bands.stride(2)) >= 2**31
    launch(
        _grad_weight_kernel, (tiles, slabs, blocks_n), chosen, like=spectrum,
        **arguments, **of_bands(bands), **shared,
        window_ptr=window, tiles_ptr=plan.tiles,
        blocks_t=blocks_t, n_blocks=batch * blocks_t, **config.product(dtype),
    )  # fmt: skip
    chosen = config.sum_slabs(features)
    launch(
        _sum_slabs_kernel, (n_bands, cdiv(width, chosen["BLOCK_L"]), cdiv(features, chosen["BLOCK_N"])), chosen,
        like=spectrum,
        **shared, grad_weight_ptr=grad_weight, grad_bias_ptr=grad_bias,
        slabs=slabs, width=width, **strides("weight", grad_weight, "kln"),
    )  # fmt: skip
