"""Multi-window STFT discriminator, after Défossez et al., "High Fidelity Neural Audio Compression" (EnCodec), 2022."""

import torch
from torch import Tensor, nn

from benchmarks.original.discriminator._layers import NormConv, activations, run_all, spectrogram
from benchmarks.original.functional import wide


class FrequencyDiscriminator(nn.Module):
    def __init__(self, nch: int, window: int, h: int, sample_rate: int, norm: bool):
        super().__init__()
        self.window = window
        self.bins = int((window // 2 + 1) * sample_rate / 48000)
        self.layers = nn.ModuleList([NormConv(nn.Conv2d(2 * nch, h, (3, 9), padding=(1, 4)), norm)])
        for d in (1, 2, 4):
            conv = nn.Conv2d(d * h, 2 * d * h, (3, 9), (1, 2), (d, 4), (d, 1))
            self.layers.append(NormConv(conv, norm))
        for d in (8, 16):
            self.layers.append(NormConv(nn.Conv2d(d * h, 2 * d * h, (3, 3), padding=1), norm))
        self.output_conv = nn.Conv2d(32 * h, 1, (3, 3), padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        fmap = activations(self.layers, spectrogram(x, self.window, self.window // 2)[..., : self.bins])
        return self.output_conv(fmap[-1]), fmap


class MultiFrequencyDiscriminator(nn.Module):
    """(B, nch, T) -> (scores, fmaps)."""

    def __init__(self, nch, window_sizes, hidden_channels=8, sample_rate=48000, norm=True):
        super().__init__()
        self.discriminators = nn.ModuleList(
            FrequencyDiscriminator(nch, window, hidden_channels, sample_rate, norm) for window in window_sizes
        )

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        energy = wide(x).pow(2).sum((1, 2), keepdim=True)
        x = (x / torch.sqrt(energy + torch.finfo(torch.float32).eps)).type_as(x)
        return run_all(self.discriminators, x)
