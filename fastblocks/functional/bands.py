"""One Linear per band over overlapping ranges of frequency bins: from a spectrum to bands, and back."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastblocks.eager import bands as eager
from fastblocks.functional._dispatch import require, require_floating, run, shape

Ranges = Sequence[tuple[int, int]]


def band_split(x: Tensor, weight: Tensor, bias: Tensor, ranges: Ranges) -> Tensor:
    """Each band's bins and channels through its own Linear: `y[…, k] = lanes_k @ weight[k] + bias[k]`.

    A lane is a (bin, channel) pair of a band, bin-major. Weights of lanes beyond a band's width are not read; a band
    without a bin gives its bias.

    Source: Luo and Yu, "Music Source Separation with Band-Split RNN", 2023.

    Args:
        x: (B, F, T, I), a spectrum with I channels per bin; or complex (B, F, T), as `torch.stft` gives it: its real
            and imaginary parts are I = 2 channels. Any strides; nothing is copied.
        weight: (K, W·I, O), W at least the width of the widest band.
        bias: (K, O).
        ranges: of each of the K bands the bins [start, end).

    Returns:
        (B, O, T, K); under autocast in the promoted dtype of the product, which has autocast's, and the bias.

    Raises:
        ValueError: if shapes do not fit, or a range is not within the bins.
    """
    if x.is_complex() and x.dim() == 3:
        x = torch.view_as_real(x.resolve_conj())
    require(x.dim() == 4, lambda: f"band_split: x must be (B, F, T, I) or complex (B, F, T), got {shape(x)}")
    _check_bands("band_split", weight, bias, ranges, bins=x.shape[1])
    width = _width(ranges)
    require(
        weight.shape[1] >= width * x.shape[3],
        lambda: (
            f"band_split: bands of up to {width} bins of x {shape(x)} need a weight "
            f"({len(ranges)}, at least {width * x.shape[3]}, O), got {shape(weight)}"
        ),
    )
    require_floating("band_split", x=x, weight=weight, bias=bias)

    def kernels() -> ModuleType:
        from fastblocks.kernels.bands import split

        return split

    return run("band_split", kernels, eager.band_split, x, weight, bias, ranges)


def band_unsplit(x: Tensor, weight: Tensor, bias: Tensor, ranges: Ranges, ola_window: Tensor) -> Tensor:
    """The way back: one Linear per band, overlapping bands added up, each bin divided by `ola_window`.

    Source: Luo and Yu, "Music Source Separation with Band-Split RNN", 2023.

    Args:
        x: (B, I, T, K).
        weight: (K, I, W·O), W the width of the widest band: its lanes are (bin, channel), bin-major.
        bias: (K, W·O).
        ranges: of each of the K bands the bins [start, end).
        ola_window: (F,), usually the sum of the filters that cover each bin.

    Returns:
        (B, F, T, O), zero in bins that no band covers; the dtype as of `band_split`.

    Raises:
        ValueError: if shapes do not fit, or a range is not within the bins.
    """
    require(ola_window.dim() == 1, lambda: f"band_unsplit: ola_window must be (F,), got {shape(ola_window)}")
    _check_bands("band_unsplit", weight, bias, ranges, bins=ola_window.shape[0])
    width = _width(ranges)
    require(
        x.dim() == 4 and x.shape[1] == weight.shape[1] and x.shape[3] == len(ranges) and weight.shape[2] % width == 0,
        lambda: (
            f"band_unsplit: x must be (B, I, T, {len(ranges)}) and the weight ({len(ranges)}, I, {width}·O), "
            f"got {shape(x)} and {shape(weight)}"
        ),
    )
    require_floating("band_unsplit", x=x, weight=weight, bias=bias)

    def kernels() -> ModuleType:
        from fastblocks.kernels.bands import unsplit

        return unsplit

    return run("band_unsplit", kernels, eager.band_unsplit, x, weight, bias, ranges, ola_window)


def _width(ranges: Ranges) -> int:
    return max((1, *(end - start for start, end in ranges)))


def _check_bands(name: str, weight: Tensor, bias: Tensor, ranges: Ranges, bins: int) -> None:
    require(
        len(ranges) > 0 and all(0 <= start <= end <= bins for start, end in ranges),
        lambda: f"{name}: ranges must be at least one band of bins [start, end) within {bins}, got {list(ranges)}",
    )
    require(
        weight.dim() == 3 and weight.shape[0] == len(ranges) and shape(bias) == (len(ranges), weight.shape[2]),
        lambda: (
            f"{name}: {len(ranges)} bands need a weight ({len(ranges)}, …, N) and a bias ({len(ranges)}, N), "
            f"got {shape(weight)} and {shape(bias)}"
        ),
    )
