"""The operator of `fastblocks.functional.band_split`: y[b, :, t, k] = x[b, lanes of k, t] W_k + bias_k.

x (B, F, T, I) is read as it lies, in frames of adjacent bins or bins of adjacent frames; y is (B, O, T, K) in
channels-last memory, a row of O for every band. Products in `dtype` (autocast's, where that is on) with float32 sums;
the bias is added to the sum before its one rounding. Only x and the weights are kept for backward.

B 4, F 1025, T 282, I 2, K 64, O 128, all in float32: x 9.2 MB, y 37, the bands' weights 2.1 of 8.2; 1.2 GFLOP forward
and each of both gradients. Floors on an H100 (3.0 TB/s): forward 16 µs, training 38; float32 products without TF32 take
20 and 60 µs of its FMA units. Predicted (not measured) under bf16 autocast, packing and the last wave included: forward
19 µs; backward 28 for x and some 33 for the weights.
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

__all__ = ["band_split", "unsupported_reason"]


def unsupported_reason(x: Tensor, weight: Tensor, bias: Tensor, ranges: Ranges) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    return config.unsupported_reason(x, weight, bias)


def _outputs(x, weight, bias, ranges, dtype, keep):
    batch, _, length, _ = x.shape
    y = x.new_empty((batch, length, len(weight), weight.shape[2]), dtype=torch.promote_types(dtype, bias.dtype))
    return (y.permute(0, 3, 1, 2),)


def _forward(outputs, x, weight, bias, ranges, dtype, keep):
    plan = plan_of(x, ranges)
    to_bands(x, None, weight.mT, bias.contiguous(), outputs[0], plan, dtype)


def _gradients(needs, x, weight, bias, ranges, dtype):
    # that of x has x's layout: for a view of an STFT, what the inverse transform of its gradient reads
    return empty_gradients(needs, lambda: torch.empty_like(x), weight, bias)


def _backward(grads, needs, x, weight, bias, ranges, dtype):
    grad_y = with_adjacent_features(grads[0])
    plan = plan_of(x, ranges)
    grad_x, grad_w, grad_bias = _gradients(needs, x, weight, bias, ranges, dtype)
    if grad_x is not None:
        to_bins(grad_y, weight.mT, None, None, grad_x, plan, dtype)
    if grad_w is not None:
        grad_weight(x, None, grad_y, grad_w, grad_bias, plan, dtype)
    return grad_x, grad_w, grad_bias


def _formula(x, weight, bias, ranges, dtype):
    return eager.band_split(x, weight, bias, pairs(ranges))


_operator = Operator(
    "band_split",
    "(Tensor x, Tensor weight, Tensor bias, int[] ranges, ScalarType dtype, bool keep) -> Tensor y",
    results=1,
    outputs=_outputs,
    forward=_forward,
    backward=_backward,
    gradients=_gradients,
    formula=_formula,
)


def band_split(x: Tensor, weight: Tensor, bias: Tensor, ranges: Ranges) -> Tensor:
    """`fastblocks.functional.band_split`, for arguments that `unsupported_reason` accepts."""
    return _operator(x, weight, bias, flat(ranges), compute_dtype(x))[0]
