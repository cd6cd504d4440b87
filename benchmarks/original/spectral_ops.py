"""STFT and band split, by index, mask and einsum."""

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.original.functional import wide


class Fourier(nn.Module):
    """Short-time Fourier transform with a hann window, centred, reflect-padded."""

    def __init__(self, n_fft: int = 2048, hop_length: int = 441):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft))

    def stft(self, waveform: Tensor) -> Tensor:
        """(B, T) -> (B, F, frames, 2)."""
        spectrum = torch.stft(
            wide(waveform), self.n_fft, self.hop_length, window=wide(self.window), return_complex=True
        )
        return torch.view_as_real(spectrum)

    def istft(self, sp: Tensor, original_length: int) -> Tensor:
        """(B, F, frames, 2) -> (B, T)."""
        spectrum = torch.view_as_complex(wide(sp).contiguous())
        return torch.istft(spectrum, self.n_fft, self.hop_length, window=wide(self.window), length=original_length)


def mel_filterbanks(sr: int, n_fft: int, bands_num: int) -> np.ndarray:
    """Slaney's triangular filters without area normalization, (K, F) float32, 0 Hz to sr / 2.

    Source: Slaney, "Auditory Toolbox", 1998: linear below 1 kHz (200/3 Hz a mel), logarithmic above (27 mels to 6.4
    kHz). The order of operations is librosa's, so that every bit is, too.
    """
    hz_per_mel, knee_hz, log_step = 200.0 / 3, 1000.0, np.log(6.4) / 27.0
    knee_mel = knee_hz / hz_per_mel
    top = sr / 2
    top_mel = knee_mel + np.log(top / knee_hz) / log_step if top >= knee_hz else top / hz_per_mel
    mels = np.linspace(0.0, top_mel, bands_num + 2)
    edges = np.where(mels >= knee_mel, knee_hz * np.exp(log_step * (mels - knee_mel)), hz_per_mel * mels)
    bins = np.fft.rfftfreq(n_fft, d=1.0 / sr)
    widths, ramps = np.diff(edges), np.subtract.outer(edges, bins)
    filters = np.zeros((bands_num, 1 + n_fft // 2), dtype=np.float32)
    for k in range(bands_num):
        filters[k] = np.maximum(0, np.minimum(-ramps[k] / widths[k], ramps[k + 2] / widths[k + 1]))
    return filters


def linear_filterbanks(n_fft: int, bands_num: int) -> np.ndarray:
    """Triangles of equal width, (K, F) float32; a band without a bin on either side of its middle has none."""
    bins = n_fft // 2 + 1
    edges = np.linspace(0, bins, bands_num + 2).astype(int)
    filters = np.zeros((bands_num, bins), dtype=np.float32)
    for k, (start, mid, end) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        if start < mid < end:
            filters[k, start:mid] = np.linspace(0, 1, mid - start)
            filters[k, mid:end] = np.linspace(1, 0, end - mid)
    return filters


class BandLinear(nn.Module):
    """A linear layer for each band: (…, K, I) -> (…, K, O)."""

    def __init__(self, bands_num: int, in_channels: int, out_channels: int):
        super().__init__()
        bound = in_channels**-0.5
        self.weight = nn.Parameter(torch.empty(bands_num, in_channels, out_channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(bands_num, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...ki,kio->...ko", x, self.weight) + self.bias


class Band(nn.Module):
    """Split a spectrum into overlapping bands of a common number of channels, and join them again."""

    def __init__(self, sr: int, n_fft: int, bands_num: int, in_channels: int, out_channels: int, scale: str = "mel"):
        super().__init__()
        filters = mel_filterbanks(sr, n_fft, bands_num) if scale == "mel" else linear_filterbanks(n_fft, bands_num)
        filters = torch.from_numpy(filters)
        self.bands_num, self.in_channels = bands_num, in_channels
        self.width = max(1, int((filters > 0).sum(1).max()))
        f_idxes = torch.zeros(bands_num, self.width, dtype=torch.int64)
        mask = torch.zeros(bands_num, self.width)
        for k in range(bands_num):
            bins = torch.nonzero(filters[k]).flatten()
            f_idxes[k, : len(bins)] = bins
            mask[k, : len(bins)] = 1
        total = filters.sum(0)
        self.register_buffer("filterbanks", filters)
        self.register_buffer("ola_window", torch.where(total < 1e-8, torch.ones_like(total), total))
        self.register_buffer("f_idxes", f_idxes.flatten())
        self.register_buffer("mask", mask.flatten())
        self.pre_bandnet = BandLinear(bands_num, self.width * in_channels, out_channels)
        self.post_bandnet = BandLinear(bands_num, out_channels, self.width * in_channels)

    def split(self, x: Tensor) -> Tensor:
        """(B, F, T, in) -> (B, out, T, K)."""
        batch, _, frames, channels = x.shape
        lanes = x[:, self.f_idxes] * self.mask[:, None, None]
        lanes = lanes.reshape(batch, self.bands_num, self.width, frames, channels)
        lanes = lanes.permute(0, 3, 1, 2, 4).reshape(batch, frames, self.bands_num, -1)
        return self.pre_bandnet(lanes).permute(0, 3, 1, 2)

    def unsplit(self, x: Tensor) -> Tensor:
        """(B, out, T, K) -> (B, F, T, in)."""
        batch, _, frames, _ = x.shape
        lanes = self.post_bandnet(x.permute(0, 2, 3, 1))
        lanes = lanes.reshape(batch, frames, self.bands_num * self.width, self.in_channels).transpose(1, 2)
        lanes = lanes * self.mask[:, None, None]
        bins = lanes.new_zeros(batch, len(self.ola_window), frames, self.in_channels)
        return bins.index_add(1, self.f_idxes, lanes) / self.ola_window[:, None, None]
