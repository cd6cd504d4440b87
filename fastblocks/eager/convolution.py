"""Convolutions whose shapes oneDNN is bad at, as matrix products on a CPU: what `quicker` chooses from.

oneDNN's kernels are made for tens of channels on both sides and many positions. Milliseconds of one thread of an x86
server with AVX-512, float32, the library's / these:

    one output channel, kernel 3×3              forward        gradient of x    of the weight
    x (1, 256, 17, 129)                         1.5 / 0.3      1.5 / 0.3        1.9 / 0.2
    x (2, 256, 65, 33)                          4.2 / 0.5      3.2 / 0.5        3.8 / 0.4
    x (2, 32, 33, 130)                          1.0 / 0.2      0.8 / 0.2        0.9 / 0.2
    x (1, 1024, 32), kernel 3                   0.08 / 0.04    0.09 / 0.02      0.11 / 0.03

    one or two input channels                                  gradient of x
    x (2, 2, 33, 256), 32 outputs, 3×9                         4.2 / 1.0
    x (1, 2, 33, 256), the same                                0.4 / 0.6, PyTorch's own kernel: `_asks_onednn`
    x (1, 2, 17, 1025), 8 outputs, 3×9                         2.1 / 0.6
    x (2, 1, 8193, 2), 32 outputs, 5×1, stride 3               3.1 / 0.2
    x (2, 1, 8192), 16 outputs, 15                             1.2 / 0.3

Where a weight of millions of numbers meets fewer than a hundred positions, the product is 1.1 to 1.5 × as fast, forward
and backward.
"""

from collections.abc import Callable
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager.autocast import autocast_enabled
from fastblocks.eager.derivatives import by_formula, must_trace

Sizes = tuple[int, ...]

MIN_WEIGHT = 1 << 21  # numbers; below, the columns cost more than the product gains
# Positions (batch · height · width): measured on one core of an x86 server, 512 and 1024 channels to 1024.
MAX_POSITIONS, MAX_POSITIONS_OF_NARROW = 100, 256
NARROW = 3  # width up to which oneDNN's vectors are badly filled
MIN_INPUTS_OF_ONE = 16  # channels; below, adding up the taps costs as much as the product saves
FEW_INPUTS = 2  # channels; at 8 the library is 2.5 × as fast
MAX_COLUMNS = 1 << 22  # numbers that exist at once


def quicker(x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes) -> Callable | None:
    """A function of (x, weight, bias) that beats the library's ungrouped, zero-padded convolution here, or None; what
    is traced has no sizes.

    Args:
        x: (B, C, T) or (B, C, H, W).
        weight: (O, C, …), with a size for each of x's.
        stride, padding, dilation: a number for each size.
    """
    outputs, channels, *kernel = weight.shape
    if max(dilation) > 1:
        return None
    one_output = outputs == 1 and channels >= MIN_INPUTS_OF_ONE and max(stride) == 1
    few_inputs = channels <= FEW_INPUTS < outputs and x.requires_grad and torch.is_grad_enabled()
    along_time = weight.numel() >= MIN_WEIGHT and prod(kernel[1:]) == 1 == prod(stride[1:]) and sum(padding[1:]) == 0
    if not (one_output or few_inputs or along_time) or must_trace() or x.device.type != "cpu":
        return None
    wide = torch.float32, torch.float64
    if x.dim() != weight.dim() or not x.numel() or x.dtype != weight.dtype or x.dtype not in wide:
        return None
    sizes = _output_sizes(x.shape[2:], kernel, stride, padding)
    if min(sizes) < 1 or any(p >= k for p, k in zip(padding, kernel, strict=True)) or autocast_enabled(x.device):
        return None
    if one_output:
        function = _ToOneChannel
    elif few_inputs:
        function = _OfFewChannels if _asks_onednn(x) else None
    else:
        most = MAX_POSITIONS_OF_NARROW if prod(x.shape[3:]) <= NARROW else MAX_POSITIONS
        function = _AlongTime if len(x) * prod(sizes) <= most else None
    return function and (lambda x, weight, bias: function.apply(x, weight, bias, stride, padding))


def _asks_onednn(x: Tensor) -> bool:
    """Whether PyTorch gives a dense float32 convolution to oneDNN. Its own kernel, which takes one small clip at a
    time, makes few channels' gradient as fast as `_OfFewChannels`."""
    return x.dtype == torch.float32 and (len(x) > 1 or x.numel() > 20480)


def _output_sizes(sizes: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes) -> list[int]:
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(sizes, kernel, stride, padding, strict=True)]


def _library(x: Tensor, stride: Sizes, padding: Sizes) -> Callable:
    return partial(F.conv1d if x.dim() == 3 else F.conv2d, stride=stride, padding=padding)


def _of_height_1(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.dim() == 4 else tensor[:, :, None] for tensor in tensors]


