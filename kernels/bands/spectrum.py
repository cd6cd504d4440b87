"""Pointers into a spectrum (B, F, T, I) of any strides, seen as rows (b, t) of lanes (f, i)."""

from torch import Tensor

from fastblocks.kernels.matrix import strides, times
from fastblocks.kernels.runtime import tl, triton


@triton.jit
def row_offsets(rows, T, stride_b, stride_t):
    """Of rows b · T + t, in 64 bits."""
    return (rows // T).to(tl.int64) * stride_b + (rows % T).to(tl.int64) * stride_t


@triton.jit
def lane_offsets(lanes, stride_f, stride_c, CHANNELS: tl.constexpr, FLAT: tl.constexpr, INDEX_INT64: tl.constexpr):
    """Of lanes f · CHANNELS + c. FLAT: they are stride_c apart, as in a view of a complex STFT as pairs."""
    if FLAT:
        return times(lanes, stride_c, INDEX_INT64)
    return times(lanes // CHANNELS, stride_f, INDEX_INT64) + times(lanes % CHANNELS, stride_c, INDEX_INT64)


def of_spectrum(spectrum: Tensor) -> dict:
    """A spectrum (B, F, T, I) as arguments of a kernel."""
    _, bins, length, channels = spectrum.shape
    of_b, of_f, of_t, of_c = spectrum.stride()
    if channels == 1:
        of_c = of_f
    span = (bins - 1) * of_f + (channels - 1) * of_c
    return {
        "spectrum_ptr": spectrum, "T": length,
        "stride_spectrum_b": of_b, "stride_spectrum_t": of_t, "stride_spectrum_f": of_f, "stride_spectrum_c": of_c,
        "CHANNELS": channels, "FLAT": of_f == channels * of_c, "INDEX_INT64": span >= 2**31,
    }  # fmt: skip


def of_bands(bands: Tensor) -> dict:
    """Bands (B, N, T, K), the N features adjacent, as arguments of a kernel."""
    return {"bands_ptr": bands, **{name: n for name, n in strides("bands", bands, "bntk").items() if name[-1] != "n"}}


def with_adjacent_features(bands: Tensor) -> Tensor:
    """Bands (B, N, T, K) with N adjacent, which is how they leave a block; otherwise a copy, as the kernels would read
    eight sectors for one."""
    return bands if bands.stride(1) == 1 or bands.shape[1] == 1 else bands.movedim(1, 3).contiguous().movedim(3, 1)
