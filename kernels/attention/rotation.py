"""Rotation of a long sequence's q and k, once, instead of each key in every block of queries that sees it.

Bytes: 2·T·C elements read and written, and half as many of the float32 table.
"""

from functools import lru_cache

from torch import Tensor

from fastblocks.kernels.attention.config import Plan
from fastblocks.kernels.attention.tiles import load_rotated, numbers_of, program_of, store_rows
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit
def _rotate_kernel(
    qkv_ptr, rope_ptr, rotated_ptr, stride_qkv_b, stride_qkv_t, n_tokens, n_registers, n_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """q and k of the tokens, rotated, to rotated (B, T, 2C). grid (B · 2H · blocks of tokens,), blocks fastest."""
    block, _, b, h = program_of(tl.cdiv(n_tokens, BLOCK_M), 2 * n_head)
    start = block * BLOCK_M
    stride_out = 2 * n_head * HEAD_DIM
    offs = tl.arange(0, BLOCK_M)
    qkv_ptr += b * stride_qkv_b + start.to(tl.int64) * stride_qkv_t + h * HEAD_DIM
    rotated_ptr += (b * n_tokens + start) * stride_out + h * HEAD_DIM
    rope_ptr += (n_registers + start).to(tl.int64) * HEAD_DIM
    x = load_rotated(qkv_ptr, rope_ptr, offs, n_tokens - start, stride_qkv_t, HEAD_DIM, BLOCK_D)
    store_rows(rotated_ptr, x, offs, n_tokens - start, stride_out, HEAD_DIM, BLOCK_D)


@lru_cache(maxsize=1024)
def _launch(plan: Plan, batch: int, n_head: int, qkv: tuple[int, ...]) -> Prepared:
    config = plan.configs["rotate"]
    grid = (batch * 2 * n_head * cdiv(plan.n_tokens, config["BLOCK_M"]),)
    return Prepared(_rotate_kernel, grid, config, **numbers_of(plan, n_head, qkv=qkv))


def rotate_tokens(qkv: Tensor, rotated: Tensor, rope: Tensor, n_head: int, plan: Plan) -> None:
    """Fills rotated (B, T, 2C) with the tokens' q and k, rotated."""
    prepared = _launch(plan, qkv.shape[0], n_head, qkv.stride())
    prepared(qkv, qkv_ptr=qkv, rope_ptr=rope, rotated_ptr=rotated)
