"""Waveform to spectrum and back, spectrum to bands and back."""

from torch import Tensor, nn

from benchmarks.workloads.workload import SAMPLE_RATE, Workload, normal

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


def workloads(size: str) -> list[Workload]:
    b, frames, n_fft, k, channels, rate = SHAPES[size]
    samples, spectrum = (b, (frames - 1) * n_fft // 4), (b, n_fft // 2 + 1, frames, 2)

    def band(kit):
        return kit.Band(rate, n_fft, k, 2, channels)

    text = f"{spectrum}, K {k}, out {channels}"
    return [
        Workload(
            "band-stft", "layer", f"{samples}, {n_fft}/{n_fft // 4}, there and back",
            lambda kit: RoundTrip(kit.Fourier(n_fft, n_fft // 4)), normal(samples),
        ),
        Workload("band-split", "layer", text, lambda kit: Method(band(kit), "split"), normal(spectrum)),
        Workload(
            "band-unsplit", "layer", text, lambda kit: Method(band(kit), "unsplit"), normal((b, channels, frames, k))
        ),
    ]  # fmt: skip
