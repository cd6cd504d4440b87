"""The second stage of a sum over positions: adds the programs' partial sums, one row each, in a fixed order."""

from functools import lru_cache

from torch import Tensor

from fastblocks.kernels.launch import Prepared, config
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.runtime import cdiv, tl, triton

SUM_ROWS = config(4, BLOCK_S=32, BLOCK_N=128)  # 32 loads per thread in flight


@triton.jit
def _sum_rows_kernel(
    partial_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr,
    rows,
    END0: tl.constexpr, END1: tl.constexpr, END2: tl.constexpr, END3: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums partial (rows, END3) float32 over its rows in order; columns [END0, END1) go to out1, and so on.

    END0 … END3: where each output's columns end; an unused output is empty. grid (blocks of columns,).
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_S):
        offs = (start + offs_s).to(tl.int64)[:, None] * END3 + offs_n[None, :]
        total += tl.load(
            partial_ptr + offs, mask=(start + offs_s < rows)[:, None] & (offs_n < END3)[None, :], other=0.0
        )
    result = tl.sum(total, axis=0)
    tl.store(out0_ptr + offs_n, round_to(result, out0_ptr.dtype.element_ty), mask=offs_n < END0)
    if END1 > END0:
        mask = (offs_n >= END0) & (offs_n < END1)
        tl.store(out1_ptr + offs_n - END0, round_to(result, out1_ptr.dtype.element_ty), mask=mask)
    if END2 > END1:
        mask = (offs_n >= END1) & (offs_n < END2)
        tl.store(out2_ptr + offs_n - END1, round_to(result, out2_ptr.dtype.element_ty), mask=mask)
    if END3 > END2:
        mask = (offs_n >= END2) & (offs_n < END3)
        tl.store(out3_ptr + offs_n - END2, round_to(result, out3_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def _sum_rows_launch(rows: int, *sizes: int) -> Prepared:
    ends = {f"END{i}": sum(sizes[: i + 1]) for i in range(4)}
    return Prepared(_sum_rows_kernel, (cdiv(ends["END3"], SUM_ROWS["BLOCK_N"]),), SUM_ROWS, rows=rows, **ends)


def sum_rows(partial: Tensor, outs: list[Tensor]) -> None:
    """Sums `partial` (rows, columns) over its rows; consecutive columns fill `outs`, 1 to 4 contiguous tensors."""
    prepared = _sum_rows_launch(partial.shape[0], *[out.numel() for out in outs])
    out0, out1, out2, out3 = (*outs, None, None, None)[:4]
    prepared(partial, partial_ptr=partial, out0_ptr=out0, out1_ptr=out1, out2_ptr=out2, out3_ptr=out3)
