"""Judges complex spectra at several resolutions, after EnCodec's MS-STFT discriminator."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastblocks.discriminator._layers import (
    Conv2d,
    ConvLayer,
    Discriminators,
    Norm,
    SpectrumDiscriminator,
    run_layers,
    same_padding,
    shared,
)

# out channels in units of hidden_channels, kernel, stride, dilation
_LAYERS = (
    (1, (3, 9), (1, 1), (1, 1)),
    (2, (3, 9), (1, 2), (1, 1)),
    (4, (3, 9), (1, 2), (2, 1)),
    (8, (3, 9), (1, 2), (4, 1)),
    (16, (3, 3), (1, 1), (1, 1)),
    (32, (3, 3), (1, 1), (1, 1)),
)


class FrequencyDiscriminator(SpectrumDiscriminator):
    """Convolves the spectrum of a clip of unit energy.

    Args:
        window_size: samples of a window; the hop is half of it.
        nch: channels of the audio.
        hidden_channels: width of the first layer.
        sample_rate: in Hz; only the first int(bins · sample_rate / 48000) bins are used.
        norm: of every convolution but the last: 'spectral' (or True), 'weight', or False.
    """

    def __init__(self, window_size: int, nch: int, hidden_channels: int, sample_rate: int, norm: Norm):
        super().__init__(window_size, window_size // 2)
        bins = window_size // 2 + 1
        self.bins = min(bins, int(bins * sample_rate / 48000))
        if self.bins < 1:
            raise ValueError(f"no bin of a window of {window_size} is left at a sample_rate of {sample_rate} Hz")
        self.layers, width = nn.ModuleList(), 2 * nch
        for factor, kernel, stride, dilation in _LAYERS:
            out = factor * hidden_channels
            conv = Conv2d(width, out, kernel, stride, same_padding(kernel, dilation), dilation)
            self.layers.append(ConvLayer(conv, norm))
            width = out
        self.output_conv = Conv2d(width, 1, (3, 3), padding=(1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        spectrum = self.spectrum(shared(("unit energy",), x, lambda: _of_unit_energy(x)))
        fmap: list[Tensor] = []
        y = run_layers(self.layers, spectrum[..., : self.bins].to(x.dtype), fmap)
        return self.output_conv(y), fmap


def _of_unit_energy(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    energy = wide.square().sum(dim=(1, 2), keepdim=True)
    return wide / (energy + torch.finfo(torch.float32).eps).sqrt()


class MultiFrequencyDiscriminator(Discriminators):
    """One FrequencyDiscriminator per window size: audio (B, nch, T) -> (scores, fmaps).

    Source: Défossez et al., "High Fidelity Neural Audio Compression", 2022.

    Args:
        nch: channels of the audio.
        window_sizes: in samples, one for each sub-discriminator.
        hidden_channels: width of the first layer.
        sample_rate: in Hz; decides how many bins are used.
        norm: of every convolution but the last: 'spectral' (or True), 'weight', or False.

    Raises:
        ValueError: in forward, if a clip is too short for a window.
    """

    def __init__(
        self,
        nch: int,
        window_sizes: Sequence[int],
        hidden_channels: int = 8,
        sample_rate: int = 48000,
        norm: Norm = True,
    ):
        super().__init__(
            nch, [FrequencyDiscriminator(size, nch, hidden_channels, sample_rate, norm) for size in window_sizes]
        )
        self.window_sizes, self.hidden_channels = list(window_sizes), hidden_channels
        self.sample_rate, self.norm, self.eps = sample_rate, norm, torch.finfo(torch.float32).eps