def _add_taps(taps: Tensor, sizes: Sizes, stride: Sizes, padding: Sizes) -> Tensor:
    """What each tap adds to positions of a tensor, (B, C, K, L, H', W') -> (B, C, H, W) of `sizes`: the transpose of
    taking columns. A third of the time of F.fold."""
    batch, channels, *kernel, height, width = taps.shape
    spans = [(n - 1) * s + 1 for n, s in zip((height, width), stride, strict=True)]
    room = [max(n + 2 * p, span + k - 1) for n, p, span, k in zip(sizes, padding, spans, kernel, strict=True)]
    padded = taps.new_zeros(batch, channels, *room)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            padded[:, :, i : i + spans[0] : stride[0], j : j + spans[1] : stride[1]].add_(taps[:, :, i, j])
    return padded[:, :, padding[0] : padding[0] + sizes[0], padding[1] : padding[1] + sizes[1]]


class _ToOneChannel(torch.autograd.Function):
    """One output channel, stride 1: each tap's product with all of x, then the taps added up.

    With U the output's gradient as columns of flipped taps, the gradient of x is Wᵀ U, that of the weight U xᵀ.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry = stride, padding
        image, filters = _of_height_1(x, weight)
        batch, _, *sizes = image.shape
        kernel, padding = filters.shape[2:], (0, *padding)[-2:]
        taps = torch.matmul(weight[0].flatten(1).flip(1).T, x.flatten(2)).view(batch, 1, *kernel, *sizes)
        y = _add_taps(taps, _output_sizes(sizes, kernel, (1, 1), padding), (1, 1), _opposite(kernel, padding))
        y = y if x.dim() == 4 else y[:, :, 0]
        # not a view, which nothing in place may follow
        return y.clone(memory_format=torch.contiguous_format) if bias is None else y + bias

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *by_formula(_library(x, *ctx.geometry), (x, weight, bias), grad), None, None
        image, filters = _of_height_1(grad, weight)
        kernel, padding = filters.shape[2:], (0, *ctx.geometry[1])[-2:]
        columns = F.unfold(image, kernel, padding=_opposite(kernel, padding))  # [B, K·L, H·W]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(weight[0].flatten(1).flip(1), columns).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.matmul(columns, x.flatten(2).mT).sum(0).flip(0).T.reshape(weight.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum()[None]
        return grad_x, grad_weight, grad_bias, None, None


def _opposite(kernel: Sizes, padding: Sizes) -> Sizes:
    """The padding of the transposed convolution."""
    return tuple(k - 1 - p for k, p in zip(kernel, padding, strict=True))


class _OfFewChannels(torch.autograd.Function):
    """The library's convolution, but the gradient of x by a product and its taps added up."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry = stride, padding
        return _library(x, stride, padding)(x, weight, bias)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        stride, padding = ctx.geometry
        if torch.is_grad_enabled():
            return *by_formula(_library(x, stride, padding), (x, weight, bias), grad), None, None
        _, weights, biases, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if weights or biases:
            ones, zeros, mask = [1] * len(stride), [0] * len(stride), (False, weights, biases)
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, x, weight, [len(weight)], stride, padding, ones, False, zeros, 1, mask
            )
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            image, result, filters = _of_height_1(grad, grad_x, weight)
            rows, stride, padding = weight.flatten(1).T, (1, *stride)[-2:], (0, *padding)[-2:]
            clips = max(1, MAX_COLUMNS // (len(rows) * image[0, 0].numel()))
            for part, goal in zip(image.split(clips), result.split(clips), strict=True):
                taps = torch.matmul(rows, part.flatten(2)).view(len(part), *filters.shape[1:], *image.shape[2:])
                goal.copy_(_add_taps(taps, goal.shape[2:], stride, padding))
        return grad_x, grad_weight, grad_bias, None, None


class _AlongTime(torch.autograd.Function):
    """Along time alone, a few positions with many weights: one product with the columns of x."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes) -> Tensor:
        rows_of_x = x.reshape(*x.shape[:3], -1)  # [B, C, T, P]
        columns = F.pad(rows_of_x, (0, 0, padding[0], padding[0])).unfold(2, weight.shape[2], stride[0])
        batch, _, height, width, _ = columns.shape  # [B, C, H, P, K]
        columns = columns.permute(0, 2, 3, 1, 4).reshape(batch * height * width, -1)
        ctx.save_for_backward(x, weight, bias, columns)
        ctx.kept = stride, padding, height, width
        rows = columns @ weight.flatten(1).T if bias is None else torch.addmm(bias, columns, weight.flatten(1).T)
        y = rows.view(batch, height, *x.shape[3:], -1).movedim(-1, 1)
        return y.clone(
            memory_format=torch.contiguous_format
        )  # of one position, too: nothing in place may follow a view

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, columns = ctx.saved_tensors
        stride, padding, height, width = ctx.kept
        if torch.is_grad_enabled():
            return *by_formula(_library(x, stride, padding), (x, weight, bias), grad), None, None
        rows = grad.movedim(1, -1).reshape(columns.shape[0], -1)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            taps = (rows @ weight.flatten(1)).view(len(x), height, width, x.shape[1], -1, 1).permute(0, 3, 4, 5, 1, 2)
            grad_x = _add_taps(taps, (x.shape[2], width), (stride[0], 1), (padding[0], 0)).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ columns).view_as(weight)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None
