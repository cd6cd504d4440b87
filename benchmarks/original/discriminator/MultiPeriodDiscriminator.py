"""Multi-period discriminator, after Kong et al., "HiFi-GAN", 2020."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original.discriminator._layers import NormConv, activations, run_all

CHANNELS = (32, 128, 512, 1024, 1024)


class PeriodDiscriminator(nn.Module):
    def __init__(self, nch: int, period: int, norm: bool):
        super().__init__()
        self.period = period
        widths = (nch, *CHANNELS)
        self.layers = nn.ModuleList(
            NormConv(nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0)), norm) for a, b in pairwise(widths)
        )
        self.output_conv = NormConv(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)), norm)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        missing = -x.shape[-1] % self.period
        if missing:
            x = F.pad(x, (0, missing), mode="reflect")
        fmap = activations(self.layers, x.unflatten(-1, (-1, self.period)))
        return self.output_conv(fmap[-1]), fmap


class MultiPeriodDiscriminator(nn.Module):
    """(B, nch, T) -> (scores, fmaps)."""

    def __init__(self, nch=1, sample_rate=48000, periods=(2, 3, 5, 7, 11), norm=True):
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(nch, period, norm) for period in periods)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        return run_all(self.discriminators, x)
