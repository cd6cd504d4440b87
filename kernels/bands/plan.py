"""What the kernels' programs look up: which bins a band has, and which bands a block of bins has.

A lane is a (bin, channel) pair; lanes count bin-major through the whole spectrum. Tables are int32 with four columns
(16 bytes, one aligned load). They follow from the ranges alone, so they are made once for each device and never belong
to a module: nothing has to be moved, broadcast or made again when parameters are.
"""

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.bands import config

# A block of lanes ends before one more band would begin. Where bands are narrow, a block of 64 lanes would have 12 of
# them, and its program would take three times as long as one of the two widest. Of 64 mel bands at most 4 a block make
# 39 blocks of 33, and touch 124 pairs of band and block instead of 123.
MOST_BANDS = 4


class Plan(NamedTuple):
    """bands (K, 4): first lane, number of lanes, first row of the partial sums, 0.
    order (K, 4): band, its first lane, number of lanes, its first piece; the widest band first.
    pieces (Q, 4): band, its first lane, first lane of the piece, one past its last; none for a band without a bin.
    blocks (J, 4): first step, one past the last, first lane, one past the last; together they cover all lanes. Those of
        most steps first.
    steps (S, 4): band, its first lane, first lane of the block, one past the last of band and block; a block's bands in
        ascending order.
    tiles (P, 4): band, its first lane in the spectrum, one past its last, row of the partial sums; at least one a band.
    lanes: of all bands together.
    """

    bands: Tensor
    order: Tensor
    pieces: Tensor
    blocks: Tensor
    steps: Tensor
    tiles: Tensor
    lanes: int


@lru_cache(maxsize=256)
def plan(ranges: tuple[int, ...], bins: int, channels: int, sizes: tuple[int, int, int], device: torch.device) -> Plan:
    """The tables of bands with bins [ranges[2k], ranges[2k + 1]); sizes: lanes of a piece, a block and a tile."""
    if runtime.is_capturing():
        raise RuntimeError(
            "band_split and band_unsplit copy tables of their ranges to the device at a shape's first call, which a "
            f"CUDA graph cannot capture: call it once before capturing; {bins} bins, {channels} channels, {device}"
        )
    *tables, lanes = _tables(ranges, bins, channels, *sizes)
    rows = torch.tensor(list(chain(*tables)), dtype=torch.int32, device=device).view(-1, 4)
    return Plan(*rows.split([len(table) for table in tables]), lanes)


@cache
def _tables(ranges: tuple[int, ...], bins: int, channels: int, piece_lanes: int, block_lanes: int, tile_lanes: int):
    spans = [(start * channels, end * channels) for start, end in pairs(ranges)]
    bands, pieces, tiles, total, piece_of = [], [], [], 0, []
    for k, (first, last) in enumerate(spans):
        bands.append((first, last - first, total, 0))
        piece_of.append(len(pieces))
        pieces += [(k, first, at, min(last, at + piece_lanes)) for at in range(first, last, piece_lanes)]
        tiles += [(k, at, last, total + at - first) for at in range(first, max(first + 1, last), tile_lanes)]
        total += last - first
    widest = sorted(range(len(spans)), key=lambda k: -bands[k][1])
    order = [(k, *bands[k][:2], piece_of[k]) for k in widest]
    blocks, steps, start = [], [], 0
    while start < bins * channels:
        left = sorted(first for first, last in spans if first < last and last > start)
        later = [first for first in left[MOST_BANDS:] if first > start]
        end = min([start + block_lanes, bins * channels, *later[:1]])
        found = [
            (k, first, start, min(end, last))
            for k, (first, last) in enumerate(spans)
            if first < min(end, last) and last > start
        ]
        blocks.append((len(steps), len(steps) + len(found), start, end))
        steps += found
        start = end
    blocks.sort(key=lambda block: block[0] - block[1])
    return bands, order, pieces, blocks, steps, tiles, total


def plan_of(spectrum: Tensor, ranges: Sequence[int]) -> Plan:
    """The plan for a spectrum (B, F, T, I)."""
    _, bins, _, channels = spectrum.shape
    return plan(tuple(ranges), bins, channels, (config.PIECE, config.BLOCK, config.TILE), spectrum.device)


def flat(ranges: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Starts and ends in turn, as an operator takes them."""
    return tuple(chain.from_iterable(ranges))


def pairs(ranges: Sequence[int]) -> list[tuple[int, int]]:
    """The inverse of `flat`: [start, end) of every band."""
    return list(zip(ranges[::2], ranges[1::2], strict=True))
