"""Convolutions with spectral norm and LeakyReLU, and the spectrogram that two discriminators look at."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original.functional import wide

SLOPE = 0.2


class NormConv(nn.Module):
    """A convolution, with spectral norm if `norm`."""

    def __init__(self, conv: nn.Module, norm: bool):
        super().__init__()
        self.conv = nn.utils.spectral_norm(conv) if norm else conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def activations(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """The output of every layer after its LeakyReLU, in order."""
    fmap = []
    for layer in layers:
        x = F.leaky_relu(layer(x), SLOPE)
        fmap.append(x)
    return fmap


def spectrogram(x: Tensor, n_fft: int, hop: int) -> Tensor:
    """(B, nch, T) -> (B, 2·nch, frames, bins), the channels being L.re, L.im, R.re, R.im."""
    batch, channels, length = x.shape
    flat = wide(x).reshape(batch * channels, length)
    window = torch.hann_window(n_fft, dtype=flat.dtype, device=x.device)
    spectrum = torch.stft(flat, n_fft, hop, window=window, return_complex=True)
    parts = torch.view_as_real(spectrum)  # (B·nch, bins, frames, 2)
    parts = parts.permute(0, 3, 2, 1).reshape(batch, 2 * channels, parts.shape[2], parts.shape[1])
    return parts.type_as(x)


def run_all(discriminators: nn.ModuleList, x: Tensor) -> tuple[list, list]:
    """(scores, fmaps), an entry a sub-discriminator."""
    scores, fmaps = [], []
    for discriminator in discriminators:
        score, fmap = discriminator(x)
        scores.append(score)
        fmaps.append(fmap)
    return scores, fmaps
