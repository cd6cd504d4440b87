"""One Linear per band over overlapping ranges of bins, without scatters and without padded lanes.

Bands that do not overlap are cut out of a spectrum, or joined to one, by a single split or concatenation; with
triangular filters the even and the odd bands are two such sets. Each band is then one product on a slice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastblocks.eager.autocast import autocast_enabled

Ranges = Sequence[tuple[int, int]]


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
                out[k] = part @ lanes if bias_apart else torch.addmm(biases[k], part, lanes)
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
                parts.append(rows[k] @ weights[k][:, :lanes])
                offsets.append(biases[k][:lanes])
            else:
                parts.append(torch.addmm(biases[k][:lanes], rows[k], weights[k][:, :lanes]))
        merged = torch.cat(parts, 1)
        if bias_apart:
            merged = merged + torch.cat(offsets)
        total = merged if total is None else total + merged
    if total is None:
        total = x.new_zeros(batch * length, bins * channels)
    y = total.unflatten(1, (bins, channels)).unflatten(0, (batch, length)).transpose(1, 2)
    return y / ola_window[:, None, None]
