"""Waveform to spectrum and back, spectrum to bands and back."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.workloads.flops import linear
from benchmarks.workloads.workload import SAMPLE_RATE, Workload
from fastblocks.spectral_ops import covered_bins, mel_filterbank

FULL = (4, 282, 2048, 64, 128, SAMPLE_RATE)  # fits a CPU, too
SHAPES = {"full": FULL, "cpu": FULL, "toy": (1, 5, 64, 6, 4, 8000)}  # B, frames, n_fft, K, channels, sample rate


class Method(nn.Module):
    """A module of which one method is called."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.module, self.method)(x)


class RoundTrip(nn.Module):
    """Waveform -> spectrum, and the waveform again."""

    def __init__(self, fourier: nn.Module):
        super().__init__()
        self.fourier = fourier

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = self.fourier.stft(waveform)
        return spectrum, self.fourier.istft(spectrum, waveform.shape[-1])


def laid(*shape: int, order: tuple[int, ...]) -> Callable[[torch.Generator], list[Tensor]]:
    """A normally distributed tensor with these dimensions, in this order in memory."""

    def draw(generator: torch.Generator) -> list[Tensor]:
        back = sorted(range(len(order)), key=order.__getitem__)
        return [torch.randn([shape[i] for i in order], generator=generator).permute(back)]

    return draw


def workloads(size: str) -> list[Workload]:
    """A spectrum lies as `torch.stft` gives it, bands as blocks leave them: with adjacent channels."""
    b, frames, n_fft, k, channels, rate = SHAPES[size]
    lanes = 2 * sum(end - start for start, end in covered_bins(mel_filterbank(rate, n_fft, k)))
    flops = linear(b * frames, lanes, channels)
    samples, spectrum = (b, (frames - 1) * n_fft // 4), (b, n_fft // 2 + 1, frames, 2)

    def band(kit):
        return kit.Band(rate, n_fft, k, 2, channels)

    text = f"{spectrum}, K {k}, out {channels}"
    return [
        Workload(
            "band-stft", "layer", f"{samples}, {n_fft}/{n_fft // 4}, there and back",
            lambda kit: RoundTrip(kit.Fourier(n_fft, n_fft // 4)), laid(*samples, order=(0, 1)),
        ),
        Workload(
            "band-split", "layer", text, lambda kit: Method(band(kit), "split"), laid(*spectrum, order=(0, 2, 1, 3)),
            flops,
        ),
        Workload(
            "band-unsplit", "layer", text, lambda kit: Method(band(kit), "unsplit"),
            laid(b, channels, frames, k, order=(0, 2, 3, 1)), flops,
        ),
    ]  # fmt: skip
