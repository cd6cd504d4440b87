"""Gradients of products' weights over rows, ∂W = ∂outᵀ x, as partial sums of slabs of rows.

∂out (N, M) and x (N, C) contiguous; a program takes BLOCK_N rows of W and every slab-th tile of rows. The partial sums
are float32, added up in a fixed order by `pack.unpack`. One product is qkv's or the output's; where the hidden units'
gradients were stored, all products behind the attention or a recurrence stand side by side in one grid.
Bytes an element of (N, C): 2 + 2M/C, and 8 · slabs · M / N for partial sums; FLOPs 2M.
Predicted (not measured), N 72192, C 128, M 384, H100: 30 µs, the memory's floor.
"""

from functools import lru_cache

from torch import Tensor

from fastblocks.kernels.blocks import config
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import architecture, cdiv, power_of_two, tl, triton


@triton.jit
def _sum_of_products(
    grad_out_ptr, x_ptr, partial_ptr, block, n_rows, stride_slab,
    C: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of rows of W: tiles of x's rows are dealt to slabs, the programs of axis 0, in turn."""
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
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


@triton.jit
def _linear_grad_weight_kernel(
    grad_out_ptr, x_ptr, partial_ptr,
    n_rows,
    stride_slab,
    C: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (slabs, blocks of OUT)."""
    _sum_of_products(
        grad_out_ptr, x_ptr, partial_ptr, tl.program_id(1), n_rows, stride_slab, C, OUT, BLOCK_M, BLOCK_N, BLOCK_C
    )


@triton.jit
def _block_grad_weight_kernel(
    grad_gate_up_ptr, normalized_ptr, hidden_ptr, grad_y_ptr, grad_m_ptr, addend_ptr, partial_ptr,
    n_rows,
    stride_slab,
    C: tl.constexpr, F_PAD: tl.constexpr, HAS_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (slabs, blocks of 2F', of F' and, if HAS_PRODUCT, of C): the weights of gate and up, down, out. partial:
    out's, if HAS_PRODUCT, then the others."""
    GATE_UP: tl.constexpr = (2 * F_PAD + BLOCK_N - 1) // BLOCK_N  # Triton 3.6 has no cdiv of constants
    DOWN: tl.constexpr = (F_PAD + BLOCK_N - 1) // BLOCK_N
    OUT: tl.constexpr = C if HAS_PRODUCT else 0
    block = tl.program_id(1)
    if block < GATE_UP:
        _sum_of_products(
            grad_gate_up_ptr, normalized_ptr, partial_ptr + OUT * C, block, n_rows, stride_slab, C, 2 * F_PAD, BLOCK_M,
            BLOCK_N, BLOCK_C,
        )  # fmt: skip
    elif block < GATE_UP + DOWN:
        _sum_of_products(
            hidden_ptr, grad_y_ptr, partial_ptr + (OUT + 2 * F_PAD) * C, block - GATE_UP, n_rows, stride_slab, C, F_PAD,
            BLOCK_M, BLOCK_N, BLOCK_C,
        )  # fmt: skip
    elif HAS_PRODUCT:
        _sum_of_products(
            grad_m_ptr, addend_ptr, partial_ptr, block - GATE_UP - DOWN, n_rows, stride_slab, C, C, BLOCK_M, BLOCK_N,
            BLOCK_C,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _linear_launch(
    n_rows: int, channels: int, outputs: int, slabs: int, stride_slab: int, architecture: str
) -> Prepared:
    chosen = config.of_kernel("linear_grad_weight", architecture, channels)
    if outputs <= chosen["BLOCK_N"]:  # in one block a third of the SMs would have a program: 33 µs instead of 22
        chosen = chosen.with_(BLOCK_N=max(16, power_of_two(outputs) // 2))
    grid = (slabs, cdiv(outputs, chosen["BLOCK_N"]))
    return Prepared(
        _linear_grad_weight_kernel, grid, chosen, n_rows=n_rows, stride_slab=stride_slab, C=channels, OUT=outputs
    )


@lru_cache(maxsize=1024)
def _block_launch(
    n_rows: int, channels: int, padded: int, product: bool, slabs: int, stride_slab: int, architecture: str
) -> Prepared:
    chosen = config.of_kernel("linear_grad_weight", architecture, channels)
    blocks = sum(cdiv(rows, chosen["BLOCK_N"]) for rows in (2 * padded, padded, channels if product else 0))
    return Prepared(
        _block_grad_weight_kernel, (slabs, blocks), chosen, n_rows=n_rows, stride_slab=stride_slab, C=channels,
        F_PAD=padded, HAS_PRODUCT=product,
    )  # fmt: skip


def grad_weight(grad_out: Tensor, x: Tensor, partial: Tensor) -> None:
    """Fills partial (slabs, M · C), float32, any stride between slabs, from grad_out (…, M) and x (…, C)."""
    channels = x.shape[-1]
    prepared = _linear_launch(
        x.numel() // channels, channels, grad_out.shape[-1], partial.shape[0], partial.stride(0), architecture(x.device)
    )
    prepared(x, grad_out_ptr=grad_out, x_ptr=x, partial_ptr=partial)


def grad_weights(
    grad_gate_up: Tensor, normalized: Tensor, hidden: Tensor, grad_y: Tensor, grad_m: Tensor | None,
    addend: Tensor | None, partial: Tensor,
) -> None:  # fmt: skip
    """Fills partial, float32, any stride between slabs: (slabs, 3F' · C) from grad_gate_up (N, 2F'), normalized (N, C),
    hidden (N, F') and grad_y; with grad_m and addend (N, C) (slabs, (C + 3F') · C), the output product's first."""
    n_rows, channels = normalized.shape
    prepared = _block_launch(
        n_rows, channels, hidden.numel() // n_rows, grad_m is not None, partial.shape[0], partial.stride(0),
        architecture(normalized.device),
    )  # fmt: skip
    prepared(
        normalized, grad_gate_up_ptr=grad_gate_up, normalized_ptr=normalized, hidden_ptr=hidden, grad_y_ptr=grad_y,
        grad_m_ptr=grad_m, addend_ptr=addend, partial_ptr=partial,
    )  # fmt: skip
