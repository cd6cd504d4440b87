"""Judges audio folded into rows of a period, after HiFi-GAN."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastblocks.discriminator._layers import Conv2d, ConvLayer, Discriminators, Norm, run_layers


class PeriodDiscriminator(nn.Module):
    """Folds a clip (B, nch, T) to (B, nch, T / period, period) and convolves along time.

    Args:
        period: samples of a row.
        nch: channels of the audio.
        norm: of every convolution: 'spectral' (or True), 'weight', or False.
    """

    def __init__(self, period: int, nch: int, norm: Norm):
        super().__init__()
        if period < 1:
            raise ValueError(f"periods must be positive, got {period}")
        self.period, self.nch = period, nch
        self.shortest_clip = period // 2 + 1  # a reflect pad must be shorter than the clip
        widths = (nch, 32, 128, 512, 1024, 1024)
        self.layers = nn.ModuleList(
            ConvLayer(Conv2d(a, b, (5, 1), stride=(3, 1), padding=(2, 0)), norm) for a, b in pairwise(widths)
        )
        self.output_conv = ConvLayer(Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)), norm, activate=False)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        length = x.shape[-1]
        rows = -(-length // self.period)
        missing = rows * self.period - length
        if torch.compiler.is_compiling() and length > self.period:  # one graph, padded or not
            x = torch.cat((x, x[..., -1 - self.period : -1].flip(-1)), dim=-1)[..., : rows * self.period]
        elif missing:
            x = F.pad(x, (0, missing), "reflect")
        fmap: list[Tensor] = []
        x = run_layers(self.layers, x.unflatten(-1, (rows, self.period)), fmap)
        return self.output_conv(x), fmap


class MultiPeriodDiscriminator(Discriminators):
    """One PeriodDiscriminator per period: audio (B, nch, T) -> (scores, fmaps).

    Source: Kong et al., "HiFi-GAN", 2020.

    Args:
        nch: channels of the audio.
        sample_rate: in Hz; of no effect, kept for the signature.
        periods: samples of a row, one for each sub-discriminator.
        norm: of every convolution: 'spectral' (or True), 'weight', or False.

    Raises:
        ValueError: in forward, if a clip is too short to be padded to a multiple of a period.
    """

    def __init__(
        self, nch: int = 1, sample_rate: int = 48000, periods: Sequence[int] = (2, 3, 5, 7, 11), norm: Norm = True
    ):
        super().__init__(nch, [PeriodDiscriminator(period, nch, norm) for period in periods])
        self.sample_rate, self.periods, self.norm = sample_rate, list(periods), norm
