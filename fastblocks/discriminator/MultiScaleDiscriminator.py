"""Judges waveforms at several sample rates, after MelGAN."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastblocks.discriminator._layers import Conv1d, ConvLayer, Discriminators, Norm, run_layers

# out channels, kernel, stride, groups; padding keeps the size at stride 1
_LAYERS = ((16, 15, 1, 1), (64, 41, 4, 4), (256, 41, 4, 16), (1024, 41, 4, 64), (1024, 41, 4, 256), (1024, 5, 1, 1))


class ScaleDiscriminator(nn.Module):
    """Convolves a waveform (B, nch, T), first resampled by 1 / downsample_rate.

    Args:
        downsample_rate: by how much, 1 for not at all.
        nch: channels of the audio.
        norm: of every convolution: 'spectral' (or True), 'weight', or False.
    """

    def __init__(self, downsample_rate: float, nch: int, norm: Norm):
        super().__init__()
        if downsample_rate < 1:
            raise ValueError(f"downsample_rates must be at least 1, got {downsample_rate}")
        self.downsample_rate, self.nch = downsample_rate, nch
        # interpolation gives floor(T · (1 / rate)) samples, and needs one
        self.shortest_clip = next(n for n in range(1, int(downsample_rate) + 2) if int(n * (1 / downsample_rate)))
        self.layers = nn.ModuleList()
        for width, kernel, stride, groups in _LAYERS:
            conv = Conv1d(nch, width, kernel, stride=stride, padding=kernel // 2, groups=groups)
            self.layers.append(ConvLayer(conv, norm))
            nch = width
        self.output_conv = ConvLayer(Conv1d(nch, 1, 3, padding=1), norm, activate=False)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.downsample_rate > 1:
            x = F.interpolate(x, scale_factor=1 / self.downsample_rate, mode="linear", align_corners=False)
        fmap: list[Tensor] = []
        return self.output_conv(run_layers(self.layers, x, fmap)), fmap


class MultiScaleDiscriminator(Discriminators):
    """One ScaleDiscriminator per rate: audio (B, nch, T) -> (scores, fmaps).

    Source: Kumar et al., "MelGAN", 2019.

    Args:
        sample_rate: in Hz; of no effect, kept for the signature.
        downsample_rates: one for each sub-discriminator; 1 is the clip itself.
        nch: channels of the audio.
        norm: of every convolution: 'spectral' (or True), 'weight', or False.

    Raises:
        ValueError: in forward, if nothing is left of a clip.
    """

    def __init__(self, sample_rate: int, downsample_rates: Sequence[float] = (2, 4), nch: int = 1, norm: Norm = True):
        super().__init__(nch, [ScaleDiscriminator(rate, nch, norm) for rate in downsample_rates])
        self.sample_rate, self.downsample_rates, self.norm = sample_rate, list(downsample_rates), norm
