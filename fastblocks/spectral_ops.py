"""Between waveforms, spectra and bands: the short-time Fourier transform and a learned band split."""

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastblocks import functional
from fastblocks.eager.autocast import autocast_enabled, without_autocast
from fastblocks.eager.derivatives import must_trace
from fastblocks.generator._layers import may_fuse


class Fourier(nn.Module):
    """Short-time Fourier transform and its inverse, Hann window, centred, reflect-padded.

    Computed in float32 (float64 for float64), whatever the module's dtype; results are returned in the input's dtype,
    but under autocast, whose operations cast their inputs, in the dtype they were computed in.

    Args:
        n_fft: window length in samples.
        hop_length: samples from one frame to the next.

    Raises:
        ValueError: if a length is not positive.
    """

    window: Tensor

    def __init__(self, n_fft: int = 2048, hop_length: int = 441):
        super().__init__()
        if n_fft < 1 or hop_length < 1:
            raise ValueError(f"n_fft and hop_length must be positive, got {n_fft} and {hop_length}")
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft))

    def stft(self, waveform: Tensor) -> Tensor:
        """(B, T) -> (B, F, frames, 2): real and imaginary parts, F = n_fft // 2 + 1, frames = T // hop_length + 1.

        Raises:
            ValueError: if T is too short for a reflect pad of n_fft // 2.
        """
        if waveform.dim() != 2:
            raise ValueError(f"stft needs a waveform of shape (B, T), got {tuple(waveform.shape)}")
        spectrum = short_time_spectrum(waveform, self._window(waveform), self.hop_length)
        return self._result(torch.view_as_real(spectrum), waveform)

    def istft(self, sp: Tensor, original_length: int) -> Tensor:
        """(B, F, frames, 2) -> (B, original_length).

        Raises:
            ValueError: if sp has another shape, or no frame.
        """
        if sp.dim() != 4 or sp.shape[1] != self.n_fft // 2 + 1 or sp.shape[3] != 2:
            raise ValueError(f"istft needs sp of shape (B, {self.n_fft // 2 + 1}, frames, 2), got {tuple(sp.shape)}")
        if sp.shape[2] == 0:
            raise ValueError(f"istft needs at least one frame, got sp of shape {tuple(sp.shape)}")
        window = self._window(sp)
        if sp.shape[0] == 0:  # FFT libraries refuse an empty batch
            return self._result(sp[:, 0, :1, 0].to(window.dtype).expand(-1, original_length), sp)
        with without_autocast(sp.device):
            spectrum = _as_complex(sp.to(window.dtype).transpose(1, 2))
            frames = torch.fft.irfft(spectrum, self.n_fft) * window  # (B, frames, n_fft)
            # torch.istft would synchronise with the GPU here, to check the envelope's minimum
            envelope = self._overlap_add((window * window).expand(1, frames.shape[1], -1))
            y = self._overlap_add(frames) / envelope.where(envelope > 1e-11, 1)
            start = self.n_fft // 2
            y = y[:, start : start + original_length]
            y = F.pad(y, (0, original_length - y.shape[1]))
        return self._result(y, sp)

    def _result(self, y: Tensor, x: Tensor) -> Tensor:
        return y if autocast_enabled(x.device) else y.to(x.dtype)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """(B, frames, n_fft) -> (B, (frames - 1) · hop_length + n_fft): the transpose of framing."""
        length = (frames.shape[1] - 1) * self.hop_length + self.n_fft
        # what torch.istft calls, too; torch.nn.functional.fold takes eight times as long on a CPU
        return torch.ops.aten.unfold_backward(frames, [frames.shape[0], length], 1, self.n_fft, self.hop_length)

    def _window(self, x: Tensor) -> Tensor:
        """The window in the dtype of the transform; a window that was cast to 16 bits is computed again."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.window.dtype in (torch.bfloat16, torch.float16):
            return torch.hann_window(self.n_fft, dtype=wide, device=self.window.device)
        return self.window.to(wide)

    def extra_repr(self) -> str:
        return f"n_fft={self.n_fft}, hop_length={self.hop_length}"


def _as_complex(pairs: Tensor) -> Tensor:
    """(…, 2) -> complex (…), a view where strides allow it: those of an STFT and of `Band.unsplit` do."""
    fits = not must_trace() and (
        pairs.stride(-1) == 1
        and pairs.storage_offset() % 2 == 0
        and all(stride % 2 == 0 for stride in pairs.stride()[:-1])
    )
    return torch.view_as_complex(pairs if fits else pairs.contiguous())


def short_time_spectrum(waveform: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """(N, T) -> complex (N, F, frames), centred and reflect-padded, in the window's dtype even under autocast.

    Raises:
        ValueError: if T is too short for a reflect pad of n_fft // 2.
    """
    n_fft, length = window.shape[0], waveform.shape[-1]
    shortest = n_fft // 2 + 1
    if length < shortest:
        raise ValueError(
            f"{length} samples are too short for a window of {n_fft}: the shortest clip that works has {shortest}"
        )
    if waveform.shape[0] == 0:  # FFT libraries refuse an empty batch
        frames = (length + 2 * (n_fft // 2) - n_fft) // hop_length + 1
        return waveform[:, :1, None].to(window.dtype.to_complex()).expand(-1, shortest, frames)
    with without_autocast(waveform.device):
        # torch.stft's steps, but for frames by `unfold`: its gradient is one sum in a fixed order, that of the strides
        # torch.stft takes adds samples up by index, with atomics, in four passes over the frames
        padded = F.pad(waveform.to(window.dtype)[None], (n_fft // 2, n_fft // 2), mode="reflect").squeeze(0)
        return torch.fft.rfft(padded.unfold(-1, n_fft, hop_length) * window).transpose(1, 2)


def _slaney_mel_edges(sr: float, bands: int) -> np.ndarray:
    """Band edges in Hz on Slaney's mel scale: linear to 1 kHz (15 mel), logarithmic above; bands + 2 of them."""
    linear, corner, logstep = 200.0 / 3, 1000.0, np.log(6.4) / 27.0
    corner_mel = corner / linear

    def to_mel(hertz: float) -> float:
        return corner_mel + np.log(hertz / corner) / logstep if hertz >= corner else hertz / linear

    mels = np.linspace(to_mel(0.0), to_mel(sr / 2), bands + 2)
    return np.where(mels >= corner_mel, corner * np.exp(logstep * (mels - corner_mel)), linear * mels)


