"""Many weights in one launch: a table of where each lies and which programs work on it.

A weight (O, …) is a matrix of O rows and N columns. Results of all weights lie in one flat tensor, each at a multiple
of ALIGNMENT elements, gradients in another without gaps, and what there is a number of for each row or column in
vectors of all rows or columns.

A row of the table is one weight, FIELDS int64 each: where the weight and two vectors of its own lie, in elements from
those of the first weight, which kernels get as pointers; O, N; where it begins in the flat result, in the flat
gradients, in the vectors of rows and of columns; the first of its tiles of columns and of rows. The last row has the
ends of both. Tables are kept by offsets and shapes, so that training steps copy none to the GPU, and CUDA graphs can
be captured after a first call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from fastblocks.eager.derivatives import by_formula, keep, kept
from fastblocks.kernels import runtime
from fastblocks.kernels.runtime import cdiv, power_of_two, tl, triton

__all__ = [
    "FIELDS",
    "Norm",
    "Table",
    "apply",
    "flat",
    "layer_of",
    "layout_reason",
    "products_of_rows",
    "sum_between",
    "table_of",
    "tile_of",
]

FIELDS = tl.constexpr(11)
ALIGNMENT = 64  # elements: at least 128 bytes, what libraries ask of a convolution's weight
TILE_ROWS, TILE_COLUMNS = 4, 32  # 32 columns of float32 are one line of memory
_PLAIN = (Tensor, nn.Parameter)
_TRACERS = [torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY,
            torch._C._TorchDispatchModeKey.FUNCTIONAL]  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The table on the device, and what launches need to know of it."""

    rows: Tensor
    shapes: tuple[tuple[int, ...], ...]
    column_tiles: int
    row_tiles: int
    gaps: tuple[int, ...]  # of the flat result: each weight's elements, and what is left to the next
    sizes: tuple[int, ...]  # of the weights
    heights: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.shapes)

    def constants(self) -> dict:
        return {"table_ptr": self.rows, "layers": self.layers, "BLOCK_L": max(256, power_of_two(self.layers))}

    def allocate(self, like: Tensor) -> Tensor:
        """The flat result, uninitialised."""
        return torch.empty(sum(self.gaps), dtype=like.dtype, device=like.device)

    def views(self, result: Tensor) -> list[Tensor]:
        """The weights in a flat result; to autograd tensors of their own."""
        with torch._C._AutoDispatchBelowAutograd():
            return [part.view(s) for part, s in zip(result.split_with_sizes(self.gaps)[::2], self.shapes, strict=True)]


