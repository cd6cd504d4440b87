"""Multi-scale discriminator, after Kumar et al., "MelGAN", 2019."""

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original.discriminator._layers import NormConv, activations, run_all

# out, kernel, stride, groups, padding
LAYERS = (
    (16, 15, 1, 1, 7),
    (64, 41, 4, 4, 20),
    (256, 41, 4, 16, 20),
    (1024, 41, 4, 64, 20),
    (1024, 41, 4, 256, 20),
    (1024, 5, 1, 1, 2),
)


class ScaleDiscriminator(nn.Module):
    def __init__(self, nch: int, rate: int, norm: bool):
        super().__init__()
        self.rate = rate
        inputs = (nch, *(layer[0] for layer in LAYERS))
        self.layers = nn.ModuleList(
            NormConv(nn.Conv1d(width, out, kernel, stride, padding, groups=groups), norm)
            for width, (out, kernel, stride, groups, padding) in zip(inputs, LAYERS, strict=False)
        )
        self.output_conv = NormConv(nn.Conv1d(inputs[-1], 1, 3, padding=1), norm)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.rate > 1:
            x = F.interpolate(x, scale_factor=1 / self.rate, mode="linear", align_corners=False)
        fmap = activations(self.layers, x)
        return self.output_conv(fmap[-1]), fmap


class MultiScaleDiscriminator(nn.Module):
    """(B, nch, T) -> (scores, fmaps)."""

    def __init__(self, sample_rate, downsample_rates=(2, 4), nch=1, norm=True):
        super().__init__()
        self.discriminators = nn.ModuleList(ScaleDiscriminator(nch, rate, norm) for rate in downsample_rates)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        return run_all(self.discriminators, x)
