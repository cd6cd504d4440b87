"""Convolutions along time of a few positions with many weights, as one matrix product on a CPU.

oneDNN's kernels are made for many positions: where a weight of millions of numbers meets fewer than a hundred, the
product is 1.1 to 1.5 × as fast, forward and backward. Width 1 of the kernel's second dimension only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager.autocast import autocast_enabled
from fastblocks.eager.derivatives import by_formula, must_trace

MIN_WEIGHT = 1 << 21  # numbers; below, the columns cost more than the product gains
# Positions (batch · height · width): measured on one core of an x86 server, 512 and 1024 channels to 1024.
MAX_POSITIONS, MAX_POSITIONS_OF_NARROW = 100, 256
NARROW = 3  # width up to which oneDNN's vectors are badly filled


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """conv2d of x (B, C, T, P) with a weight (O, C, K, 1), stride and padding along T."""
    return _Convolution.apply(x, weight, bias, stride, padding)


def is_quicker(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether `convolve` beats the library's convolution, and may take this call; what is traced has no sizes."""
    if must_trace():
        return False
    if weight.numel() < MIN_WEIGHT or x.device.type != "cpu" or x.dim() != 4 or x.numel() == 0:
        return False
    height = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    positions = x.shape[0] * height * x.shape[3]
    most = MAX_POSITIONS_OF_NARROW if x.shape[3] <= NARROW else MAX_POSITIONS
    wide = torch.float32, torch.float64
    return 0 < positions <= most and x.dtype == weight.dtype in wide and not autocast_enabled(x.device)


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, weight, bias, (stride, 1), (padding, 0))


class _Convolution(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        batch, _, _, width = x.shape
        columns = F.pad(x, (0, 0, padding, padding)).unfold(2, weight.shape[2], stride)  # (B, C, H, P, K)
        height = columns.shape[2]
        columns = columns.permute(0, 2, 3, 1, 4).reshape(batch * height * width, -1)
        ctx.save_for_backward(x, weight, bias, columns)
        ctx.kept = stride, padding, height
        rows = columns @ weight.flatten(1).T if bias is None else torch.addmm(bias, columns, weight.flatten(1).T)
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, columns = ctx.saved_tensors
        stride, padding, height = ctx.kept
        if torch.is_grad_enabled():
            return by_formula(_formula, (x, weight, bias, stride, padding), grad)
        batch, channels, length, width = x.shape
        taps = weight.shape[2]
        rows = grad.permute(0, 2, 3, 1).reshape(columns.shape[0], -1)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            parts = (rows @ weight.flatten(1)).view(batch, height, width, channels, taps).permute(4, 0, 3, 1, 2)
            padded = x.new_zeros(batch, channels, max(length + 2 * padding, (height - 1) * stride + taps), width)
            for tap, part in enumerate(parts):
                padded[:, :, tap : tap + (height - 1) * stride + 1 : stride].add_(part)
            grad_x = padded[:, :, padding : padding + length]
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ columns).view_as(weight)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None
