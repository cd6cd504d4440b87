"""Multi-resolution, multi-band spectrogram discriminator, after Kumar et al., "Descript Audio Codec", 2023."""

import torch
from torch import Tensor, nn

from benchmarks.original.discriminator._layers import NormConv, activations, run_all, spectrogram

BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


class ResolutionDiscriminator(nn.Module):
    def __init__(self, nch: int, window: int, hop_factor: float, bands, norm: bool, width: int):
        super().__init__()
        self.window, self.hop = window, int(window * hop_factor)
        bins = window // 2 + 1
        self.edges = [(int(low * bins), int(high * bins)) for low, high in bands]
        self.band_discriminators = nn.ModuleList(self._stack(nch, width, norm) for _ in bands)
        self.output_conv = NormConv(nn.Conv2d(width, 1, (3, 3), padding=(1, 1)), norm)

    @staticmethod
    def _stack(nch: int, width: int, norm: bool) -> nn.ModuleList:
        layers = nn.ModuleList([NormConv(nn.Conv2d(2 * nch, width, (3, 9), (1, 1), (1, 4)), norm)])
        for kernel, stride, padding in [((3, 9), (1, 2), (1, 4))] * 3 + [((3, 3), (1, 1), (1, 1))]:
            layers.append(NormConv(nn.Conv2d(width, width, kernel, stride, padding), norm))
        return layers

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = spectrogram(x, self.window, self.hop)
        fmap, last = [], []
        for (low, high), stack in zip(self.edges, self.band_discriminators, strict=True):
            fmap += activations(stack, x[..., low:high])
            last.append(fmap[-1])
        return self.output_conv(torch.cat(last, dim=-1)), fmap


class MultiResolutionDiscriminator(nn.Module):
    """(B, nch, T) -> (scores, fmaps)."""

    def __init__(
        self,
        nch=1,
        sample_rate=48000,
        window_lengths=(2048, 1024, 512),
        hop_factor=0.25,
        bands=BANDS,
        norm=True,
        hidden_channels=32,
    ):
        super().__init__()
        self.discriminators = nn.ModuleList(
            ResolutionDiscriminator(nch, window, hop_factor, bands, norm, hidden_channels) for window in window_lengths
        )

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        return run_all(self.discriminators, x)
