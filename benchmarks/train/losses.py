"""What the training minimizes. Waveforms are (B, samples)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastblocks import functional

STFT_SIZES = (2048, 512, 128)  # samples; hop a quarter
EPSILON = 1e-5
WEIGHTS = {"waveform": 1.0, "spectral": 0.5, "adversarial": 0.02, "feature": 0.05}


def waveform_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error, relative to the target's own mean level, so that soft crops count as much as loud ones."""
    return ((estimate - target).abs().mean(-1) / (target.abs().mean(-1) + 1e-3)).mean()


def spectral_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """Multi-resolution STFT loss: spectral convergence plus mean absolute error of log magnitudes.

    Source: Yamamoto et al., "Parallel WaveGAN", 2020.
    """
    total = estimate.new_zeros(())
    for n_fft in STFT_SIZES:
        window = torch.hann_window(n_fft, device=estimate.device)
        magnitudes = []
        for waveform in (estimate, target):
            spectrum = torch.stft(waveform.float(), n_fft, n_fft // 4, window=window, return_complex=True)
            magnitudes.append((torch.view_as_real(spectrum).square().sum(-1) + EPSILON**2).sqrt())
        got, want = magnitudes
        convergence = torch.linalg.vector_norm(got - want, dim=(1, 2)) / (
            torch.linalg.vector_norm(want, dim=(1, 2)) + 1e-3
        )
        total = total + convergence.mean() + 0.3 * (got.add(1e-3).log() - want.add(1e-3).log()).abs().mean()
    return total / len(STFT_SIZES)


def descend(restore: Callable, judge: Callable, critic: nn.Module | None, mixture: Tensor, target: Tensor) -> dict:
    """Leave the gradients of one step on the parameters: the discriminator's of its loss, the model's of `total`.

    Args:
        restore: (B, samples) -> (B, samples), the model.
        judge: (B, samples) -> scores and feature maps, the discriminator `critic`; not called without one.
        critic: whose parameters stand still while the model learns.
        mixture: what is restored.
        target: what should come out.

    Returns:
        The losses, `total` and `discriminator` among them.
    """
    restored = restore(mixture).to(target.dtype)
    parts, critic_loss = {}, torch.zeros(())
    if critic:
        (real, real_maps), (fake, _) = judge(target), judge(restored.detach())
        critic_loss = functional.discriminator_loss(real, fake)
        critic_loss.backward()
        critic.requires_grad_(False)
        fake, fake_maps = judge(restored)
        parts = {
            "adversarial": functional.adversarial_loss(fake),
            "feature": functional.feature_matching(real_maps, fake_maps),
        }
    parts = {"waveform": waveform_loss(restored, target), "spectral": spectral_loss(restored, target)} | parts
    total = sum(WEIGHTS[name] * value for name, value in parts.items())
    total.backward()
    if critic:
        critic.requires_grad_(True)
    return parts | {"total": total, "discriminator": critic_loss}
