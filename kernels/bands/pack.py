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
    weight_ptr, bias_ptr, packed_ptr, bias_sum_ptr, table_ptr, blocks_ptr,
    n_blocks,
    stride_weight_k, stride_weight_n, stride_weight_l, stride_bias_k,
    N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Rows of one tile (PADDED, BLOCK_L), and of a block the lanes' sums of biases. grid (tiles, PADDED // BLOCK_R).

    table (tiles, 4): band, its first lane, first lane of the tile, one past the last. PADDED: N up to a multiple of a
    product's tile.
    """
    tile_ptr = table_ptr + 4 * tl.program_id(0)
    k = tl.load(tile_ptr).to(tl.int64)
    first = tl.load(tile_ptr + 1)
    offs_l = tl.arange(0, BLOCK_L)
    lanes = tl.load(tile_ptr + 2) + offs_l
    mask_l = (lanes >= first) & (lanes < tl.load(tile_ptr + 3))
    offs_n = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = offs_n.to(tl.int64)[:, None] * stride_weight_n + (lanes - first).to(tl.int64)[None, :] * stride_weight_l
    weight = tl.load(
        weight_ptr + k * stride_weight_k + offs, mask=(offs_n < N)[:, None] & mask_l[None, :], other=0.0
    )  # [BLOCK_R, BLOCK_L]
    tile = tl.program_id(0).to(tl.int64)
    offs = offs_n[:, None] * BLOCK_L + offs_l[None, :]
    tl.store(packed_ptr + tile * (PADDED * BLOCK_L) + offs, round_to(weight, packed_ptr.dtype.element_ty))
    if bias_ptr is not None:
        for block in range(tl.program_id(0) + tl.program_id(1) * n_blocks, n_blocks, tl.num_programs(0)):
            block_ptr = blocks_ptr + 4 * block
            lanes = tl.load(block_ptr + 2) + offs_l
            mask_l = lanes < tl.load(block_ptr + 3)
            last_step = tl.load(block_ptr + 1)
            bias = tl.zeros([BLOCK_L], tl.float32)
            for start in range(tl.load(block_ptr), last_step, 4):
                steps = start + tl.arange(0, 4)
                step_ptrs, mask = table_ptr + 4 * steps, steps < last_step
                bands = tl.load(step_ptrs, mask=mask, other=0).to(tl.int64)[:, None]
                begin = tl.load(step_ptrs + 1, mask=mask, other=0)[:, None]
                end = tl.load(step_ptrs + 3, mask=mask, other=0)[:, None]
                inside = (lanes[None, :] >= begin) & (lanes[None, :] < end) & mask_l[None, :]
                bias_ptrs = bias_ptr + (bands * stride_bias_k + (lanes[None, :] - begin))
                bias += tl.sum(tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32), axis=0)
            tl.store(bias_sum_ptr + lanes, bias, mask=mask_l)


def pack_weight(
    weight: Tensor, table: Tensor, product: LaunchConfig, dtype: torch.dtype,
    bias: Tensor | None = None, blocks: Tensor | None = None, bias_sum: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns tiles (tiles, N up to a multiple of BLOCK_N, BLOCK_L) in `dtype`, and fills `bias_sum`.

    weight: (K, N, lanes) by strides. table: a plan's pieces or steps. product: the configuration of the kernel that
    reads them. bias: None, or (K, lanes) with adjacent lanes, whose sums over bands `bias_sum` (all lanes,) gets in
    float32; `table` are the steps of `blocks` then.
    """
    tiles, features = table.shape[0], weight.shape[1]
    block_l, block_n = product["BLOCK_L"], product["BLOCK_N"]
    padded = cdiv(features, block_n) * block_n
    packed = torch.empty((tiles, padded, block_l), dtype=dtype, device=weight.device)
    if tiles:
        chosen = config.pack_weight(block_l, block_n)
        launch(
            _pack_weight_kernel, (tiles, padded // chosen["BLOCK_R"]), chosen, like=weight,
            weight_ptr=weight, bias_ptr=bias, packed_ptr=packed, bias_sum_ptr=bias_sum,
            table_ptr=table, blocks_ptr=blocks, n_blocks=0 if blocks is None else blocks.shape[0],
            **strides("weight", weight, "knl"), stride_bias_k=0 if bias is None else bias.stride(0),
            N=features, PADDED=padded,
        )  # fmt: skip
    return packed
