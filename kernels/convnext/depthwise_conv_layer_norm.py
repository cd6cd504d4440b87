"""The operator of `fastblocks.functional.depthwise_conv_layer_norm`: what is allocated, launched and kept.

    y = LN(conv(x)) · norm_weight + norm_bias        x (B, C, L) or (B, C, H, W) by strides, y (B, *sizes, C)

Formulas and kernels are in `depthwise` (forward, gradient of x) and `depthwise_backward` (the rest). Kept for backward:
x itself, x̂ in y's dtype and a float32 rstd per position. Bytes per position and channel, bf16: forward 6 (4 without
gradients), backward 6 + 6 in 1-D, 6 + 8 in 2-D, where caches hold the rows between taps.

Everything is float32 between reading x and writing y. Under autocast x and the weights are read as they are and y
has autocast's dtype.
"""

import torch
from torch import Tensor

from fastblocks.backend import KERNEL_DTYPES
from fastblocks.eager import convnext as eager
from fastblocks.kernels.convnext import depthwise, depthwise_backward
from fastblocks.kernels.operator import Operator, compute_dtype

__all__ = ["depthwise_conv_layer_norm", "unsupported_reason"]

MAX_CHANNELS = 2048  # a position's channels are normalized in registers: 2048 × 8 positions in 16 warps
MAX_KERNEL = 63  # per dimension; the largest tested


def unsupported_reason(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: tuple[int, ...],
    transposed: bool,
    sizes: tuple[int, ...],
    eps: float,
) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    if weight.shape[0] > MAX_CHANNELS:
        return f"{weight.shape[0]} channels do not fit in registers, {MAX_CHANNELS} do"
    if max(weight.shape[2:]) > MAX_KERNEL:
        return f"kernel {tuple(weight.shape[2:])} is larger than {MAX_KERNEL}"
    for tensor in (weight, bias, norm_weight, norm_bias):
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"no kernel for parameters in {str(tensor.dtype).removeprefix('torch.')}"
        if tensor is not None and tensor.device != x.device:
            return f"parameters on {tensor.device}, input on {x.device}"
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and (x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype)):
        return "x and the convolution's parameters have different dtypes"
    return ""


def _planes(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.unsqueeze(2)


def _pair(numbers) -> tuple[int, int]:
    return tuple(numbers) if len(numbers) == 2 else (1, *numbers)


def _outputs(x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps, dtype, keep):
    y = x.new_empty((x.shape[0], *sizes, x.shape[1]), dtype=dtype)
    if not keep:
        return y, None, None
    return y, torch.empty_like(y), x.new_empty(y.shape[:-1], dtype=torch.float32)


def _forward(outputs, x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps, dtype, keep):
    y, normalized, rstd = outputs
    x, batch, channels = _planes(x), x.shape[0], x.shape[1]
    weight_matrix = weight.reshape(channels, -1).contiguous()
    if x.stride(3) != 1 and x.stride(1) == 1:  # channels last: adjacent threads take adjacent channels
        weight_matrix = weight_matrix.t().contiguous().t()
    depthwise.convolve(
        x,
        weight_matrix,
        y.view(batch, *_pair(sizes), channels).permute(0, 3, 1, 2),
        kernel=_pair(weight.shape[2:]),
        stride=_pair(stride),
        transposed=transposed,
        bias=None if bias is None else bias.contiguous(),
        norm_weight=norm_weight.contiguous(),
        norm_bias=norm_bias.contiguous(),
        normalized=normalized,
        rstd=rstd,
        eps=eps,
    )


def _gradients(needs, x, weight, bias, norm_weight, norm_bias, *_):
    """Allocate the gradients; that of x in its own layout, channels first or last."""
    vectors = (None if t is None else torch.empty_like(t, memory_format=_DENSE) for t in (bias, norm_weight, norm_bias))
    return (torch.empty_like(x) if needs[0] else None), torch.empty_like(weight, memory_format=_DENSE), *vectors


_DENSE = torch.contiguous_format


def _backward(
    grads, needs, x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps, dtype, normalized, rstd
):  # fmt: skip
    (grad_y,) = grads
    batch, channels = x.shape[:2]
    results = _gradients(needs, x, weight, bias, norm_weight, norm_bias)
    grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias = results
    grid = (batch, *_pair(sizes), channels)
    depthwise_backward.backward(
        grad_y.contiguous().view(grid),
        _planes(x),
        weight.reshape(channels, -1).t().contiguous(),
        norm_weight.contiguous(),
        normalized.view(grid),
        rstd,
        _planes(grad_x) if needs[0] else None,
        (grad_weight, grad_norm_weight, grad_norm_bias, grad_bias),
        kernel=_pair(weight.shape[2:]),
        stride=_pair(stride),
        transposed=transposed,
    )
    return results


def _formula(x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps, dtype):
    return eager.depthwise_conv_layer_norm(
        x, weight, bias, norm_weight, norm_bias, tuple(stride), transposed, tuple(sizes), eps
    )


_operator = Operator(
    "depthwise_conv_layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias, int[] stride, bool transposed, "
    "SymInt[] sizes, float eps, ScalarType dtype, bool keep) -> (Tensor y, Tensor normalized, Tensor rstd)",
    results=1,
    outputs=_outputs,
    forward=_forward,
    saved=("normalized", "rstd"),
    backward=_backward,
    gradients=_gradients,
    formula=_formula,
)


def depthwise_conv_layer_norm(x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps) -> Tensor:
    """`fastblocks.functional.depthwise_conv_layer_norm`, for arguments that `unsupported_reason` accepts."""
    dtype = compute_dtype(x)
    return _operator(x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps, dtype)[0]