def table_of(weights: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> Table:
    """The table of weights (O, …) with vectors of O numbers and of as many as the second has."""
    offsets = tuple(
        (tensor.data_ptr() - tensors[0].data_ptr()) // tensor.element_size()
        for tensors in (weights, first, second)
        for tensor in tensors
    )
    table = _table(offsets, tuple(tuple(weight.shape) for weight in weights), weights[0].device)
    if runtime.is_capturing():
        _in_graphs[id(table)] = table
    return table


_in_graphs: dict[int, Table] = {}  # a captured graph reads its tables for as long as it lives


@lru_cache(maxsize=128)
def _table(offsets: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], device: torch.device) -> Table:
    n = len(shapes)
    heights, sizes = [shape[0] for shape in shapes], [torch.Size(shape).numel() for shape in shapes]
    widths, lines, gaps = [size // height for size, height in zip(sizes, heights, strict=True)], [], []
    at, packed, height, width, column_tile, row_tile = 0, 0, 0, 0, 0, 0
    for i in range(n):
        where = [*(offsets[i + j * n] if i + j * n < len(offsets) else 0 for j in range(3)), heights[i], widths[i]]
        lines.append([*where, at, packed, height, width, column_tile, row_tile])
        gaps += [sizes[i], -sizes[i] % ALIGNMENT]
        at, packed = at + sizes[i] + gaps[-1], packed + sizes[i]
        height, width = height + heights[i], width + widths[i]
        column_tile, row_tile = column_tile + cdiv(widths[i], TILE_COLUMNS), row_tile + cdiv(heights[i], TILE_ROWS)
    lines.append([0] * (FIELDS.value - 2) + [column_tile, row_tile])
    rows = torch.tensor(lines, dtype=torch.int64, device=device)
    return Table(rows, shapes, column_tile, row_tile, *map(tuple, (gaps, sizes, heights, widths)))


@triton.jit
def layer_of(table_ptr, tile, FIELD: tl.constexpr, layers, BLOCK_L: tl.constexpr):
    """The row of the table that a tile belongs to, counted in FIELD, and which of that weight's tiles it is."""
    offs = tl.arange(0, BLOCK_L)
    starts = tl.load(table_ptr + offs * FIELDS + FIELD, mask=offs < layers, other=2147483647)
    layer = tl.sum((starts <= tile).to(tl.int32), axis=0) - 1
    row_ptr = table_ptr + layer * FIELDS
    return layer, row_ptr, tile - tl.load(row_ptr + FIELD).to(tl.int32)


@triton.jit
def tile_of(row_tile, start, rows, columns, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a tile of a weight's rows, columns from `start` on, lies in it, and what of that there is."""
    offs_o = row_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_n = start + tl.arange(0, BLOCK_N)
    return offs_o[:, None] * columns + offs_n[None, :], (offs_o < rows)[:, None] & (offs_n < columns)[None, :]


@triton.jit
def products_of_rows(a_ptr, b_ptr, row_tile, rows, columns, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr):
    """Σ a · b of each row of a tile. [BLOCK_O]"""
    total = tl.zeros([BLOCK_O, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_N):
        offs, mask = tile_of(row_tile, start, rows, columns, BLOCK_O, BLOCK_N)
        a = tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        total += a * tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, axis=1)


@triton.jit
def sum_between(ptr, first, last, SQUARED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of the numbers, or of their squares, from the first to before the last."""
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        x = tl.load(ptr + offs, mask=offs < last, other=0.0)
        total += x * x if SQUARED else x
    return tl.sum(total, axis=0)


def layout_reason(tensors: Sequence[Tensor]) -> str:
    """Why kernels cannot read these by address; an empty string if they can."""
    if any(type(tensor) not in _PLAIN for tensor in tensors):
        return "a tensor subclass has no address to read"
    if any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS):
        return "the call is being traced"
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "a tensor is not contiguous"
    if odd := {t.dtype for t in tensors} - {torch.float32, torch.bfloat16, torch.float16}:
        return f"no kernel for {', '.join(str(dtype).removeprefix('torch.') for dtype in odd)}"
    if len({tensor.device for tensor in tensors}) > 1 or any(tensor.numel() == 0 for tensor in tensors):
        return "tensors are empty or on several devices"
    if max(tensor.numel() for tensor in tensors) >= 2**31:
        return "a tensor has more than 2^31 elements"
    return ""


def flat(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """All gradients in one tensor without gaps, zeros for those that are None. A launch of PyTorch's."""
    return torch.cat([(like[i].new_zeros(like[i].shape) if g is None else g).reshape(-1) for i, g in enumerate(grads)])


@dataclass(frozen=True)
class Norm:
    """`run(tensors, *arguments) -> results, table, kept`; `backward(flat_grads, table, tensors, *kept)`, a gradient for
    each tensor; `formula(tensors, table, *kept)`, the results in plain PyTorch, for second derivatives."""

    run: Callable[..., tuple[list[Tensor], Table, tuple[Tensor, ...]]]
    backward: Callable[..., list[Tensor]]
    formula: Callable[..., list[Tensor]]


class _Node(torch.autograd.Function):
    """One node for all weights of a call. No registered operator: those know tensors, not lists of them."""

    @staticmethod
    def forward(ctx, norm: Norm, arguments: tuple, *tensors: Tensor) -> tuple[Tensor, ...]:
        results, table, others = norm.run(tensors, *arguments)
        keep(ctx, *tensors, *others)
        ctx.call = norm, table, len(tensors)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        norm, table, n = ctx.call
        tensors, others = kept(ctx)[:n], kept(ctx)[n:]
        if all(grad is None for grad in grads):
            return (None,) * (n + 2)
        if torch.is_grad_enabled():  # create_graph=True
            return None, None, *by_formula(lambda *views: norm.formula(views, table, *others), tensors, grads)
        found = norm.backward(flat(grads, tensors), table, tensors, *others)
        # none for what nobody used, as from nodes of their own: with zeros an optimizer would decay it
        return None, None, *(None if grads[i % len(grads)] is None else grad for i, grad in enumerate(found))


def apply(norm: Norm, arguments: tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
    """`norm.run(tensors, *arguments)`, differentiable by the tensors where somebody needs that."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return list(_Node.apply(norm, arguments, *tensors))
    with torch.no_grad():
        return norm.run(tensors, *arguments)[0]
