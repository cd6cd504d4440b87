"""Gradient of a product's weight over rows, ∂W = ∂outᵀ x, as partial sums of slabs of rows.

∂out (N, M) and x (N, C) contiguous; a program takes BLOCK_N rows of W and every slab-th tile of rows. The partial sums
are float32, added up in a fixed order by `pack.unpack`.
Bytes an element of (N, C): 2 + 2M/C, and 8 · slabs · M / N for partial sums; FLOPs 2M.
Predicted (not measured), N 72192, C 128, M 384, H100: 30 µs, the memory's floor.
"""

from torch import Tensor

from fastblocks.kernels.blocks import config
from fastblocks.kernels.launch import launch
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import cdiv, power_of_two, tl, triton


@triton.jit
def _linear_grad_weight_kernel(
    grad_out_ptr, x_ptr, partial_ptr,
    n_rows,
    stride_slab,
    C: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (slabs, blocks of OUT): tiles of rows are dealt to slabs in turn."""
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    mask_n = offs_n < OUT
    mask_c = offs_c < C
    offs_x = offs_m[:, None] * C + offs_c[None, :]
    offs_out = offs_m[:, None] * OUT + offs_n[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        start_m = tl.full([], BLOCK_M, tl.int64) * tile
        mask_m = (start_m + offs_m < n_rows)[:, None]
        x = tl.load(x_ptr + start_m * C + offs_x, mask=mask_m & mask_c[None, :], other=0.0)
        grad_out = tl.load(grad_out_ptr + start_m * OUT + offs_out, mask=mask_m & mask_n[None, :], other=0.0)
        total = dot(tl.trans(round_to(grad_out, x.dtype)), x, "ieee", total)
    partial_ptr += tl.program_id(0).to(tl.int64) * stride_slab
    offs = offs_n[:, None] * C + offs_c[None, :]
    tl.store(partial_ptr + offs, total, mask=mask_n[:, None] & mask_c[None, :])


def grad_weight(grad_out: Tensor, x: Tensor, partial: Tensor) -> None:
    """Fills partial (slabs, M, C), float32, any stride between slabs."""
    n_rows, channels = x.shape
    outputs = grad_out.shape[1]
    chosen = config.launch_config("linear_grad_weight", grad_out, x)
    if outputs <= chosen["BLOCK_N"]:  # in one block a third of the SMs would have a program: 33 µs instead of 22
        chosen = chosen.with_(BLOCK_N=max(16, power_of_two(outputs) // 2))
    launch(
        _linear_grad_weight_kernel, (partial.shape[0], cdiv(outputs, chosen["BLOCK_N"])), chosen, like=x,
        grad_out_ptr=grad_out, x_ptr=x, partial_ptr=partial,
        n_rows=n_rows,
        stride_slab=partial.stride(0),
        C=channels, OUT=outputs,
    )  # fmt: skip
