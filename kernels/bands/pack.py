"""Weights of bands as the products read them: tiles in the product's dtype, aligned, with zeros outside of the band.

As they lie, with odd rows and in float32, every number would be a load and a conversion of its own, in every program.

Bytes: the bands' weights read once, lanes · N · (1 to 2) written (2 MB at 64 mel bands of 128 features).
"""

import torch
from torch import Tensor

from fastblocks.kernels.bands import config
from fastblocks.kernels.launch import LaunchConfig, launch
from fastblocks.kernels.matrix import strides
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit
def _pack_weight_kernel(
    weight_ptr, bias_ptr, packed_ptr, packed_bias_ptr, table_ptr,
    stride_weight_k, stride_weight_n, stride_weight_l, stride_bias_k,
    N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Rows of one tile (PADDED, BLOCK_L), and its lanes' biases (BLOCK_L,). grid (tiles, PADDED // BLOCK_R).

    table (tiles, 4): band, its first lane, first lane of the tile, one past the last. PADDED: N up to a multiple of a
    product's tile.
    """
    table_ptr += 4 * tl.program_id(0)
    k = tl.load(table_ptr).to(tl.int64)
    first = tl.load(table_ptr + 1)
    offs_l = tl.arange(0, BLOCK_L)
    lanes = tl.load(table_ptr + 2) + offs_l
    mask_l = (lanes >= first) & (lanes < tl.load(table_ptr + 3))
    offs_n = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = offs_n.to(tl.int64)[:, None] * stride_weight_n + (lanes - first).to(tl.int64)[None, :] * stride_weight_l
    weight = tl.load(
        weight_ptr + k * stride_weight_k + offs, mask=(offs_n < N)[:, None] & mask_l[None, :], other=0.0
    )  # [BLOCK_R, BLOCK_L]
    tile = tl.program_id(0).to(tl.int64)
    offs = offs_n[:, None] * BLOCK_L + offs_l[None, :]
    tl.store(packed_ptr + tile * (PADDED * BLOCK_L) + offs, round_to(weight, packed_ptr.dtype.element_ty))
    if bias_ptr is not None:
        if tl.program_id(1) == 0:
            bias = tl.load(bias_ptr + k * stride_bias_k + (lanes - first), mask=mask_l, other=0.0)
            tl.store(packed_bias_ptr + tile * BLOCK_L + offs_l, bias.to(tl.float32))


def pack_weight(
    weight: Tensor, bias: Tensor | None, table: Tensor, product: LaunchConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Returns tiles (tiles, N up to a multiple of BLOCK_N, BLOCK_L) in `dtype`, and biases (tiles, BLOCK_L) float32.

    weight: (K, N, lanes) by strides. bias: None, or (K, lanes) with adjacent lanes. table: a plan's pieces or steps.
    product: the configuration of the kernel that reads them.
    """
    tiles, features = table.shape[0], weight.shape[1]
    block_l, block_n = product["BLOCK_L"], product["BLOCK_N"]
    padded = cdiv(features, block_n) * block_n
    packed = torch.empty((tiles, padded, block_l), dtype=dtype, device=weight.device)
    packed_bias = None
    if bias is not None:
        packed_bias = torch.empty((tiles, block_l), dtype=torch.float32, device=weight.device)
    if tiles:
        chosen = config.pack_weight(block_l, block_n)
        launch(
            _pack_weight_kernel, (tiles, padded // chosen["BLOCK_R"]), chosen, like=weight,
            weight_ptr=weight, bias_ptr=bias, packed_ptr=packed, packed_bias_ptr=packed_bias, table_ptr=table,
            **strides("weight", weight, "knl"), stride_bias_k=0 if bias is None else bias.stride(0),
            N=features, PADDED=padded,
        )  # fmt: skip
    return packed, packed_bias
