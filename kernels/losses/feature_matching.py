"""Mean absolute differences of many pairs of feature maps, and mean magnitudes of the second of each pair.

    means[0, i] = mean |x_i − y_i|,   means[1, i] = mean |y_i|
    grad_x_i = sign(x_i − y_i) · grad_means[0, i] / numel_i          no gradient of y

Maps are read where they lie, through a table as the norms of weights have one (kernels/norms/tables.py): a row a map,
where x, y and the gradient lie in elements from those of the first map, numel, and the first of its tiles. Addresses of
maps repeat from step to step where the allocator does its work; a new table is copied from pinned memory, for which
nobody waits. Everything is float32 between reading and writing. x and y are kept.

Two launches forward, one backward, for any number of maps. Bytes per element of s bytes: forward 2s, backward 3s
(PyTorch's multi-tensor operations: 5s and 7s). Predicted for an H100 (bound by memory, 3.0 TB/s; not measured): a
MultiPeriodDiscriminator's 25 maps of four clips of three seconds, 175 million numbers in 16 bits, forward 0.24 ms,
backward 0.35.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastblocks.eager import losses as eager
from fastblocks.eager.derivatives import by_formula
from fastblocks.kernels import runtime
from fastblocks.kernels.launch import launch
from fastblocks.kernels.losses import config
from fastblocks.kernels.norms.tables import FIELDS, layer_of, layout_reason, sum_between
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.runtime import cdiv, power_of_two, tl, triton

__all__ = ["feature_matching", "rehearse", "unsupported_reason"]

TILE_FIELD = tl.constexpr(10)


@triton.jit
def _map_of(table_ptr, layers, ALIGNED: tl.constexpr, BLOCK_L: tl.constexpr):
    """The map of a program, its row of the table, where its part begins, and how many elements the map has. ALIGNED:
    all addresses and sizes are multiples of 8 elements, so that loads are of 16 bytes."""
    layer, row_ptr, tile = layer_of(table_ptr, tl.program_id(0), TILE_FIELD, layers, BLOCK_L)
    numel = tl.load(row_ptr + 3).to(tl.int32)
    if ALIGNED:
        numel = tl.multiple_of(numel, 8)
    return layer, row_ptr, tile, numel


@triton.jit
def _offset(row_ptr, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    offset = tl.load(row_ptr + FIELD)
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    return offset


@triton.jit
def _feature_matching_forward_kernel(
    table_ptr, x_ptr, y_ptr, partial_ptr,
    layers, tiles,
    ALIGNED: tl.constexpr, BLOCK_L: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (tiles,). partial (2, tiles): sums of |x − y| and of |y|."""
    _, row_ptr, tile, numel = _map_of(table_ptr, layers, ALIGNED, BLOCK_L)
    x_ptr += _offset(row_ptr, 0, ALIGNED)
    y_ptr += _offset(row_ptr, 1, ALIGNED)
    differences, magnitudes = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, TILE, BLOCK):
        offs = tile * TILE + start + tl.arange(0, BLOCK)
        mask = offs < numel
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        differences += tl.abs(tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - y)
        magnitudes += tl.abs(y)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(differences, axis=0))
    tl.store(partial_ptr + tiles + tl.program_id(0), tl.sum(magnitudes, axis=0))


@triton.jit
def _feature_matching_gather_kernel(table_ptr, partial_ptr, means_ptr, layers, tiles, BLOCK: tl.constexpr):
    """grid (2 · maps,): differences, then magnitudes."""
    which, layer = tl.program_id(0) // layers, tl.program_id(0) % layers
    row_ptr = table_ptr + layer * FIELDS
    first, last = tl.load(row_ptr + TILE_FIELD).to(tl.int32), tl.load(row_ptr + FIELDS + TILE_FIELD).to(tl.int32)
    total = sum_between(partial_ptr + which * tiles, first, last, False, BLOCK)
    tl.store(means_ptr + tl.program_id(0), tl.div_rn(total, tl.load(row_ptr + 3).to(tl.float32)))


