"""Pictures of audio."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

RANGE_DB = 80  # what is softer than the loudest point by more than this is drawn alike
TICKS_KHZ = (0, 0.25, 0.5, 0.75, 1, 2, 4, 8, 16, 32)


def draw_spectrograms(path: Path, waveforms: dict[str, Tensor], sample_rate: int, n_fft: int = 2048) -> None:
    """Write a PNG of magnitude spectrograms side by side, on one colour scale.

    Args:
        path: of the PNG.
        waveforms: title -> (samples,).
        sample_rate: in Hz.
        n_fft: of the STFT, in samples; the hop is an eighth.
    """
    window = torch.hann_window(n_fft)
    pictures = {}
    for title, waveform in waveforms.items():
        spectrum = torch.stft(waveform.float().cpu(), n_fft, n_fft // 8, window=window, return_complex=True)
        pictures[title] = 20 * torch.log10(spectrum.abs() / window.sum() * 2 + 1e-8)
    loudest = max(float(picture.max()) for picture in pictures.values())
    seconds = len(next(iter(waveforms.values()))) / sample_rate

    figure = Figure(figsize=(4.2 * len(pictures) + 1, 4), layout="constrained")
    axes = figure.subplots(1, len(pictures), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        image = axis.pcolormesh(
            torch.linspace(0, seconds, picture.shape[1] + 1).numpy(),
            torch.linspace(0, sample_rate / 2000, picture.shape[0] + 1).numpy(),
            picture.numpy(),
            vmin=loudest - RANGE_DB,
            vmax=loudest,
            cmap="magma",
            rasterized=True,
        )
        axis.set_yscale("symlog", linthresh=1, linscale=1.5)  # like mel: linear to 1 kHz, logarithmic above
        ticks = [tick for tick in TICKS_KHZ if tick <= sample_rate / 2000]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ylim(0, sample_rate / 2000)
        axis.minorticks_off()
        axis.set_title(title)
        axis.set_xlabel("time in s")
    axes[0].set_ylabel("frequency in kHz")
    figure.colorbar(image, ax=axes, label="magnitude in dB re full scale")
    figure.savefig(path, dpi=120)
