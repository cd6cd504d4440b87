"""From bands to a spectrum, overlapping bands added up: the unsplit, and the gradient behind the split.

    spectrum[b, f, t, c] = Σ_k (bands[b, :, t, k] W_k + bias_k)[lane (f, c) of k] / window[f]

over the bands k that have the bin f, in ascending order; zero where there is none. Window and bias are
optional. bands (B, N, T, K) with adjacent
features, float32 or 16 bits; W_k (N, lanes) by strides, as it lies in the state_dict; spectrum (B, F, T, I) of any
strides. A program takes BLOCK_M rows (b, t) and a block of lanes, and loops over the bands that the block touches: it
owns its bins, so that nothing is added in memory.

Bytes: bands once, and again from L2 for each further block that a band reaches into; the spectrum once.
FLOPs 2 · B · T · lanes · N, several times that on the tensor cores where bands are narrower than a block.
"""

from torch import Tensor

from fastblocks.kernels.bands import config
from fastblocks.kernels.bands.plan import Plan
from fastblocks.kernels.bands.spectrum import lane_offsets, of_bands, of_spectrum, row_offsets
from fastblocks.kernels.launch import launch
from fastblocks.kernels.matrix import strides
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit
def _to_bins_kernel(
    bands_ptr, weight_ptr, bias_ptr, window_ptr, spectrum_ptr, blocks_ptr, steps_ptr,
    n_rows, T, n_blocks,
    stride_bands_b, stride_bands_t, stride_bands_k,
    stride_weight_k, stride_weight_n, stride_weight_l, stride_bias_k,
    stride_spectrum_b, stride_spectrum_t, stride_spectrum_f, stride_spectrum_c,
    N: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr, INDEX_INT64: tl.constexpr,
    DTYPE: tl.constexpr,  # of the product's operands
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grid (blocks of rows · blocks of lanes,), blocks of lanes fastest."""
    block_ptr = blocks_ptr + 4 * (tl.program_id(0) % n_blocks)
    rows = tl.program_id(0) // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.load(block_ptr + 2) + tl.arange(0, BLOCK_L)
    mask_m = (rows < n_rows)[:, None]
    mask_block = lanes < tl.load(block_ptr + 3)
    bands_ptrs = bands_ptr + row_offsets(rows, T, stride_bands_b, stride_bands_t)[:, None]
    PARTS: tl.constexpr = tl.cdiv(N, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    for step in range(tl.load(block_ptr) * PARTS, tl.load(block_ptr + 1) * PARTS):
        step_ptr = steps_ptr + step // PARTS * 4
        k = tl.load(step_ptr).to(tl.int64)
        first = tl.load(step_ptr + 1)
        mask_l = mask_block & (lanes >= first) & (lanes < tl.load(step_ptr + 2))
        offs_l = lanes - first
        offs_n = step % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        x = tl.load(bands_ptrs + (k * stride_bands_k + offs_n)[None, :], mask=mask_m & mask_n[None, :], other=0.0)
        offs_w = offs_n[:, None] * stride_weight_n + offs_l[None, :] * stride_weight_l
        weight = tl.load(
            weight_ptr + k * stride_weight_k + offs_w, mask=mask_n[:, None] & mask_l[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_L]
        part = dot(round_to(x, DTYPE), round_to(weight, DTYPE), PRECISION)
        if bias_ptr is not None:
            mask_bias = mask_l & (step % PARTS == 0)
            part += tl.load(bias_ptr + k * stride_bias_k + offs_l, mask=mask_bias, other=0.0).to(tl.float32)[None, :]
        total += tl.where(mask_l[None, :], part, 0.0)  # Inf · 0 of a band stays out of bins that it does not have
    if window_ptr is not None:
        total /= tl.load(window_ptr + lanes // CHANNELS, mask=mask_block, other=1.0).to(tl.float32)[None, :]
    offs = lane_offsets(lanes, stride_spectrum_f, stride_spectrum_c, CHANNELS, FLAT, INDEX_INT64)
    spectrum_ptrs = spectrum_ptr + row_offsets(rows, T, stride_spectrum_b, stride_spectrum_t)[:, None] + offs[None, :]
    tl.store(spectrum_ptrs, round_to(total, spectrum_ptr.dtype.element_ty), mask=mask_m & mask_block[None, :])


def to_bins(
    bands: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, spectrum: Tensor, plan: Plan, product
) -> None:
    """Fills spectrum (B, F, T, I).

    bands: N adjacent. weight: (K, N, lanes) by strides. window (F,) and bias (K, lanes) contiguous. product:
    `config.product`'s answer.
    """
    batch, features, length, _ = bands.shape
    chosen = config.to_bins(features)
    n_rows, n_blocks = batch * length, plan.blocks.shape[0]
    launch(
        _to_bins_kernel, (cdiv(n_rows, chosen["BLOCK_M"]) * n_blocks,), chosen, like=bands,
        **of_bands(bands), **of_spectrum(spectrum),
        weight_ptr=weight, bias_ptr=bias, window_ptr=window, blocks_ptr=plan.blocks, steps_ptr=plan.steps,
        n_rows=n_rows, n_blocks=n_blocks,
        **strides("weight", weight, "knl"), stride_bias_k=0 if bias is None else bias.stride(0),
        N=features, **product,
    )  # fmt: skip
