"""The operator of `fastblocks.functional.band_unsplit`: y[b, f, t] = Σ_k (x[b, :, t, k] W_k + bias_k)[f] / window[f].

x (B, I, T, K) with adjacent channels, as a block leaves them (else a copy is made first); y is (B, F, T, O) in memory
(B, T, F, O): frames of adjacent bins, what an inverse transform reads. Products in `dtype` (autocast's, where that is
on); overlapping bands are added up in float32, divided, and rounded once. Only x and the weights are kept for backward.

B 4, F 1025, T 282, O 2, K 64, I 128, all in float32: bytes, FLOPs and floors are those of `split` with the two passes
swapped: forward 16 µs, training 38 on an H100. Predicted (not measured) under bf16 autocast, packing and the last wave
included: forward 33 µs; backward 19 for x and 33 for the weights.
"""

import torch
from torch import Tensor

from fastblocks.eager import bands as eager
from fastblocks.eager.bands import Ranges
from fastblocks.kernels.bands import config
from fastblocks.kernels.bands.grad_weight import empty_gradients, grad_weight
from fastblocks.kernels.bands.plan import flat, pairs, plan_of
from fastblocks.kernels.bands.spectrum import with_adjacent_features
from fastblocks.kernels.bands.to_bands import to_bands
from fastblocks.kernels.bands.to_bins import to_bins
from fastblocks.kernels.operator import Operator, compute_dtype

__all__ = ["band_unsplit", "unsupported_reason"]


def unsupported_reason(x: Tensor, weight: Tensor, bias: Tensor, ranges: Ranges, ola_window: Tensor) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    if ola_window.dtype not in config.OPERANDS or ola_window.device != x.device:
        return f"ola_window in {str(ola_window.dtype).removeprefix('torch.')} on {ola_window.device}"
    if ola_window.requires_grad:
        return "ola_window requires a gradient"
    return config.unsupported_reason(x, weight, bias)


def _outputs(x, weight, bias, ola_window, ranges, channels, dtype, keep):
    batch, _, length, _ = x.shape
    result = torch.promote_types(torch.promote_types(dtype, bias.dtype), ola_window.dtype)
    y = x.new_empty((batch, length, ola_window.shape[0], channels), dtype=result)
    return (y.transpose(1, 2),)


def _forward(outputs, x, weight, bias, ola_window, ranges, channels, dtype, keep):
    (y,) = outputs
    plan, window = plan_of(y, ranges), ola_window.contiguous()
    to_bins(with_adjacent_features(x), weight, bias.contiguous(), window, y, plan, dtype)


def _gradients(needs, x, weight, bias, ola_window, ranges, channels, dtype):
    batch, features, length, bands = x.shape

    def grad_x() -> Tensor:
        return torch.empty((batch, length, bands, features), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)

    return [*empty_gradients(needs, grad_x, weight, bias), None]


def _backward(grads, needs, x, weight, bias, ola_window, ranges, channels, dtype):
    (grad_y,) = grads
    plan, window = plan_of(grad_y, ranges), ola_window.contiguous()
    grad_x, grad_w, grad_bias, _ = _gradients(needs, x, weight, bias, ola_window, ranges, channels, dtype)
    if grad_x is not None:
        to_bands(grad_y, window, weight, None, grad_x, plan, dtype)
    if grad_w is not None:
        grad_weight(grad_y, window, with_adjacent_features(x), grad_w.mT, grad_bias, plan, dtype)
    return grad_x, grad_w, grad_bias, None


def _formula(x, weight, bias, ola_window, ranges, channels, dtype):
    return eager.band_unsplit(x, weight, bias, pairs(ranges), ola_window)


_operator = Operator(
    "band_unsplit",
    "(Tensor x, Tensor weight, Tensor bias, Tensor ola_window, int[] ranges, int channels, ScalarType dtype, "
    "bool keep) -> Tensor y",
    results=1,
    outputs=_outputs,
    forward=_forward,
    backward=_backward,
    gradients=_gradients,
    formula=_formula,
)


def band_unsplit(x: Tensor, weight: Tensor, bias: Tensor, ranges: Ranges, ola_window: Tensor) -> Tensor:
    """`fastblocks.functional.band_unsplit`, for arguments that `unsupported_reason` accepts."""
    channels = weight.shape[2] // max(1, *(end - start for start, end in ranges))
    return _operator(x, weight, bias, ola_window, flat(ranges), channels, compute_dtype(x))[0]
