"""From a spectrum to bands, one product a band on the band's lanes: the split, and the gradient behind the unsplit.

    bands[b, :, t, k] = spectrum[b, lanes of k, t] / window W_k + bias_k            window, bias: optional

spectrum (B, F, T, I) of any strides, float32 or 16 bits; bands (B, N, T, K) with adjacent features; W_k (lanes, N) by
strides. A program takes BLOCK_M rows (b, t) and one band, and loops over the band's lanes: nothing of the spectrum is
padded or gathered in memory, and lanes past a band's end are not read. The weights are packed first, a tile for each
BLOCK_L lanes of a band.

Bytes: the spectrum once, a second time from L2 where bands overlap; bands once. FLOPs 2 · B · T · lanes · N.
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
def _to_bands_kernel(
    spectrum_ptr, window_ptr, packed_ptr, bias_ptr, bands_ptr, order_ptr,
    n_rows, T, blocks_m,
    stride_spectrum_b, stride_spectrum_t, stride_spectrum_f, stride_spectrum_c,
    stride_bands_b, stride_bands_t, stride_bands_k,
    N: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr, INDEX_INT64: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grid (K · blocks of rows, blocks of N), rows fastest: the programs of the widest band come first."""
    order_ptr += 4 * (tl.program_id(0) // blocks_m)
    k = tl.load(order_ptr)
    first = tl.load(order_ptr + 1)
    lanes = tl.load(order_ptr + 2)
    PADDED: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    packed_ptr += tl.load(order_ptr + 3).to(tl.int64) * (PADDED * BLOCK_L)
    rows = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = (rows < n_rows)[:, None]
    mask_n = (offs_n < N)[None, :]
    spectrum_ptrs = spectrum_ptr + row_offsets(rows, T, stride_spectrum_b, stride_spectrum_t)[:, None]
    packed_ptrs = packed_ptr + (tl.arange(0, BLOCK_L)[:, None] + offs_n[None, :] * BLOCK_L)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, lanes, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        mask_l = offs_l < lanes
        offs = lane_offsets(first + offs_l, stride_spectrum_f, stride_spectrum_c, CHANNELS, FLAT, INDEX_INT64)
        x = tl.load(spectrum_ptrs + offs[None, :], mask=mask_m & mask_l[None, :], other=0.0)  # [BLOCK_M, BLOCK_L]
        if window_ptr is not None:
            window = tl.load(window_ptr + (first + offs_l) // CHANNELS, mask=mask_l, other=1.0).to(tl.float32)
            x = x.to(tl.float32) / window[None, :]
        weight = tl.load(packed_ptrs)  # [BLOCK_L, BLOCK_N]
        packed_ptrs += PADDED * BLOCK_L
        total = dot(round_to(x, weight.dtype), weight, PRECISION, total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + k * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    bands_ptrs = bands_ptr + k.to(tl.int64) * stride_bands_k
    bands_ptrs += row_offsets(rows, T, stride_bands_b, stride_bands_t)[:, None] + offs_n[None, :]
    tl.store(bands_ptrs, round_to(total, bands_ptrs.dtype.element_ty), mask=mask_m & mask_n)


def to_bands(
    spectrum: Tensor, window: Tensor | None, weight: Tensor, bias: Tensor | None, bands: Tensor, plan: Plan,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Fills bands (B, N, T, K), N adjacent.

    weight: (K, N, lanes) by strides. window (F,) and bias (K, N) contiguous. dtype: of the product's operands.
    """
    batch, features, length, n_bands = bands.shape
    chosen = config.to_bands(features)
    n_rows = batch * length
    blocks_m = cdiv(n_rows, chosen["BLOCK_M"])
    packed = pack_weight(weight, plan.pieces, chosen, dtype)
    launch(
        _to_bands_kernel, (n_bands * blocks_m, cdiv(features, chosen["BLOCK_N"])), chosen, like=spectrum,
        **of_spectrum(spectrum), **of_bands(bands),
        window_ptr=window, packed_ptr=packed, bias_ptr=bias, order_ptr=plan.order,
        n_rows=n_rows, blocks_m=blocks_m,
        N=features, PRECISION=config.precision(dtype),
    )  # fmt: skip