def mel_filterbank(sr: float, n_fft: int, bands: int) -> np.ndarray:
    """Triangular filters on Slaney's mel scale, peaks of 1: (bands, n_fft // 2 + 1) float32.

    Equal bit by bit to `librosa.filters.mel(sr=sr, n_fft=n_fft, n_mels=bands, norm=None)`, its rounding residue at the
    Nyquist bin included, because nonzero weights decide which bins a band covers.
    """
    bins = np.fft.rfftfreq(n=n_fft, d=1.0 / sr)
    edges = _slaney_mel_edges(sr, bands)
    widths = np.diff(edges)
    ramps = np.subtract.outer(edges, bins)
    filters = np.zeros((bands, len(bins)), dtype=np.float32)
    for k in range(bands):
        filters[k] = np.maximum(0, np.minimum(-ramps[k] / widths[k], ramps[k + 2] / widths[k + 1]))
    return filters


def linear_filterbank(n_fft: int, bands: int) -> np.ndarray:
    """Triangular filters on a linear scale: (bands, n_fft // 2 + 1) float32."""
    bins = n_fft // 2 + 1
    edges = np.linspace(0, bins, bands + 2).astype(int)
    filters = np.zeros((bands, bins), dtype=np.float32)
    for k, (start, mid, end) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        if start < mid < end:  # a band narrower than two bins is left without any, as in the original
            filters[k, start:mid] = np.linspace(0, 1, mid - start)
            filters[k, mid:end] = np.linspace(1, 0, end - mid)
    return filters


def covered_bins(filters: np.ndarray) -> list[tuple[int, int]]:
    """The bins [start, end) that each filter (K, F) covers: from its first to its last nonzero weight."""
    covered = [np.flatnonzero(weights) for weights in filters]
    return [(int(bins[0]), int(bins[-1]) + 1) if len(bins) else (0, 0) for bins in covered]


