"""A Linear a band over overlapping ranges of bins, without scatters and without padded lanes.

Bands that do not overlap are cut out of a spectrum, or put together to one, by a single split or concatenation; with
triangular filters the even and the odd bands are two such sets. Each band is then one product on a slice.
"""

import numpy as np
import torch
from torch import Tensor

Ranges = list[tuple[int, int]]


def ranges(filters: np.ndarray) -> Ranges:
    """The bins [start, end) that each filter (K, F) covers: from its first to its last nonzero weight."""
    covered = [np.flatnonzero(weights) for weights in filters]
    return [(int(bins[0]), int(bins[-1]) + 1) if len(bins) else (0, 0) for bins in covered]


def _disjoint(bands: Ranges) -> list[list[int]]:
    """Bands by number in as few sets as a greedy walk finds, so that no two bands of a set share a bin."""
    sets: list[list[int]] = []
    for k in sorted((k for k, (start, end) in enumerate(bands) if start < end), key=lambda k: bands[k]):
        for members in sets:
            if bands[members[-1]][1] <= bands[k][0]:
                members.append(k)
                break
        else:
            sets.append([k])
    return sets


def _sections(members: list[int], bands: Ranges, bins: int) -> list[tuple[int | None, int]]:
    """One set as a walk over all bins: (band or None for a gap, number of bins)."""
    walk, position = [], 0
    for k in members:
        start, end = bands[k]
        walk += [(None, start - position), (k, end - start)]
        position = end
    return [(k, n) for k, n in [*walk, (None, bins - position)] if n]


def split(x: Tensor, bands: Ranges, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, F, T, in), weight (K, Wmax·in, out), bias (K, out) -> (B, out, T, K)."""
    batch, bins, length, channels = x.shape
    rows = x.transpose(1, 2).reshape(batch * length, bins * channels)
    weights, biases = weight.unbind(), bias.unbind()
    out: list[Tensor | None] = [None] * len(bands)
    for members in _disjoint(bands):
        sections = _sections(members, bands, bins)
        for (k, n), part in zip(sections, rows.split([n * channels for _, n in sections], 1), strict=True):
            if k is not None:
                out[k] = torch.addmm(biases[k], part, weights[k][: n * channels])
    for k, (start, end) in enumerate(bands):
        if start == end:
            out[k] = biases[k].expand(batch * length, -1).to(x.dtype)
    return torch.stack(out).unflatten(1, (batch, length)).permute(1, 3, 2, 0)


def unsplit(x: Tensor, bands: Ranges, weight: Tensor, bias: Tensor, bins: int) -> Tensor:
    """x (B, in, T, K), weight (K, in, Wmax·out), bias (K, Wmax·out) -> (B, F, T, out), overlapping bands added up."""
    batch, _, length, _ = x.shape
    channels = weight.shape[2] // max(1, *(end - start for start, end in bands))
    rows = x.permute(3, 0, 2, 1).flatten(1, 2).unbind()  # K of (B·T, in)
    weights, biases = weight.unbind(), bias.unbind()
    total = None
    for members in _disjoint(bands):
        parts = []
        for k, n in _sections(members, bands, bins):
            lanes = n * channels
            if k is None:
                parts.append(x.new_zeros(batch * length, lanes))
            else:
                parts.append(torch.addmm(biases[k][:lanes], rows[k], weights[k][:, :lanes]))
        merged = torch.cat(parts, 1)
        total = merged if total is None else total + merged
    if total is None:
        total = x.new_zeros(batch * length, bins * channels)
    return total.unflatten(1, (bins, channels)).unflatten(0, (batch, length)).transpose(1, 2)
