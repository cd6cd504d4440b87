"""What the discriminators share: a convolution with spectral norm, and spectra as channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as torch_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm as TorchSpectralNorm

from fastblocks import functional
from fastblocks.spectral_ops import short_time_spectrum

Scores = list[Tensor]
FeatureMaps = list[list[Tensor]]


class _WithoutDerivedWeight:
    """Spectral norm leaves the last forward's weight, with its graph, on the module; copies and pickles get it
    detached."""

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        if "weight" not in self._parameters:
            derived = state.get("weight")
            if isinstance(derived, Tensor):
                state["weight"] = derived.detach()
        return state


class Conv1d(_WithoutDerivedWeight, nn.Conv1d):
    pass


class Conv2d(_WithoutDerivedWeight, nn.Conv2d):
    pass


class SpectralNorm(TorchSpectralNorm):
    """torch.nn.utils.spectral_norm's hook with `functional.spectral_norm` inside: the same numbers, faster."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        weight, u, v = (getattr(module, f"{self.name}_{part}") for part in ("orig", "u", "v"))
        iterations = self.n_power_iterations if do_power_iteration else 0
        return functional.spectral_norm(weight, u, v, n_power_iterations=iterations, eps=self.eps)


def spectral_norm(conv: nn.Conv1d | nn.Conv2d) -> nn.Conv1d | nn.Conv2d:
    """torch.nn.utils.spectral_norm with the hook above: the same keys, and `remove_spectral_norm` works."""
    conv = torch_spectral_norm(conv)
    for key, hook in conv._forward_pre_hooks.items():
        if type(hook) is TorchSpectralNorm:
            conv._forward_pre_hooks[key] = SpectralNorm(hook.name, hook.n_power_iterations, hook.dim, hook.eps)
    return conv


class ConvLayer(nn.Module):
    """A convolution, normed if asked for, and LeakyReLU 0.2 if asked for.

    Args:
        conv: the convolution.
        norm: divide its weight by its largest singular value (torch.nn.utils.spectral_norm).
        activate: apply the LeakyReLU.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, norm: bool, activate: bool = True):
        super().__init__()
        self.conv = spectral_norm(conv) if norm else conv
        self.activation = activate

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        # in place: nobody else sees the convolution's output, and its gradient does not need it
        return F.leaky_relu(x, 0.2, inplace=True) if self.activation else x


def run_layers(layers: nn.ModuleList, x: Tensor, fmap: list[Tensor]) -> Tensor:
    """Run layers in order and append every activation to fmap."""
    for layer in layers:
        x = layer(x)
        fmap.append(x)
    return x


class Discriminators(nn.Module):
    """Several sub-discriminators on one clip: audio (B, nch, T) -> (scores, fmaps), an entry each.

    Args:
        nch: channels of the audio.
        discriminators: modules that turn (B, nch, T) into (score, fmap), and whose `shortest_clip` is the least T.
    """

    def __init__(self, nch: int, discriminators: list[nn.Module]):
        super().__init__()
        if not discriminators:
            raise ValueError(f"{type(self).__name__} needs at least one sub-discriminator, got none")
        self.nch = nch
        self.discriminators = nn.ModuleList(discriminators)

    def forward(self, x: Tensor) -> tuple[Scores, FeatureMaps]:
        """Judge audio x (B, nch, T).

        Raises:
            ValueError: if x has another shape, or is too short.
        """
        if x.dim() != 3 or x.shape[1] != self.nch:
            raise ValueError(f"{type(self).__name__} needs audio of shape (B, {self.nch}, T), got {tuple(x.shape)}")
        shortest = max(discriminator.shortest_clip for discriminator in self.discriminators)
        if x.shape[2] < shortest:
            raise ValueError(
                f"{type(self).__name__}: {x.shape[2]} samples are too short, "
                f"the shortest clip that works has {shortest}"
            )
        scores, fmaps = [], []
        for discriminator in self.discriminators:
            score, fmap = discriminator(x)
            scores.append(score)
            fmaps.append(fmap)
        return scores, fmaps


class SpectrumDiscriminator(nn.Module):
    """A discriminator on spectra; its Hann window is made at each call, in float32 or better, and is in no state_dict.

    Args:
        window_length: samples of a window.
        hop_length: samples from one frame to the next.
    """

    def __init__(self, window_length: int, hop_length: int):
        super().__init__()
        if window_length < 2 or hop_length < 1:
            raise ValueError(f"a window of {window_length} samples with a hop of {hop_length} is not possible")
        self.window_length, self.hop_length = window_length, hop_length
        self.shortest_clip = window_length // 2 + 1  # a reflect pad of half a window on both sides

    def spectrum(self, x: Tensor) -> Tensor:
        """(B, nch, T) -> (B, 2·nch, frames, bins), channels left.re, left.im, right.re, …; in x's dtype."""
        window = torch.hann_window(
            self.window_length, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
        )
        spectrum = short_time_spectrum(x.flatten(0, 1), window, self.hop_length)
        parts = torch.view_as_real(spectrum).unflatten(0, x.shape[:2])  # (B, nch, bins, frames, 2)
        return parts.permute(0, 1, 4, 3, 2).flatten(1, 2).to(x.dtype)


def same_padding(kernel: tuple[int, ...], dilation: tuple[int, ...] = (1, 1)) -> tuple[int, ...]:
    """Padding that keeps sizes at stride 1, for odd kernels."""
    return tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))


def band_edges(fractions: list[tuple[float, float]], bins: int) -> list[tuple[int, int]]:
    """Bands as bins [start, end); raises a ValueError for one that has none."""
    edges = [(int(low * bins), int(high * bins)) for low, high in fractions]
    for fraction, (start, end) in zip(fractions, edges, strict=True):
        if not 0 <= start < end <= bins:
            raise ValueError(f"band {tuple(fraction)} of {bins} bins covers no bin")
    return edges
