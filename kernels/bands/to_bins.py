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
def _to_bins_kernel(
    bands_ptr, packed_ptr, packed_bias_ptr, window_ptr, spectrum_ptr, blocks_ptr, steps_ptr,
    n_rows, T, blocks_m,
    stride_bands_b, stride_bands_t, stride_bands_k,
    stride_spectrum_b, stride_spectrum_t, stride_spectrum_f, stride_spectrum_c,
    N: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr, INDEX_INT64: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grid (blocks of lanes · blocks of rows,), rows fastest: the programs of most steps come first."""
    block_ptr = blocks_ptr + 4 * (tl.program_id(0) // blocks_m)
    rows = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_l = tl.arange(0, BLOCK_L)
    lanes = tl.load(block_ptr + 2) + offs_l
    mask_m = (rows < n_rows)[:, None]
    mask_block = lanes < tl.load(block_ptr + 3)
    bands_ptrs = bands_ptr + row_offsets(rows, T, stride_bands_b, stride_bands_t)[:, None]
    PARTS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    offs_w = tl.arange(0, BLOCK_N)[:, None] * BLOCK_L + offs_l[None, :]
    first_step, last_step = tl.load(block_ptr), tl.load(block_ptr + 1)
    total = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    if packed_bias_ptr is not None:
        bias = tl.zeros([BLOCK_L], tl.float32)
        for start in range(first_step, last_step, 4):
            steps = start + tl.arange(0, 4)
            bias_ptrs = packed_bias_ptr + steps.to(tl.int64)[:, None] * BLOCK_L + offs_l[None, :]
            bias += tl.sum(tl.load(bias_ptrs, mask=(steps < last_step)[:, None], other=0.0), axis=0)
        total += bias[None, :]
    # What a step looks up is loaded one step ahead: the bands' addresses depend on it.
    k = tl.load(steps_ptr + 4 * first_step, mask=first_step < last_step, other=0)
    first = tl.load(steps_ptr + 4 * first_step + 1, mask=first_step < last_step, other=0)
    last = tl.load(steps_ptr + 4 * first_step + 3, mask=first_step < last_step, other=0)
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
        last = tl.load(steps_ptr + 4 * next_step + 3, mask=next_step < last_step, other=0)
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
    n_rows, n_blocks = batch * length, plan.blocks.shape[0]
    blocks_m = cdiv(n_rows, chosen["BLOCK_M"])
    packed, packed_bias = pack_weight(weight, bias, plan.steps, chosen, dtype)
    launch(
        _to_bins_kernel, (blocks_m * n_blocks,), chosen, like=bands,
        **of_bands(bands), **of_spectrum(spectrum),
        packed_ptr=packed, packed_bias_ptr=packed_bias, window_ptr=window,
        blocks_ptr=plan.blocks, steps_ptr=plan.steps,
        n_rows=n_rows, blocks_m=blocks_m,
        N=features, PRECISION=config.precision(dtype),
    )  # fmt: skip
