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

from fastblocks.kernels.bands import config

# A block of lanes ends before one more band would begin. Where bands are narrow, a block of 64 lanes would have 12 of
# them, and its program would take three times as long as one of the two widest. Of 64 mel bands at most 4 a block make
# 39 blocks of 33, and touch 124 pairs of band and block instead of 123.
MOST_BANDS = 4


class Plan(NamedTuple):
    """bands (K, 4): first bin, number of lanes, first row of the partial sums, 0.
    blocks (J, 4): first step, one past the last, first lane, one past the last; they cover all lanes in order.
    steps (S, 4): band, its first lane, one past its last, block; a block's bands in ascending order.
    tiles (P, 4): band, first lane within it, 0, 0; at least one for every band.
    lanes: of all bands together.
    """

    bands: Tensor
    blocks: Tensor
    steps: Tensor
    tiles: Tensor
    lanes: int


@lru_cache(maxsize=256)
def plan(
    ranges: tuple[int, ...], bins: int, channels: int, block_lanes: int, tile_lanes: int, device: torch.device
) -> Plan:
    """The tables of bands with bins [ranges[2k], ranges[2k + 1]), blocks of up to `block_lanes` and tiles of
    `tile_lanes` lanes."""
    bands, blocks, steps, tiles, lanes = _tables(ranges, bins, channels, block_lanes, tile_lanes)
    rows = [*bands, *blocks, *steps, *tiles]
    sizes = [len(bands), len(blocks), len(steps), len(tiles)]
    return Plan(*torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 4).split(sizes), lanes)


@cache
def _tables(ranges: tuple[int, ...], bins: int, channels: int, block_lanes: int, tile_lanes: int):
    bands, tiles, total = [], [], 0
    for k, (start, end) in enumerate(pairs(ranges)):
        lanes = (end - start) * channels
        bands.append((start, lanes, total, 0))
        tiles += [(k, first, 0, 0) for first in range(0, max(1, lanes), tile_lanes)]
        total += lanes
    spans = [(k, start * channels, end * channels) for k, (start, end) in enumerate(pairs(ranges)) if start < end]
    blocks, steps, first = [], [], 0
    while first < bins * channels:
        left = sorted(start for _, start, end in spans if end > first)
        later = [start for start in left[MOST_BANDS:] if start > first]
        last = min([first + block_lanes, bins * channels, *later[:1]])
        found = [(k, start, end, len(blocks)) for k, start, end in spans if start < last and end > first]
        blocks.append((len(steps), len(steps) + len(found), first, last))
        steps += found
        first = last
    return bands, blocks, steps, tiles, total


def plan_of(spectrum: Tensor, features: int, ranges: Sequence[int]) -> Plan:
    """The plan for a spectrum (B, F, T, I) and bands of so many features."""
    _, bins, _, channels = spectrum.shape
    lanes = config.to_bins(features)["BLOCK_L"], config.grad_weight(features)["BLOCK_L"]
    return plan(tuple(ranges), bins, channels, *lanes, spectrum.device)


def flat(ranges: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Starts and ends in turn, as an operator takes them."""
    return tuple(chain.from_iterable(ranges))


def pairs(ranges: Sequence[int]) -> list[tuple[int, int]]:
    """The inverse of `flat`: [start, end) of every band."""
    return list(zip(ranges[::2], ranges[1::2], strict=True))
