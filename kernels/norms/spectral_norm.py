"""Spectral normalization of many weights at once, after one power iteration each.

    v = Wᵀu / max(‖Wᵀu‖, eps),   p = W v,   u = p / max(‖p‖, eps),   σ = uᵀp,   out = W / σ
    grad_W = (grad_out − ⟨grad_out, out⟩ u vᵀ) / σ                   u and v are constants

W (O, N) is a weight seen as a matrix. Without an iteration (evaluation) u and v stay as they are, and p = W v. Weights,
u and v are read, and u and v written, where they lie (tables.py). Kept for backward: out, and u, v and σ as they
were used, because the next forward changes the buffers. Everything is computed in float32; u and v are used as they are
rounded to their dtype.

Three launches forward, two without an iteration, and two backward after the gradients are put into one tensor. Bytes,
in sizes of the weights: forward 4 (W thrice, out once), backward 4 (grad_out twice, out, grad_W), and 2 for that
tensor. Predicted for an H100 (not measured), the 41 million float32 weights of a MultiPeriodDiscriminator: forward
258 µs (1.2 × floor), backward 219, and 110 for the tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastblocks.kernels.launch import launch
from fastblocks.kernels.norms import config, tables
from fastblocks.kernels.norms.tables import FIELDS, Norm, Table, layer_of, products_of_rows, sum_between, tile_of
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.runtime import tl, triton

__all__ = ["rehearse", "spectral_norm", "unsupported_reason"]

COLUMN_TILE, ROW_TILE = tl.constexpr(9), tl.constexpr(10)  # fields of the table


@triton.jit
def _spectral_columns_kernel(
    table_ptr, w_ptr, u_ptr, product_ptr, squares_ptr,
    layers,
    BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """product = Wᵀu and its sum of squares by tile of columns. grid (tiles of columns,)."""
    tile = tl.program_id(0)
    _, row_ptr, column_tile = layer_of(table_ptr, tile, COLUMN_TILE, layers, BLOCK_L)
    w_ptr += tl.load(row_ptr)
    u_ptr += tl.load(row_ptr + 1)
    rows, columns = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
    offs_n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    total = tl.zeros([BLOCK_O, BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_O):
        offs_o = start + tl.arange(0, BLOCK_O)
        mask_o = offs_o < rows
        u = tl.load(u_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)
        offs = offs_o[:, None] * columns + offs_n[None, :]
        w = tl.load(w_ptr + offs, mask=mask_o[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
        total += w * u[:, None]
    product = tl.sum(total, axis=0)
    tl.store(product_ptr + tl.load(row_ptr + 8) + offs_n, product, mask=mask_n)
    tl.store(squares_ptr + tile, tl.sum(product * product, axis=0))


@triton.jit
def _spectral_rows_kernel(
    table_ptr, w_ptr, v_ptr, product_ptr, squares_ptr, v_out_ptr, p_ptr,
    layers, eps,
    ITERATE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """v = product / its norm, p = W v; without ITERATE v is the one at its address. grid (tiles of rows,); a weight's
    first program writes v, where nobody reads it any more."""
    _, row_ptr, row_tile = layer_of(table_ptr, tl.program_id(0), ROW_TILE, layers, BLOCK_L)
    w_ptr += tl.load(row_ptr)
    v_ptr += tl.load(row_ptr + 2)
    rows, columns = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
    at_v = tl.load(row_ptr + 8)
    norm = 1.0
    if ITERATE:
        first, last = tl.load(row_ptr + COLUMN_TILE).to(tl.int32), tl.load(row_ptr + FIELDS + COLUMN_TILE).to(tl.int32)
        norm = tl.maximum(tl.sqrt_rn(sum_between(squares_ptr, first, last, False, BLOCK_N)), eps)
    total = tl.zeros([BLOCK_O, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < columns
        if ITERATE:
            product = tl.load(product_ptr + at_v + offs_n, mask=mask_n, other=0.0)
            v = round_to(tl.div_rn(product, norm), v_out_ptr.dtype.element_ty)
            tl.store(v_ptr + offs_n, v, mask=mask_n & (row_tile == 0))
        else:
            v = tl.load(v_ptr + offs_n, mask=mask_n, other=0.0)
        tl.store(v_out_ptr + at_v + offs_n, v, mask=mask_n & (row_tile == 0))
        offs, mask = tile_of(row_tile, start, rows, columns, BLOCK_O, BLOCK_N)
        w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        total += w * v.to(tl.float32)[None, :]
    offs_o = row_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    tl.store(p_ptr + tl.load(row_ptr + 7) + offs_o, tl.sum(total, axis=1), mask=offs_o < rows)


@triton.jit
def _spectral_divide_kernel(
    table_ptr, w_ptr, u_ptr, p_ptr, u_out_ptr, sigma_ptr, out_ptr,
    layers, eps,
    ITERATE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """u = p / its norm, σ = uᵀp, out = W / σ. grid (tiles of rows,); a weight's first program writes u and σ."""
    layer, row_ptr, row_tile = layer_of(table_ptr, tl.program_id(0), ROW_TILE, layers, BLOCK_L)
    w_ptr += tl.load(row_ptr)
    u_ptr += tl.load(row_ptr + 1)
    rows, columns = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
    at_u = tl.load(row_ptr + 7)
    norm = 1.0
    if ITERATE:
        norm = tl.maximum(tl.sqrt_rn(sum_between(p_ptr + at_u, 0, rows, True, BLOCK_N)), eps)
    products = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        mask = offs < rows
        p = tl.load(p_ptr + at_u + offs, mask=mask, other=0.0)
        if ITERATE:
            u = round_to(tl.div_rn(p, norm), u_out_ptr.dtype.element_ty)
            tl.store(u_ptr + offs, u, mask=mask & (row_tile == 0))
        else:
            u = tl.load(u_ptr + offs, mask=mask, other=0.0)
        tl.store(u_out_ptr + at_u + offs, u, mask=mask & (row_tile == 0))
        products += p * u.to(tl.float32)
    sigma = tl.sum(products, axis=0)
    tl.store(sigma_ptr + layer, sigma, mask=row_tile == 0)
    out_ptr += tl.load(row_ptr + 5)
    for start in range(0, columns, BLOCK_N):
        offs, mask = tile_of(row_tile, start, rows, columns, BLOCK_O, BLOCK_N)
        w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, round_to(tl.div_rn(w, sigma), out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _spectral_along_kernel(
    table_ptr, grad_ptr, out_ptr, along_ptr,
    layers,
    BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """along = Σ grad_out · out by tile of rows. grid (tiles of rows,)."""
    tile = tl.program_id(0)
    _, row_ptr, row_tile = layer_of(table_ptr, tile, ROW_TILE, layers, BLOCK_L)
    rows, columns = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
    out_ptr += tl.load(row_ptr + 5)
    grad_ptr += tl.load(row_ptr + 6)
    products = products_of_rows(grad_ptr, out_ptr, row_tile, rows, columns, BLOCK_O, BLOCK_N)
    tl.store(along_ptr + tile, tl.sum(products, axis=0))


@triton.jit
def _spectral_backward_kernel(
    table_ptr, grad_ptr, along_ptr, u_ptr, v_ptr, sigma_ptr,
    layers,
    BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad = (grad − along · u vᵀ) / σ, in place. grid (tiles of rows,)."""
    layer, row_ptr, row_tile = layer_of(table_ptr, tl.program_id(0), ROW_TILE, layers, BLOCK_L)
    rows, columns = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
    first, last = tl.load(row_ptr + ROW_TILE).to(tl.int32), tl.load(row_ptr + FIELDS + ROW_TILE).to(tl.int32)
    along, sigma = sum_between(along_ptr, first, last, False, BLOCK_N), tl.load(sigma_ptr + layer)
    grad_ptr += tl.load(row_ptr + 6)
    offs_o = row_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    u = along * tl.load(u_ptr + tl.load(row_ptr + 7) + offs_o, mask=offs_o < rows, other=0.0).to(tl.float32)
    v_ptr += tl.load(row_ptr + 8)
    for start in range(0, columns, BLOCK_N):
        offs, mask = tile_of(row_tile, start, rows, columns, BLOCK_O, BLOCK_N)
        offs_n = start + tl.arange(0, BLOCK_N)
        v = tl.load(v_ptr + offs_n, mask=offs_n < columns, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32) - u[:, None] * v[None, :]
        tl.store(grad_ptr + offs, round_to(tl.div_rn(grad, sigma), grad_ptr.dtype.element_ty), mask=mask)


def run(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], n_power_iterations: int, eps: float):
    """The normalized weights, the table, and what backward and formula need."""
    table, iterate = tables.table_of(weights, us, vs), n_power_iterations > 0
    device, out = weights[0].device, table.allocate(weights[0])
    u = torch.empty(sum(table.heights), dtype=us[0].dtype, device=device)
    v = torch.empty(sum(table.widths), dtype=vs[0].dtype, device=device)
    sigma, p = (torch.empty(n, dtype=torch.float32, device=device) for n in (table.layers, sum(table.heights)))
    product = squares = None
    constants = table.constants()
    if iterate:
        product, squares = (
            torch.empty(n, dtype=torch.float32, device=device) for n in (sum(table.widths), table.column_tiles)
        )
        launch(
            _spectral_columns_kernel, (table.column_tiles,), config.COLUMNS, like=out,
            w_ptr=weights[0], u_ptr=us[0], product_ptr=product, squares_ptr=squares, **constants,
        )  # fmt: skip
    launch(
        _spectral_rows_kernel, (table.row_tiles,), config.ROWS, like=out,
        w_ptr=weights[0], v_ptr=vs[0], product_ptr=product, squares_ptr=squares, v_out_ptr=v, p_ptr=p,
        eps=eps, ITERATE=iterate, **constants,
    )  # fmt: skip
    launch(
        _spectral_divide_kernel, (table.row_tiles,), config.ROWS, like=out,
        w_ptr=weights[0], u_ptr=us[0], p_ptr=p, u_out_ptr=u, sigma_ptr=sigma, out_ptr=out,
        eps=eps, ITERATE=iterate, **constants,
    )  # fmt: skip
    return table.views(out), table, (out, u, v, sigma)


def backward(grad: Tensor, table: Table, weights, out: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> list[Tensor]:
    """The weights' gradients, in place of `grad`, those of the results in one tensor."""
    along = torch.empty(table.row_tiles, dtype=torch.float32, device=grad.device)
    constants = table.constants()
    launch(
        _spectral_along_kernel, (table.row_tiles,), config.ROWS, like=grad,
        grad_ptr=grad, out_ptr=out, along_ptr=along, **constants,
    )  # fmt: skip
    launch(
        _spectral_backward_kernel, (table.row_tiles,), config.ROWS, like=grad,
        grad_ptr=grad, along_ptr=along, u_ptr=u, v_ptr=v, sigma_ptr=sigma, **constants,
    )  # fmt: skip
    return [part.view(shape) for part, shape in zip(grad.split_with_sizes(table.sizes), table.shapes, strict=True)]


def formula(weights: Sequence[Tensor], table: Table, out: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> list[Tensor]:
    """The same in plain PyTorch, with the singular vectors that were used."""
    us, vs = u.split(table.heights), v.split(table.widths)
    return [
        weight / torch.dot(left.to(weight.dtype), torch.mv(weight.flatten(1), right.to(weight.dtype)))
        for weight, left, right in zip(weights, us, vs, strict=True)
    ]


def unsupported_reason(weights: Sequence[Tensor], us, vs, n_power_iterations: int, eps: float) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    if n_power_iterations > 1:
        return f"the kernels make one power iteration, not {n_power_iterations}"
    for tensors in (weights, us, vs):
        if len({tensor.dtype for tensor in tensors}) > 1:
            return "the weights, or their vectors, are of several dtypes"
    return tables.layout_reason([*weights, *us, *vs])


def spectral_norm(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], n_power_iterations: int, eps: float
) -> list[Tensor]:
    """`fastblocks.functional.spectral_norms`, for arguments that `unsupported_reason` accepts."""
    results = tables.apply(_NORM, (us, vs, n_power_iterations, eps), weights)
    if n_power_iterations:  # autograd does not see kernels write
        torch.autograd.graph.increment_version([t for t in (*us, *vs) if not t.is_inference()])
    return results


def rehearse(weights: Sequence[Tensor], us, vs, n_power_iterations: int, eps: float) -> None:
    """Run every launcher, for `launch.recording`."""
    _, table, kept = run(weights, us, vs, n_power_iterations, eps)
    backward(tables.flat(weights, weights), table, weights, *kept)


_NORM = Norm(run, backward, formula)
