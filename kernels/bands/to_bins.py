"""From bands to a spectrum, overlapping bands added up: the unsplit, and the gradient behind the split.

    spectrum[b, f, t, c] = Σ_k (bands[b, :, t, k] W_k + bias_k)[lane (f, c) of k] / window[f]

over the bands k that have the bin f, in ascending order; zero where there is none. Window and bias are optional.
bands (B, N, T, K) with adjacent features, float32 or 16 bits; W_k (N, lanes) by strides; spectrum (B, F, T, I) of any
strides. A program takes BLOCK_M rows (b, t) and a block of lanes, and loops over the bands that the block touches: it
owns its bins, so that nothing is added in memory.

The weights are packed first, a tile for each step of a block.

Bytes: bands once, and again from L2 for each further block that a band reaches into; the spectrum once.
FLOPs 2 · B · T · lanes · N, several times that on the tensor cores where bands are narrower than a block.
"""

import torch
from torch import Tensor

from fastblocks.kernels.bands import config
from fastblocks.kernels.bands.pack import pack_weight
from fastblocks.kernels.bands.plan import Plan
from fastblocks.kernels.bands.spectrum import lane_offsets, of_bands, of_spectrum, row_offsets
from fastblocks.kernels.launch import launch
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit
def _sum_of_steps(
    bands_ptrs, packed_ptr, steps_ptr, lanes, mask_m,
    first_step, last_step, stride_bands_k,
    N: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,  # keep a band out of bins that it does not have even if it is not finite: Inf · 0
):  # fmt: skip
    """Σ over a block's steps of bands W, [BLOCK_M, BLOCK_L]."""
    PARTS: tl.constexpr = PADDED // BLOCK_N
    offs_w = tl.arange(0, BLOCK_N)[:, None] * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    # The next band is looked up one step ahead: the bands' addresses depend on it.
    k = tl.load(steps_ptr + 4 * first_step, mask=first_step < last_step, other=0)
    for part in tl.range(first_step * PARTS, last_step * PARTS, num_stages=1 if MASKED else None):
        offs_n = part % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = mask_m if N % BLOCK_N == 0 else mask_m & (offs_n < N)[None, :]
        offs = k.to(tl.int64) * stride_bands_k + offs_n
        x = tl.load(bands_ptrs + offs[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        weight = tl.load(packed_ptr + tl.full([], BLOCK_N * BLOCK_L, tl.int64) * part + offs_w)  # [BLOCK_N, BLOCK_L]
        next_step = (part + 1) // PARTS
        k = tl.load(steps_ptr + 4 * next_step, mask=next_step < last_step, other=0)
        if MASKED:
            step_ptr = steps_ptr + 4 * (part // PARTS)
            mask_l = (lanes >= tl.load(step_ptr + 1)) & (lanes < tl.load(step_ptr + 3))
            product = dot(round_to(x, weight.dtype), weight, PRECISION)
            total += tl.where(mask_l[None, :], product, 0.0)
        else:
            total = dot(round_to(x, weight.dtype), weight, PRECISION, total)
    return total


@triton.jit
def _to_bins_kernel(
    bands_ptr, packed_ptr, bias_sum_ptr, window_ptr, spectrum_ptr, blocks_ptr, steps_ptr,
    n_rows, T, blocks_m,
    stride_bands_b, stride_bands_t, stride_bands_k,
    stride_spectrum_b, stride_spectrum_t, stride_spectrum_f, stride_spectrum_c,
    N: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr, INDEX_INT64: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grid (blocks of lanes · blocks of rows,), rows fastest: the programs of most steps come first."""
    block_ptr = blocks_ptr + 4 * (tl.program_id(0) // blocks_m)
    rows = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_step, last_step = tl.load(block_ptr), tl.load(block_ptr + 1)
    lanes = tl.load(block_ptr + 2) + tl.arange(0, BLOCK_L)
    mask_m = (rows < n_rows)[:, None]
    mask_l = lanes < tl.load(block_ptr + 3)
    bands_ptrs = bands_ptr + row_offsets(rows, T, stride_bands_b, stride_bands_t)[:, None]
    PADDED: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    total = _sum_of_steps(
        bands_ptrs, packed_ptr, steps_ptr, lanes, mask_m, first_step, last_step, stride_bands_k,
        N, PADDED, PRECISION, BLOCK_M, BLOCK_L, BLOCK_N, False,
    )  # fmt: skip
    if tl.max(tl.where(total - total == 0, 0, 1)) > 0:  # once more with care, in small parts: registers are few
        total = _sum_of_steps(
            bands_ptrs, packed_ptr, steps_ptr, lanes, mask_m, first_step, last_step, stride_bands_k,
            N, PADDED, PRECISION, BLOCK_M, BLOCK_L, 16, True,
        )  # fmt: skip
    if bias_sum_ptr is not None:
        total += tl.load(bias_sum_ptr + lanes, mask=mask_l, other=0.0)[None, :]
    if window_ptr is not None:
        # the inverse of 64 numbers, not 8192 quotients; those would take the two registers that halve resident programs
        total *= 1 / tl.load(window_ptr + lanes // CHANNELS, mask=mask_l, other=1.0).to(tl.float32)[None, :]
    offs = lane_offsets(lanes, stride_spectrum_f, stride_spectrum_c, CHANNELS, FLAT, INDEX_INT64)
    spectrum_ptrs = spectrum_ptr + row_offsets(rows, T, stride_spectrum_b, stride_spectrum_t)[:, None] + offs[None, :]
    tl.store(spectrum_ptrs, round_to(total, spectrum_ptr.dtype.element_ty), mask=mask_m & mask_l[None, :])


def to_bins(
    bands: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, spectrum: Tensor, plan: Plan,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Fills spectrum (B, F, T, I).

    bands: N adjacent. weight: (K, N, lanes) by strides. window (F,) and bias (K, lanes) contiguous. dtype: of the
    product's operands.
    """
    batch, features, length, _ = bands.shape
    chosen = config.to_bins(features, bands, dtype)
    n_rows, n_blocks = batch * length, plan.blocks.shape[0]
    blocks_m = cdiv(n_rows, chosen["BLOCK_M"])
    if plan.steps.shape[0] == 0:  # no band has a bin
        bias = None
    bias_sum = None
    if bias is not None:
        bias_sum = torch.empty(spectrum.shape[1] * spectrum.shape[3], dtype=torch.float32, device=bands.device)
    packed = pack_weight(weight, plan.steps, chosen, dtype, bias, plan.blocks, bias_sum)
    launch(
        _to_bins_kernel, (blocks_m * n_blocks,), chosen, like=bands,
        **of_bands(bands), **of_spectrum(spectrum),
        packed_ptr=packed, bias_sum_ptr=bias_sum, window_ptr=window,
        blocks_ptr=plan.blocks, steps_ptr=plan.steps,
        n_rows=n_rows, blocks_m=blocks_m,
        N=features, PRECISION=config.precision(dtype),
    )  # fmt: skip
