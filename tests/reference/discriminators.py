"""The discriminators as functions of a state_dict, from their formulas, in the dtype they are given.

Each returns (scores, fmaps), a list with an entry a sub-discriminator. `training` makes one power iteration of spectral
norm first, without writing it back.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.blocks import State, part
from tests.reference.spectral import reflected, stft

Scores = tuple[list[Tensor], list[list[Tensor]]]


def power_iteration(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One step towards the first singular vectors of the weight seen as a matrix (out, rest)."""
    matrix = weight.detach().flatten(1)
    v = matrix.T @ u
    v = v / v.norm()
    u = matrix @ v
    return u / u.norm(), v


def conv_weight(state: State, training: bool) -> Tensor:
    if "weight" in state:
        return state["weight"]
    weight, u, v = state["weight_orig"], state["weight_u"].detach(), state["weight_v"].detach()
    if training:
        u, v = power_iteration(weight, u)
    return weight / (u @ weight.flatten(1) @ v)


def conv(state: State, x: Tensor, training: bool, **options) -> Tensor:
    function = F.conv1d if x.dim() == 3 else F.conv2d
    return function(x, conv_weight(state, training), state["bias"], **options)


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def stack(state: State, x: Tensor, options: list[dict], training: bool) -> list[Tensor]:
    """Every activation of convolutions `0.conv`, `1.conv`, …."""
    fmaps = []
    for j, option in enumerate(options):
        x = leaky(conv(part(state, f"{j}.conv."), x, training, **option))
        fmaps.append(x)
    return fmaps


def multi_period(state: State, x: Tensor, *, periods, training: bool = False) -> Scores:
    scores, fmaps = [], []
    for i, period in enumerate(periods):
        sub = part(state, f"discriminators.{i}.")
        missing = -x.shape[-1] % period
        folded = reflected(x, 0, missing).unflatten(-1, (-1, period))
        fmaps.append(stack(part(sub, "layers."), folded, [{"stride": (3, 1), "padding": (2, 0)}] * 5, training))
        scores.append(conv(part(sub, "output_conv.conv."), fmaps[-1][-1], training, padding=(1, 0)))
    return scores, fmaps


def resampled(x: Tensor, rate: int) -> Tensor:
    """Linear interpolation at the centres of blocks of `rate` samples."""
    at = (torch.arange(x.shape[-1] // rate, dtype=torch.float64) + 0.5) * rate - 0.5
    left = at.floor().long()
    share = (at - left).to(x.dtype)
    return (1 - share) * x[..., left] + share * x[..., (left + 1).clamp(max=x.shape[-1] - 1)]


def multi_scale(state: State, x: Tensor, *, downsample_rates, training: bool = False) -> Scores:
    options = [{"stride": s, "groups": g, "padding": p} for s, g, p in
               [(1, 1, 7), (4, 4, 20), (4, 16, 20), (4, 64, 20), (4, 256, 20), (1, 1, 2)]]  # fmt: skip
    scores, fmaps = [], []
    for i, rate in enumerate(downsample_rates):
        sub = part(state, f"discriminators.{i}.")
        fmaps.append(stack(part(sub, "layers."), resampled(x, rate), options, training))
        scores.append(conv(part(sub, "output_conv.conv."), fmaps[-1][-1], training, padding=1))
    return scores, fmaps


def spectrogram(x: Tensor, window: int, hop: int) -> Tensor:
    """(B, nch, T) -> (B, 2·nch, frames, bins): L.re, L.im, R.re, R.im."""
    return stft(x, window, hop).permute(0, 1, 4, 3, 2).flatten(1, 2)


def multi_resolution(state: State, x: Tensor, *, window_lengths, hop_factor=0.25, bands=None, training=False) -> Scores:
    bands = bands or [(0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    wide, strided = {"padding": (1, 4)}, {"stride": (1, 2), "padding": (1, 4)}
    options = [wide, strided, strided, strided, {"padding": (1, 1)}]
    scores, fmaps = [], []
    for i, window in enumerate(window_lengths):
        sub, bins = part(state, f"discriminators.{i}."), window // 2 + 1
        spectrum = spectrogram(x, window, int(window * hop_factor))
        maps = [
            stack(
                part(sub, f"band_discriminators.{b}."),
                spectrum[..., int(lo * bins) : int(hi * bins)],
                options,
                training,
            )
            for b, (lo, hi) in enumerate(bands)
        ]
        fmaps.append(list(itertools.chain(*maps)))
        joined = torch.cat([of_band[-1] for of_band in maps], dim=-1)
        scores.append(conv(part(sub, "output_conv.conv."), joined, training, padding=(1, 1)))
    return scores, fmaps


def multi_frequency(state: State, x: Tensor, *, window_sizes, sample_rate: int = 48000, training=False) -> Scores:
    options = [{"padding": (1, 4)}]
    options += [{"stride": (1, 2), "dilation": (d, 1), "padding": (d, 4)} for d in (1, 2, 4)]
    options += [{"padding": (1, 1)}] * 2
    x = x / ((x * x).sum((1, 2), keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    scores, fmaps = [], []
    for i, window in enumerate(window_sizes):
        sub = part(state, f"discriminators.{i}.")
        kept = int((window // 2 + 1) * sample_rate / 48000)
        fmaps.append(stack(part(sub, "layers."), spectrogram(x, window, window // 2)[..., :kept], options, training))
        scores.append(conv(part(sub, "output_conv."), fmaps[-1][-1], training, padding=(1, 1)))
    return scores, fmaps
