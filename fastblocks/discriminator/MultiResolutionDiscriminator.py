"""Judges complex spectra band by band at several resolutions, after the Descript Audio Codec."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastblocks.discriminator._layers import (
    Conv2d,
    ConvLayer,
    Discriminators,
    Norm,
    SpectrumDiscriminator,
    band_edges,
    run_layers,
    same_padding,
)

BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
_LAYERS = (((3, 9), (1, 1)), ((3, 9), (1, 2)), ((3, 9), (1, 2)), ((3, 9), (1, 2)), ((3, 3), (1, 1)))  # kernel, stride


class ResolutionDiscriminator(SpectrumDiscriminator):
    """Convolves each band of a spectrum by itself, and all bands' outputs, side by side, once more.

    Args:
        window_length: samples of a window.
        hop_factor: the hop as a fraction of it.
        nch: channels of the audio.
        bands: fractions (from, to) of the bins.
        hidden_channels: width of every layer.
        norm: of every convolution: 'spectral' (or True), 'weight', or False.
    """

    def __init__(
        self,
        window_length: int,
        hop_factor: float,
        nch: int,
        bands: Sequence[tuple[float, float]],
        hidden_channels: int,
        norm: Norm,
    ):
        super().__init__(window_length, int(window_length * hop_factor))
        self.nch = nch
        self.bands = band_edges(bands, window_length // 2 + 1)
        self.band_discriminators = nn.ModuleList()
        for _ in bands:
            layers, width = nn.ModuleList(), 2 * nch
            for kernel, stride in _LAYERS:
                conv = Conv2d(width, hidden_channels, kernel, stride=stride, padding=same_padding(kernel))
                layers.append(ConvLayer(conv, norm))
                width = hidden_channels
            self.band_discriminators.append(layers)
        self.output_conv = ConvLayer(Conv2d(hidden_channels, 1, (3, 3), padding=(1, 1)), norm, activate=False)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        spectrum = self.spectrum(x)
        fmap: list[Tensor] = []
        outputs = [
            run_layers(layers, spectrum[..., start:end], fmap)
            for layers, (start, end) in zip(self.band_discriminators, self.bands, strict=True)
        ]
        return self.output_conv(torch.cat(outputs, dim=-1)), fmap


class MultiResolutionDiscriminator(Discriminators):
    """One ResolutionDiscriminator per window length: audio (B, nch, T) -> (scores, fmaps).

    Source: Kumar et al., "High-Fidelity Audio Compression with Improved RVQGAN", 2023.

    Args:
        nch: channels of the audio.
        sample_rate: in Hz; of no effect, kept for the signature.
        window_lengths: in samples, one for each sub-discriminator.
        hop_factor: the hop as a fraction of the window.
        bands: fractions (from, to) of the bins.
        norm: of every convolution: 'spectral' (or True), 'weight', or False.
        hidden_channels: width of every layer.

    Raises:
        ValueError: for a band without a bin; in forward, if a clip is too short for a window.
    """

    def __init__(
        self,
        nch: int = 1,
        sample_rate: int = 48000,
        window_lengths: Sequence[int] = (2048, 1024, 512),
        hop_factor: float = 0.25,
        bands: Sequence[tuple[float, float]] = BANDS,
        norm: Norm = True,
        hidden_channels: int = 32,
    ):
        super().__init__(
            nch,
            [
                ResolutionDiscriminator(length, hop_factor, nch, bands, hidden_channels, norm)
                for length in window_lengths
            ],
        )
        self.sample_rate, self.norm, self.hidden_channels = sample_rate, norm, hidden_channels
        self.window_lengths, self.hop_factor, self.bands = list(window_lengths), hop_factor, list(bands)
