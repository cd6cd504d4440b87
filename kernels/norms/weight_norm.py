"""Weight normalization of many weights at once.

    out = v · g / ‖v‖                         for each output's row of v (O, N)
    along = Σ grad_out · v,   grad_g = along / ‖v‖,   grad_v = g / ‖v‖ · (grad_out − v · along / ‖v‖²)

v and g are read where they lie (tables.py); ‖v‖ is kept for backward. Everything is computed in float32. One launch
forward, one backward after the gradients are put into one tensor; each reads its rows twice, the second time from the
cache. Bytes, in sizes of the weights: forward 2, backward 3, and 2 for that tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastblocks.eager.weights import weight_norm as formula_of_one
from fastblocks.kernels.launch import launch
from fastblocks.kernels.norms import config, tables
from fastblocks.kernels.norms.tables import Norm, Table, layer_of, products_of_rows, tile_of
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.runtime import tl, triton

__all__ = ["rehearse", "unsupported_reason", "weight_norm"]

ROW_TILE = tl.constexpr(10)  # a field of the table


@triton.jit
def _weight_norm_forward_kernel(
    table_ptr, v_ptr, g_ptr, norm_ptr, out_ptr,
    layers,
    BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grid (tiles of rows,)."""
    _, row_ptr, row_tile = layer_of(table_ptr, tl.program_id(0), ROW_TILE, layers, BLOCK_L)
    v_ptr += tl.load(row_ptr)
    g_ptr += tl.load(row_ptr + 1)
    rows, columns = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
    offs_o = row_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < rows
    squares = products_of_rows(v_ptr, v_ptr, row_tile, rows, columns, BLOCK_O, BLOCK_N)
    norm = tl.where(mask_o, tl.sqrt_rn(squares), 1.0)
    tl.store(norm_ptr + tl.load(row_ptr + 7) + offs_o, norm, mask=mask_o)
    scale = tl.div_rn(tl.load(g_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32), norm)
    out_ptr += tl.load(row_ptr + 5)
    for start in range(0, columns, BLOCK_N):
        offs, mask = tile_of(row_tile, start, rows, columns, BLOCK_O, BLOCK_N)
        out = tl.load(v_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        tl.store(out_ptr + offs, round_to(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_norm_backward_kernel(
    table_ptr, v_ptr, g_ptr, grad_ptr, norm_ptr, grad_g_ptr,
    layers,
    BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad becomes grad_v, in place. grid (tiles of rows,)."""
    _, row_ptr, row_tile = layer_of(table_ptr, tl.program_id(0), ROW_TILE, layers, BLOCK_L)
    v_ptr += tl.load(row_ptr)
    g_ptr += tl.load(row_ptr + 1)
    rows, columns = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
    at = tl.load(row_ptr + 7)
    offs_o = row_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < rows
    grad_ptr += tl.load(row_ptr + 6)
    products = products_of_rows(grad_ptr, v_ptr, row_tile, rows, columns, BLOCK_O, BLOCK_N)
    norm = tl.load(norm_ptr + at + offs_o, mask=mask_o, other=1.0)
    along = tl.div_rn(products, norm)
    tl.store(grad_g_ptr + at + offs_o, round_to(along, grad_g_ptr.dtype.element_ty), mask=mask_o)
    scale = tl.div_rn(tl.load(g_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32), norm)
    along = tl.div_rn(along, norm)
    for start in range(0, columns, BLOCK_N):
        offs, mask = tile_of(row_tile, start, rows, columns, BLOCK_O, BLOCK_N)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        grad -= tl.load(v_ptr + offs, mask=mask, other=0.0).to(tl.float32) * along[:, None]
        tl.store(grad_ptr + offs, round_to(grad * scale[:, None], grad_ptr.dtype.element_ty), mask=mask)


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def run(tensors: Sequence[Tensor]):
    """Of all v and then all g: the normalized weights, the table, and what backward needs."""
    vs, gs = _halves(tensors)
    table = tables.table_of(vs, gs, ())
    out, norm = table.allocate(vs[0]), torch.empty(sum(table.heights), dtype=torch.float32, device=vs[0].device)
    launch(
        _weight_norm_forward_kernel, (table.row_tiles,), config.ROWS, like=out,
        v_ptr=vs[0], g_ptr=gs[0], norm_ptr=norm, out_ptr=out, **table.constants(),
    )  # fmt: skip
    return table.views(out), table, (norm,)


def backward(grad: Tensor, table: Table, tensors: Sequence[Tensor], norm: Tensor) -> list[Tensor]:
    """The gradients of all v, in place of `grad`, those of the results in one tensor, and of all g."""
    vs, gs = _halves(tensors)
    table = tables.table_of(vs, gs, ())  # again: hooks on saved tensors may have moved them
    grad_g = torch.empty(sum(table.heights), dtype=gs[0].dtype, device=grad.device)
    launch(
        _weight_norm_backward_kernel, (table.row_tiles,), config.ROWS, like=grad,
        v_ptr=vs[0], g_ptr=gs[0], grad_ptr=grad, norm_ptr=norm, grad_g_ptr=grad_g, **table.constants(),
    )  # fmt: skip
    parts = [*grad.split_with_sizes(table.sizes), *grad_g.split_with_sizes(table.heights)]
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def formula(tensors: Sequence[Tensor], table: Table, norm: Tensor) -> list[Tensor]:
    return [formula_of_one(v, g) for v, g in zip(*_halves(tensors), strict=True)]


def unsupported_reason(vs: Sequence[Tensor], gs: Sequence[Tensor]) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    for tensors in (vs, gs):
        if len({tensor.dtype for tensor in tensors}) > 1:
            return "the weights, or their norms, are of several dtypes"
    return tables.layout_reason([*vs, *gs])


def weight_norm(vs: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
    """`fastblocks.functional.weight_norms`, for arguments that `unsupported_reason` accepts."""
    return tables.apply(_NORM, (), [*vs, *gs])


def rehearse(vs: Sequence[Tensor], gs: Sequence[Tensor]) -> None:
    """Run every launcher, for `launch.recording`."""
    _, table, kept = run([*vs, *gs])
    backward(tables.flat(vs, vs), table, [*vs, *gs], *kept)


_NORM = Norm(run, backward, formula)
