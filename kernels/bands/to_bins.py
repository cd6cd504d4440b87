"""From bands to a spectrum, overlapping bands added up: the unsplit, and the gradient behind the split.

    spectrum[b, f, t, c] = Σ_k (bands[b, :, t, k] W_k + bias_k)[lane (f, c) of k] / window[f]

over the bands k that have the bin f, in ascending order; zero where there is none. Window and bias are optional.
bands (B, N, T, K) with adjacent features, float32 or 16 bits; W_k (N, lanes) by strides; spectrum (B, F, T, I) of any
strides. A program takes BLOCK_M rows (b, t) and a block of lanes, and loops over the bands that the block touches: it
owns its bins, so that nothing is added in memory.

The weights are packed first: for each step of a block a tile in the product's dtype, aligned and with zeros outside of
the band (2 MB at 64 mel bands of 128 features). As they lie, with odd rows, every number would be a load of its own.

Bytes: bands once, and again from L2 for each further block that a band reaches into; the spectrum once.
FLOPs 2 · B · T · lanes · N, several times that on the tensor cores where bands are narrower than a block.
"""

import torch
from torch import Tensor

from fastblocks.kernels.bands import config
from fastblocks.kernels.bands.plan import Plan
from fastblocks.kernels.bands.spectrum import lane_offsets, of_bands, of_spectrum, row_offsets
from fastblocks.kernels.launch import launch
from fastblocks.kernels.matrix import strides
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit
def _pack_weight_kernel(
    weight_ptr, bias_ptr, packed_ptr, bias_sum_ptr, steps_ptr, blocks_ptr,
    stride_weight_k, stride_weight_n, stride_weight_l, stride_bias_k,
    N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Rows of the weight's tile of one step, (PADDED, BLOCK_L) with zeros outside of band and block; and each lane's
    sum of biases. grid (steps, PADDED // BLOCK_R). PADDED: N up to a multiple of a tile.
    """
    step_ptr = steps_ptr + 4 * tl.program_id(0)
    k = tl.load(step_ptr).to(tl.int64)
    first = tl.load(step_ptr + 1)
    block_ptr = blocks_ptr + 4 * tl.load(step_ptr + 3)
    lanes = tl.load(block_ptr + 2) + tl.arange(0, BLOCK_L)
    mask_block = lanes < tl.load(block_ptr + 3)
    mask_l = mask_block & (lanes >= first) & (lanes < tl.load(step_ptr + 2))
    offs_n = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = offs_n[:, None] * stride_weight_n + (lanes - first)[None, :] * stride_weight_l
    weight = tl.load(
        weight_ptr + k * stride_weight_k + offs, mask=(offs_n < N)[:, None] & mask_l[None, :], other=0.0
    )  # [BLOCK_R, BLOCK_L]
    packed_ptr += tl.program_id(0).to(tl.int64) * (PADDED * BLOCK_L)
    offs = offs_n[:, None] * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    tl.store(packed_ptr + offs, round_to(weight, packed_ptr.dtype.element_ty))
    if bias_ptr is not None:
        if (tl.program_id(1) == 0) & (tl.program_id(0) == tl.load(block_ptr)):
            bias = tl.zeros([BLOCK_L], tl.float32)
            for step in range(tl.load(block_ptr), tl.load(block_ptr + 1)):
                bias_ptrs = bias_ptr + tl.load(steps_ptr + 4 * step).to(tl.int64) * stride_bias_k
                from_first = lanes - tl.load(steps_ptr + 4 * step + 1)
                mask = mask_block & (from_first >= 0) & (lanes < tl.load(steps_ptr + 4 * step + 2))
                bias += tl.load(bias_ptrs + from_first, mask=mask, other=0.0).to(tl.float32)
            tl.store(bias_sum_ptr + lanes, bias, mask=mask_block)


@triton.jit
def _to_bins_kernel(
    bands_ptr, packed_ptr, bias_sum_ptr, window_ptr, spectrum_ptr, blocks_ptr, steps_ptr,
    n_rows, T, n_blocks,
    stride_bands_b, stride_bands_t, stride_bands_k,
    stride_spectrum_b, stride_spectrum_t, stride_spectrum_f, stride_spectrum_c,
    N: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr, INDEX_INT64: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grid (blocks of rows · blocks of lanes,), blocks of lanes fastest."""
    block_ptr = blocks_ptr + 4 * (tl.program_id(0) % n_blocks)
    rows = tl.program_id(0) // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.load(block_ptr + 2) + tl.arange(0, BLOCK_L)
    mask_m = (rows < n_rows)[:, None]
    mask_block = lanes < tl.load(block_ptr + 3)
    bands_ptrs = bands_ptr + row_offsets(rows, T, stride_bands_b, stride_bands_t)[:, None]
    PARTS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    offs_w = tl.arange(0, BLOCK_N)[:, None] * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    first_step, last_step = tl.load(block_ptr), tl.load(block_ptr + 1)
    total = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    if bias_sum_ptr is not None:
        mask_bias = mask_block & (first_step < last_step)
        total += tl.load(bias_sum_ptr + lanes, mask=mask_bias, other=0.0)[None, :]
    # What a step looks up is loaded one step ahead: the bands' addresses depend on it.
    k = tl.load(steps_ptr + 4 * first_step, mask=first_step < last_step, other=0)
    first = tl.load(steps_ptr + 4 * first_step + 1, mask=first_step < last_step, other=0)
    last = tl.load(steps_ptr + 4 * first_step + 2, mask=first_step < last_step, other=0)
    for part in range(first_step * PARTS, last_step * PARTS):
        offs_n = part % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = mask_m if N % BLOCK_N == 0 else mask_m & (offs_n < N)[None, :]
        offs = k.to(tl.int64) * stride_bands_k + offs_n
        x = tl.load(bands_ptrs + offs[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        weight = tl.load(packed_ptr + tl.full([], BLOCK_N * BLOCK_L, tl.int64) * part + offs_w)  # [BLOCK_N, BLOCK_L]
        mask_l = (lanes >= first) & (lanes < last)
        next_step = (part + 1) // PARTS
        k = tl.load(steps_ptr + 4 * next_step, mask=next_step < last_step, other=0)
        first = tl.load(steps_ptr + 4 * next_step + 1, mask=next_step < last_step, other=0)
        last = tl.load(steps_ptr + 4 * next_step + 2, mask=next_step < last_step, other=0)
        product = dot(round_to(x, weight.dtype), weight, PRECISION)
        total += tl.where(mask_l[None, :], product, 0.0)  # Inf · 0 of a band stays out of bins that it does not have
    if window_ptr is not None:
        total /= tl.load(window_ptr + lanes // CHANNELS, mask=mask_block, other=1.0).to(tl.float32)[None, :]
    offs = lane_offsets(lanes, stride_spectrum_f, stride_spectrum_c, CHANNELS, FLAT, INDEX_INT64)
    spectrum_ptrs = spectrum_ptr + row_offsets(rows, T, stride_spectrum_b, stride_spectrum_t)[:, None] + offs[None, :]
    tl.store(spectrum_ptrs, round_to(total, spectrum_ptr.dtype.element_ty), mask=mask_m & mask_block[None, :])


def to_bins(
    bands: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, spectrum: Tensor, plan: Plan,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Fills spectrum (B, F, T, I).

    bands: N adjacent. weight: (K, N, lanes) by strides. window (F,) and bias (K, lanes) contiguous. dtype: of the
    product's operands.
    """
    batch, features, length, _ = bands.shape
    chosen = config.to_bins(features)
    n_rows, n_blocks, n_steps = batch * length, plan.blocks.shape[0], plan.steps.shape[0]
    block_l, block_n = chosen["BLOCK_L"], chosen["BLOCK_N"]
    padded = cdiv(features, block_n) * block_n
    packed = torch.empty((n_steps, padded, block_l), dtype=dtype, device=bands.device)
    bias_sum = (
        None
        if bias is None
        else torch.empty(spectrum.shape[1] * spectrum.shape[3], dtype=torch.float32, device=bands.device)
    )
    if n_steps:
        packing = config.pack_weight(block_l, block_n)
        launch(
            _pack_weight_kernel, (n_steps, padded // packing["BLOCK_R"]), packing, like=bands,
            weight_ptr=weight, bias_ptr=bias, packed_ptr=packed, bias_sum_ptr=bias_sum,
            steps_ptr=plan.steps, blocks_ptr=plan.blocks,
            **strides("weight", weight, "knl"), stride_bias_k=0 if bias is None else bias.stride(0),
            N=features, PADDED=padded,
        )  # fmt: skip
    launch(
        _to_bins_kernel, (cdiv(n_rows, chosen["BLOCK_M"]) * n_blocks,), chosen, like=bands,
        **of_bands(bands), **of_spectrum(spectrum),
        packed_ptr=packed, bias_sum_ptr=bias_sum, window_ptr=window, blocks_ptr=plan.blocks, steps_ptr=plan.steps,
        n_rows=n_rows, n_blocks=n_blocks,
        N=features, PRECISION=config.precision(dtype),
    )  # fmt: skip