@triton.jit
def _feature_matching_backward_kernel(
    table_ptr, x_ptr, y_ptr, grad_means_ptr, grad_x_ptr,
    layers,
    ALIGNED: tl.constexpr, BLOCK_L: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (tiles,)."""
    layer, row_ptr, tile, numel = _map_of(table_ptr, layers, ALIGNED, BLOCK_L)
    x_ptr += _offset(row_ptr, 0, ALIGNED)
    y_ptr += _offset(row_ptr, 1, ALIGNED)
    grad_x_ptr += _offset(row_ptr, 2, ALIGNED)
    scale = tl.div_rn(tl.load(grad_means_ptr + layer), numel.to(tl.float32))
    for start in range(0, TILE, BLOCK):
        offs = tile * TILE + start + tl.arange(0, BLOCK)
        mask = offs < numel
        difference = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        difference -= tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        # times the difference where that is zero, or no number
        grad = tl.where(difference > 0, scale, tl.where(difference < 0, -scale, difference * scale))
        tl.store(grad_x_ptr + offs, round_to(grad, grad_x_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=128)
def _table(offsets: tuple[int, ...], sizes: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, int]:
    """The table on the device, and the number of tiles. The copy is in order with what else that stream does."""
    n, tile, lines = len(sizes), 0, []
    for i, size in enumerate(sizes):
        lines.append([*(offsets[j * n + i] for j in range(3)), size, 0, 0, 0, 0, 0, 0, tile])
        tile += cdiv(size, config.TILE)
    lines.append([0] * (FIELDS.value - 1) + [tile])
    rows = torch.tensor(lines, dtype=torch.int64, pin_memory=torch.cuda.is_initialized())
    return rows.to(device, non_blocking=True), tile


def _launches(xs: Sequence[Tensor], ys: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[dict, int]:
    """What all launches over these maps get, and the number of tiles."""
    offsets = tuple(
        (tensor.data_ptr() - tensors[0].data_ptr()) // tensor.element_size()
        for tensors in (xs, ys, grads)
        for tensor in tensors
    )
    sizes, device = tuple(x.numel() for x in xs), xs[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if torch.cuda.is_initialized() else 0
    table, tiles = _table(offsets, sizes, device, stream)
    aligned = all(number % 8 == 0 for number in (*offsets, *sizes))
    known = {"table_ptr": table, "x_ptr": xs[0], "y_ptr": ys[0], "layers": len(xs), "ALIGNED": aligned}
    return known | {"BLOCK_L": max(128, power_of_two(len(xs)))}, tiles


def run(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Both means of each pair, (2, maps)."""
    known, tiles = _launches(xs, ys, xs)
    partial, means = (xs[0].new_empty((2, n), dtype=torch.float32) for n in (tiles, len(xs)))
    launch(
        _feature_matching_forward_kernel, (tiles,), config.MAPS, like=partial, partial_ptr=partial, tiles=tiles, **known
    )
    launch(
        _feature_matching_gather_kernel, (2 * len(xs),), config.GATHER, like=partial,
        table_ptr=known["table_ptr"], partial_ptr=partial, means_ptr=means, layers=len(xs), tiles=tiles,
    )  # fmt: skip
    return means


def _like(xs: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of their own, so that each is free when it has been used."""
    return [torch.empty_like(x) for x in xs]


def backward(grad_means: Tensor, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of all x."""
    grads = _like(xs)
    known, tiles = _launches(xs, ys, grads)
    launch(
        _feature_matching_backward_kernel, (tiles,), config.MAPS, like=grad_means,
        grad_means_ptr=grad_means, grad_x_ptr=grads[0], **known,
    )  # fmt: skip
    return grads


def rehearse(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
    """Run every launcher, for `launch.recording`."""
    backward(run(xs, ys), xs, ys)


class _FeatureMatching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ys: Sequence[Tensor], *xs: Tensor) -> Tensor:
        ctx.save_for_backward(*xs, *ys)
        return run(xs, ys)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing gives each only once
        n = len(saved) // 2
        xs, ys = saved[:n], saved[n:]
        if torch.is_grad_enabled():
            return None, *by_formula(lambda *views: eager.means_formula(views, ys), xs, grad)
        return None, *backward(grad[0].contiguous(), xs, ys)


def unsupported_reason(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> str:
    """Why the kernels do not take these maps; an empty string if they do."""
    for tensors in (xs, ys):
        if len({tensor.dtype for tensor in tensors}) > 1:
            return "the maps are of several dtypes"
    if runtime.is_capturing():
        return "a CUDA graph is being captured, whose memory no table has seen yet"
    return layout_reason([*xs, *ys])


def feature_matching(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """mean |x − y| of each pair, and mean |y|, which has no gradient; for maps that `unsupported_reason` accepts."""
    ys = [y.detach() for y in ys]
    if torch.is_grad_enabled() and any(x.requires_grad for x in xs):
        means = _FeatureMatching.apply(ys, *xs)
    else:
        means = run(xs, ys)
    return means[0], means[1].detach()
