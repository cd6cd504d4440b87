"""One Linear per band over overlapping ranges of bins, without scatters and without padded lanes.

Bands that do not overlap are cut out of a spectrum, or joined to one, by a single split or concatenation; with
triangular filters the even and the odd bands are two such sets. Each band is then one product on a slice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastblocks.eager.autocast import autocast_enabled
from fastblocks.eager.derivatives import by_formula, must_trace

Ranges = Sequence[tuple[int, int]]

# Rows of a band that are summed at once in the gradient of its weight. A product with few columns adds all rows one
# after another: 2 × 128 over 1128 rows has an error of 6e-7, in parts of this size 2e-7, at the same speed.
_ROWS_AT_ONCE = 128


def _disjoint(ranges: Ranges) -> list[list[int]]:
    """Indices of the bands in sets without a shared bin, as few as a greedy search finds."""
    sets: list[list[int]] = []
    for k in sorted((k for k, (start, end) in enumerate(ranges) if start < end), key=lambda k: ranges[k]):
        for members in sets:
            if ranges[members[-1]][1] <= ranges[k][0]:
                members.append(k)
                break
        else:
            sets.append([k])
    return sets


def _sections(members: list[int], ranges: Ranges, bins: int) -> list[tuple[int | None, int]]:
    """One set as a walk over all bins: (band or None for a gap, number of bins)."""
    walk, position = [], 0
    for k in members:
        start, end = ranges[k]
        walk += [(None, start - position), (k, end - start)]
        position = end
    return [(k, n) for k, n in [*walk, (None, bins - position)] if n]


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows (N, I) through weight (I, O), plus bias (O,)."""
    long_sum = rows.is_cpu and rows.shape[0] > _ROWS_AT_ONCE and rows.dtype == weight.dtype == torch.float32
    if long_sum and weight.requires_grad and not autocast_enabled(rows.device) and not must_trace():
        y = _CPUProduct.apply(rows, weight)
        return y if bias is None else y + bias
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


class _CPUProduct(torch.autograd.Function):
    """A product whose weight's gradient is summed over parts of the rows."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows @ weight

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_formula(torch.matmul, (rows, weight), grad)
        grad_rows = grad @ weight.T if ctx.needs_input_grad[0] else None
        whole = len(rows) // _ROWS_AT_ONCE * _ROWS_AT_ONCE
        parts = (t[:whole].unflatten(0, (-1, _ROWS_AT_ONCE)) for t in (rows, grad))
        grad_weight = torch.einsum("pni,pno->pio", *parts).sum(0)
        return grad_rows, grad_weight.addmm_(rows[whole:].T, grad[whole:])


def band_split(x: Tensor, weight: Tensor, bias: Tensor, ranges: Ranges) -> Tensor:
    batch, bins, length, channels = x.shape
    rows = x.transpose(1, 2).reshape(batch * length, bins * channels)
    weights, biases = weight.unbind(), bias.unbind()
    bias_apart = autocast_enabled(x.device)  # addmm would round it, and the sum, to autocast's dtype
    out: list[Tensor | None] = [None] * len(ranges)
    for members in _disjoint(ranges):
        sections = _sections(members, ranges, bins)
        for (k, n), part in zip(sections, rows.split([n * channels for _, n in sections], 1), strict=True):
            if k is not None:
                lanes = weights[k][: n * channels]
                out[k] = _product(part, lanes, None if bias_apart else biases[k])
    for k, (start, end) in enumerate(ranges):
        if start == end:
            alone = torch.zeros_like(biases[k]) if bias_apart else biases[k]
            out[k] = alone.expand(batch * length, -1).to(x.dtype)
    y = torch.stack(out)
    if bias_apart:
        y = y + bias[:, None]
    return y.unflatten(1, (batch, length)).permute(1, 3, 2, 0)


def band_unsplit(x: Tensor, weight: Tensor, bias: Tensor, ranges: Ranges, ola_window: Tensor) -> Tensor:
    batch, _, length, _ = x.shape
    bins = ola_window.shape[0]
    channels = weight.shape[2] // max((1, *(end - start for start, end in ranges)))
    rows = x.permute(3, 0, 2, 1).flatten(1, 2).unbind()  # K of (B·T, in)
    weights, biases = weight.unbind(), bias.unbind()
    bias_apart = autocast_enabled(x.device)  # as above
    total = None
    for members in _disjoint(ranges):
        parts, offsets = [], []
        for k, n in _sections(members, ranges, bins):
            lanes = n * channels
            if k is None:
                parts.append(x.new_zeros(batch * length, lanes))
                offsets.append(bias.new_zeros(lanes))
            elif bias_apart:
                parts.append(_product(rows[k], weights[k][:, :lanes], None))
                offsets.append(biases[k][:lanes])
            else:
                parts.append(_product(rows[k], weights[k][:, :lanes], biases[k][:lanes]))
        merged = torch.cat(parts, 1)
        if bias_apart:
            merged = merged + torch.cat(offsets)
        total = merged if total is None else total + merged
    if total is None:
        total = x.new_zeros(batch * length, bins * channels)
    y = total.unflatten(1, (bins, channels)).unflatten(0, (batch, length)).transpose(1, 2)
    return y / ola_window[:, None, None]