class BandLinear(nn.Module):
    """One Linear per band, (…, K, in) -> (…, K, out): weight (K, in, out), bias (K, out)."""

    def __init__(self, bands_num: int, in_channels: int, out_channels: int):
        super().__init__()
        bound = 1 / math.sqrt(in_channels)
        self.weight = nn.Parameter(torch.empty(bands_num, in_channels, out_channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(bands_num, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...ki,kio->...ko", x, self.weight) + self.bias

    def extra_repr(self) -> str:
        return "bands={}, in={}, out={}".format(*self.weight.shape)


class Band(nn.Module):
    """A learned split of a spectrum into overlapping bands, and the way back: one Linear per band.

    Band k covers the bins where its triangular filter is nonzero; a bin belongs to two bands or so. The split does not
    weight bins by the filters' values.

    Args:
        sr: sample rate in Hz.
        n_fft: of the spectrum; F = n_fft // 2 + 1.
        bands_num: K.
        in_channels: channels of a bin (2 for real and imaginary parts).
        out_channels: channels of a band.
        scale: 'mel' (Slaney's, from 0 to sr / 2) or 'linear'.

    Raises:
        ValueError: for an unknown scale or sizes that are not positive.

    Warns:
        UserWarning: names the bands that cover no bin; they give their bias alone.
    """

    filterbanks: Tensor
    ola_window: Tensor

    def __init__(self, sr: int, n_fft: int, bands_num: int, in_channels: int, out_channels: int, scale: str = "mel"):
        super().__init__()
        sizes = {
            "sr": sr,
            "n_fft": n_fft,
            "bands_num": bands_num,
            "in_channels": in_channels,
            "out_channels": out_channels,
        }
        if bad := {name: size for name, size in sizes.items() if size < 1}:
            raise ValueError(f"Band needs positive sizes, got {bad}")
        if scale not in ("mel", "linear"):
            raise ValueError(f"scale must be 'mel' or 'linear', got {scale!r}")
        self.sr, self.n_fft, self.bands_num, self.scale = sr, n_fft, bands_num, scale
        self.in_channels, self.out_channels = in_channels, out_channels
        filters = mel_filterbank(sr, n_fft, bands_num) if scale == "mel" else linear_filterbank(n_fft, bands_num)
        self.ranges = covered_bins(filters)
        if empty := [k for k, (start, end) in enumerate(self.ranges) if start == end]:
            warnings.warn(
                f"{len(empty)} of {bands_num} bands cover no bin of an n_fft of {n_fft} at {sr} Hz and give their bias "
                f"alone: {', '.join(map(str, empty))}",
                stacklevel=2,
            )
        bins, width = filters.shape[1], max(1, *(end - start for start, end in self.ranges))
        weight = torch.tensor(filters)  # unlike from_numpy it heeds `with torch.device(…)`, as the other buffers do
        total = weight.sum(0)
        lanes = torch.arange(width)
        starts, ends = torch.tensor(self.ranges).T[:, :, None]
        mask = starts + lanes < ends  # (K, Wmax)
        self.register_buffer("filterbanks", weight)
        self.register_buffer("ola_window", total.where(total >= 1e-8, 1))
        self.register_buffer("f_idxes", (starts + lanes).where(mask, 0).flatten())
        self.register_buffer("mask", mask.flatten().float())
        self.pre_bandnet = BandLinear(bands_num, width * in_channels, out_channels)
        self.post_bandnet = BandLinear(bands_num, out_channels, width * in_channels)
        self.F, self._width = bins, width

    def split(self, x: Tensor) -> Tensor:
        """(B, F, T, in_channels), or with two channels complex (B, F, T) -> (B, out_channels, T, K).

        Raises:
            ValueError: if x has another shape.
        """
        if x.is_complex() and x.dim() == 3:
            x = torch.view_as_real(x.resolve_conj())
        if x.dim() != 4 or x.shape[1] != self.F or x.shape[3] != self.in_channels:
            raise ValueError(f"split needs x of shape (B, {self.F}, T, {self.in_channels}), got {tuple(x.shape)}")
        if may_fuse("band_split", self, pre_bandnet=BandLinear):
            return functional.band_split(x, self.pre_bandnet.weight, self.pre_bandnet.bias, self.ranges)
        bands = [F.pad(x[:, start:end], (0, 0, 0, 0, 0, self._width + start - end)) for start, end in self.ranges]
        lanes = torch.stack(bands, 1).permute(0, 3, 1, 2, 4).flatten(3)  # (B, T, K, Wmax·in)
        return self.pre_bandnet(lanes).permute(0, 3, 1, 2)

    def unsplit(self, x: Tensor) -> Tensor:
        """(B, out_channels, T, K) -> (B, F, T, in_channels): overlapping bands add up, divided by `ola_window`.

        Raises:
            ValueError: if x has another shape.
        """
        if x.dim() != 4 or x.shape[1] != self.out_channels or x.shape[3] != len(self.ranges):
            raise ValueError(
                f"unsplit needs x of shape (B, {self.out_channels}, T, {len(self.ranges)}), got {tuple(x.shape)}"
            )
        some = any(start < end for start, end in self.ranges)  # else there is nothing to fuse, and zeros to derive
        if some and may_fuse("band_unsplit", self, post_bandnet=BandLinear):
            weight, bias = self.post_bandnet.weight, self.post_bandnet.bias
            return functional.band_unsplit(x, weight, bias, self.ranges, self.ola_window)
        lanes = self.post_bandnet(x.permute(0, 2, 3, 1)).unflatten(3, (self._width, self.in_channels))
        y = lanes.new_zeros(x.shape[0], self.F, x.shape[2], self.in_channels)
        for k, (start, end) in enumerate(self.ranges):
            y[:, start:end] += lanes[:, :, k, : end - start].transpose(1, 2)
        return y / self.ola_window[:, None, None]
