"""Short-time Fourier transforms as sums, mel filters from their definition, band projections as a loop over bands."""

import math

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


def hann(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(size, dtype=torch.float64) / size)).to(dtype)


def _angles(n_fft: int) -> Tensor:
    """2π·f·n/N for f ≤ N/2, reduced exactly before the division."""
    product = torch.arange(n_fft // 2 + 1)[:, None] * torch.arange(n_fft) % n_fft
    return 2 * math.pi * product.double() / n_fft


def reflected(x: Tensor, before: int, after: int) -> Tensor:
    """Reflection without repeating the edge, along the last dimension."""
    at = torch.arange(-before, x.shape[-1] + after).abs()
    last = x.shape[-1] - 1
    return x[..., last - (at - last).abs()]


def stft(x: Tensor, n_fft: int, hop: int) -> Tensor:
    """(…, T) -> (…, F, frames, 2): hann window, centred frames, reflected ends."""
    frames = reflected(x, n_fft // 2, n_fft // 2).unfold(-1, n_fft, hop) * hann(n_fft, x.dtype)
    angle = _angles(n_fft).to(x.dtype)
    return torch.stack([frames @ angle.cos().T, -(frames @ angle.sin().T)], dim=-1).transpose(-2, -3)


def istft(spectrum: Tensor, n_fft: int, hop: int, length: int) -> Tensor:
    """(B, F, frames, 2) -> (B, T): the least-squares inverse: windowed overlap-add over the sum of squared windows."""
    angle, window = _angles(n_fft), hann(n_fft)
    weight = torch.full((n_fft // 2 + 1,), 2.0, dtype=torch.float64)
    weight[0] = 1
    if n_fft % 2 == 0:
        weight[-1] = 1
    real, imaginary = spectrum.transpose(1, 2).unbind(-1)  # (B, frames, F)
    frames = ((real * weight) @ angle.cos() - (imaginary * weight) @ angle.sin()) / n_fft
    total = torch.zeros(len(spectrum), n_fft + hop * (frames.shape[1] - 1), dtype=torch.float64)
    squares = torch.zeros(total.shape[1], dtype=torch.float64)
    for index in range(frames.shape[1]):
        here = slice(index * hop, index * hop + n_fft)
        total[:, here] = total[:, here] + frames[:, index] * window
        squares[here] += window**2
    keep = slice(n_fft // 2, n_fft // 2 + length)
    return total[:, keep] / squares[keep]


def hz_to_mel(hz: float) -> float:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def mel_to_hz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def mel_filterbank(sr: int, n_fft: int, bands: int) -> np.ndarray:
    """(K, F) float64: triangles between equally spaced mels from 0 to sr/2, peak 1."""
    top = hz_to_mel(sr / 2)
    corners = [mel_to_hz(top * i / (bands + 1)) for i in range(bands + 2)]
    result = np.zeros((bands, n_fft // 2 + 1))
    for k in range(bands):
        low, mid, high = corners[k : k + 3]
        for f in range(n_fft // 2 + 1):
            hz = f * sr / n_fft
            result[k, f] = max(0.0, min((hz - low) / (mid - low), (high - hz) / (high - mid)))
    return result


def linear_filterbank(n_fft: int, bands: int) -> np.ndarray:
    """(K, F): triangles over whole bins, rising to 1 and falling to 0 with both ends included; nothing where one of
    the sides has no bin."""
    bins = n_fft // 2 + 1
    edges = np.linspace(0, bins, bands + 2).astype(int)
    result = np.zeros((bands, bins))
    for k in range(bands):
        low, mid, high = edges[k : k + 3]
        if low == mid or mid == high:
            continue
        result[k, low:mid] = [i / (mid - low - 1) if mid - low > 1 else 0 for i in range(mid - low)]
        result[k, mid:high] = [1 - i / (high - mid - 1) if high - mid > 1 else 1 for i in range(high - mid)]
    return result


def band_bins(filterbanks: Tensor) -> list[list[int]]:
    return [[f for f in range(filterbanks.shape[1]) if row[f] != 0] for row in filterbanks]


def band_split(state: State, x: Tensor) -> Tensor:
    """(B, F, T, in) -> (B, out, T, K): of each band the bins under its filter, bin-major, through its own Linear."""
    outputs = []
    for k, bins in enumerate(band_bins(state["filterbanks"])):
        lanes = x[:, bins].transpose(1, 2).flatten(2)  # (B, T, n·in)
        weight = state["pre_bandnet.weight"][k, : lanes.shape[-1]]
        outputs.append(lanes @ weight + state["pre_bandnet.bias"][k])
    return torch.stack(outputs, dim=-1).transpose(1, 2)


def band_unsplit(state: State, x: Tensor, channels: int) -> Tensor:
    """(B, out, T, K) -> (B, F, T, in): each band's Linear, added up where bands overlap, over `ola_window`."""
    filterbanks = state["filterbanks"]
    total = x.new_zeros(len(x), filterbanks.shape[1], x.shape[2], channels)
    total = total + x[:0].sum()  # part of the graph, even if no band has a bin
    for k, bins in enumerate(band_bins(filterbanks)):
        lanes = x[..., k].transpose(1, 2) @ state["post_bandnet.weight"][k] + state["post_bandnet.bias"][k]
        for lane, f in enumerate(bins):
            total[:, f] = total[:, f] + lanes[..., lane * channels : (lane + 1) * channels]
    return total / state["ola_window"][:, None, None]
