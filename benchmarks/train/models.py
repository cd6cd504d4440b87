"""Three small restoration models, built from the blocks of a kit: `fastblocks`, or `benchmarks.original`.

Both kits give a model the same state_dict. All models work alike: STFT, band split, blocks on (B, C, frames, bands),
band join to a complex mask, mask times the mixture's spectrum, inverse STFT.
"""

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor, nn

MASK_INIT = 0.1  # scale of the last layer at the start: the mask begins near 1, so the model begins near "do nothing"
COMPRESSION = 0.3  # exponent of the magnitudes that the blocks see; loudness in music spans 60 dB and more


class MaskModel(nn.Module):
    """Waveform (B, samples) -> waveform (B, samples); a subclass says in `body` what happens between split and join.

    Args:
        kit: where the blocks come from.
        channels: C, the width of a band after the split.
        sample_rate: in Hz.
        n_fft, hop_length: of the STFT, in samples.
        bands: K, mel bands.
    """

    def __init__(
        self,
        kit: ModuleType,
        channels: int,
        *,
        sample_rate: int = 48000,
        n_fft: int = 2048,
        hop_length: int = 512,
        bands: int = 64,
    ):
        super().__init__()
        self.fourier = kit.Fourier(n_fft, hop_length)
        self.band = kit.Band(sample_rate, n_fft, bands, in_channels=2, out_channels=channels)
        with torch.no_grad():
            self.band.post_bandnet.weight.mul_(MASK_INIT)
            self.band.post_bandnet.bias.zero_()

    def body(self, x: Tensor) -> Tensor:
        """(B, C, frames, K) -> the same shape."""
        raise NotImplementedError

    def forward(self, waveform: Tensor) -> Tensor:
        spectrum = self.fourier.stft(waveform)  # (B, F, frames, 2)
        power = spectrum.square().sum(-1, keepdim=True)
        features = spectrum * (power + 1e-8) ** ((COMPRESSION - 1) / 2)
        features = features.to(self.band.pre_bandnet.weight.dtype)
        mask = self.band.unsplit(self.body(self.band.split(features))).to(spectrum.dtype)
        (real, imag), (x, y) = (1 + mask[..., 0], mask[..., 1]), spectrum.unbind(-1)
        restored = torch.stack([real * x - imag * y, real * y + imag * x], dim=-1)
        return self.fourier.istft(restored, waveform.shape[-1])


class _DualPath(MaskModel):
    """Every layer is a block along time (a sequence of frames for each band), then one along frequency."""

    time_blocks: nn.ModuleList
    band_blocks: nn.ModuleList

    def body(self, x: Tensor) -> Tensor:
        batch, channels, frames, bands = x.shape
        x = x.permute(0, 3, 2, 1)  # (B, K, frames, C)
        for along_time, along_bands in zip(self.time_blocks, self.band_blocks, strict=True):
            x = along_time(x.reshape(batch * bands, frames, channels)).view(batch, bands, frames, channels)
            x = x.transpose(1, 2)
            x = along_bands(x.reshape(batch * frames, bands, channels)).view(batch, frames, bands, channels)
            x = x.transpose(1, 2)
        return x.permute(0, 3, 2, 1)


class MelRoFormer(_DualPath):
    """Attention along time and along frequency in turn, after Wang et al., "Mel-RoFormer for Vocal Separation", 2024.

    Args:
        layers: pairs of blocks, one along time and one along frequency.
        heads: of every block.
        max_frames: the longest clip, in STFT frames.
        **spectrum: what `MaskModel` takes.
    """

    def __init__(self, kit, channels=128, layers=12, heads=4, *, max_frames=1024, bands=64, **spectrum):
        super().__init__(kit, channels, bands=bands, **spectrum)
        self.time_blocks = nn.ModuleList(kit.RoFormerBlock(channels, heads, max_frames) for _ in range(layers))
        self.band_blocks = nn.ModuleList(kit.RoFormerBlock(channels, heads, bands) for _ in range(layers))


class MelRNN(_DualPath):
    """Grouped GRUs along time (forward only) and along frequency (both directions) in turn.

    Args:
        layers: pairs of blocks, one along time and one along frequency.
        groups: of every block.
        rnn_layers: depth of the recurrence in a block.
        **spectrum: what `MaskModel` takes.
    """

    def __init__(self, kit, channels=128, layers=9, groups=8, *, rnn_layers=2, **spectrum):
        super().__init__(kit, channels, **spectrum)
        shape = (channels, rnn_layers, groups, "gru")
        self.time_blocks = nn.ModuleList(kit.RNNBlock(*shape, bidirectional=False) for _ in range(layers))
        self.band_blocks = nn.ModuleList(kit.RNNBlock(*shape, bidirectional=True) for _ in range(layers))


class MelUNet(MaskModel):
    """A U-Net of ConvNeXt blocks on the (frames, bands) plane; every stage halves both sizes and doubles the channels.

    Args:
        channels: of the first stage.
        stages: how many; the last is the bottom.
        **spectrum: what `MaskModel` takes.
    """

    def __init__(self, kit, channels=32, stages=4, **spectrum):
        super().__init__(kit, channels, **spectrum)
        widths = [channels * 2**stage for stage in range(stages)]
        pairs = list(pairwise(widths))

        def stage(width):
            return nn.Sequential(kit.ConvNeXt2DBlock(7, 1, width, width))

        def step(mode, source, target):
            return kit.ConvNeXt2DBlock(7, 2, source, target, mode)

        self.encoder = nn.ModuleList(stage(width) for width in widths)
        self.down = nn.ModuleList(step("normal", narrow, wide) for narrow, wide in pairs)
        self.up = nn.ModuleList(step("transposed", wide, narrow) for narrow, wide in pairs)
        self.decoder = nn.ModuleList(stage(width) for width in widths[:-1])

    def body(self, x: Tensor) -> Tensor:
        skips = []
        for stage, down in zip(self.encoder, self.down, strict=False):
            x = stage(x)
            skips.append(x)
            x = down(x)
        x = self.encoder[-1](x)
        for up, stage, skip in zip(reversed(self.up), reversed(self.decoder), reversed(skips), strict=True):
            x = stage(up(x, tuple(skip.shape[2:])) + skip)
        return x
