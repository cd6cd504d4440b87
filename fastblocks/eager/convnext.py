"""Depthwise convolution with layer normalization over channels; Linear, GELU, Linear."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager.autocast import autocast_enabled
from fastblocks.eager.derivatives import must_trace

_CONV = {(1, False): F.conv1d, (2, False): F.conv2d, (1, True): F.conv_transpose1d, (2, True): F.conv_transpose2d}

# Positions of a block, which one partial gradient of a weight sums over on a CPU: 128, one after another, have about
# the error of the library's gradient (norms' ratio 0.3 to 1.4 by shape); 256 have up to twice its error.
_BLOCKS = {1: (128,), 2: (8, 16)}
# Elements below which the library's gradient is as fast: padding, copies and a sum take 0.1 ms.
_SMALL = 1 << 14
# Elements of the result that are in work at once: copies of them stay in the cache.
_ELEMENTS = 1 << 16


def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: tuple[int, ...],
    transposed: bool,
    sizes: tuple[int, ...],
    eps: float,
) -> Tensor:
    extra = (0,) * len(stride)
    if transposed:
        smallest = ((size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True))
        extra = tuple(size - small for size, small in zip(sizes, smallest, strict=True))
    own = x.is_cpu and x.dtype == weight.dtype == torch.float32 and weight.requires_grad and torch.is_grad_enabled()
    own = own and x.numel() >= _SMALL and not autocast_enabled(x.device) and not must_trace()
    convolve = _CPUDepthwiseConv.apply if own else _depthwise_conv
    y = convolve(x, weight, bias, stride, transposed, extra).movedim(1, -1)
    return F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps).to(y.dtype)


def _depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], transposed: bool, extra: tuple[int, ...]
) -> Tensor:
    padding = tuple(k // 2 for k in weight.shape[2:])
    options = {"output_padding": extra} if transposed else {}
    return _CONV[x.dim() - 2, transposed](x, weight, bias, stride, padding, groups=x.shape[1], **options)


class _CPUDepthwiseConv(torch.autograd.Function):
    """The library's convolution, but for the gradient of the weight."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight, bias, stride, transposed, extra) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.transposed, ctx.extra = stride, transposed, extra
        return _depthwise_conv(x, weight, bias, stride, transposed, extra)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        own = not torch.is_grad_enabled()  # the library's gradients have derivatives
        padding = [k // 2 for k in weight.shape[2:]]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, ctx.stride, padding, [1] * len(padding), ctx.transposed, ctx.extra, weight.shape[0],
            [wants_x, wants_weight and not own, False],
        )  # fmt: skip
        if wants_weight and own:
            long, short = (grad, x) if ctx.transposed else (x, grad)
            grad_weight = _grad_weight(long, short, weight.shape[2:], ctx.stride)
        # the library's gradient of the bias would compute that of the weight again
        grad_bias = grad.sum((0, *range(2, grad.dim()))) if wants_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None


def _grad_weight(long: Tensor, short: Tensor, kernel: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """The gradient of a depthwise convolution's weight, which is itself a depthwise convolution: of its input by the
    gradient of its result, with the stride as dilation.

    One thread, the library's gradient and this one, ms: 32 channels of 2 · 282×64, 7×7: 39 and 11; 256 of 4 · 36×8: 22
    and 3; 256 of 8 · 1000, 7: 11 and 5; 64 of 2 · 141×32 transposed to twice that: 27 and 12.

    Args:
        long: (B, C, *sizes) before the convolution; for a transposed one the gradient after it.
        short: (B, C, *sizes) the other one.
        kernel: sizes of the weight.
        stride: of the convolution.

    Returns:
        (C, 1, *kernel).
    """
    channels, sizes = short.shape[1], short.shape[2:]
    counts = [-(-size // block) for size, block in zip(sizes, _BLOCKS[len(sizes)], strict=True)]
    blocks = [-(-size // count) for size, count in zip(sizes, counts, strict=True)]
    windows = [(block - 1) * s + k for block, s, k in zip(blocks, stride, kernel, strict=True)]
    steps = [block * s for block, s in zip(blocks, stride, strict=True)]
    before = [k // 2 for k in kernel]
    if len(sizes) == 1:  # a one-dimensional convolution takes the library three times as long
        stride = (1, *stride)
    total = short.new_zeros(channels, 1, *kernel)
    examples = max(1, _ELEMENTS // short[0].numel())
    for some_long, some_short in zip(long.split(examples), short.split(examples), strict=True):
        # every block of every example is a channel
        x = _windows(some_long, before, counts, windows, steps).reshape(1, -1, *(1, *windows)[-2:])
        g = _windows(some_short, [0] * len(sizes), counts, blocks, blocks).reshape(x.shape[1], 1, *(1, *blocks)[-2:])
        shares = F.conv2d(x, g, dilation=stride, groups=x.shape[1])
        total += shares[..., : kernel[-1]].reshape(some_short.shape[0], channels, -1, 1, *kernel).sum((0, 2))
    return total


def _windows(x: Tensor, before: list[int], counts: list[int], sizes: list[int], steps: list[int]) -> Tensor:
    """(B, C, *spatial) -> (B, C, *counts, *sizes): windows from -before on, steps apart; zeros beyond the ends."""
    totals = [(count - 1) * step + size for count, size, step in zip(counts, sizes, steps, strict=True)]
    after = [max(0, total - b - length) for total, b, length in zip(totals, before, x.shape[2:], strict=True)]
    if any(before) or any(after):
        x = F.pad(x, [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair])
    for dim, (total, size, step) in enumerate(zip(totals, sizes, steps, strict=True), start=2):
        x = x.narrow(dim, 0, total).unfold(dim, size, step)
    return x


def convnext_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor | None
) -> Tensor:
    y = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2).movedim(-1, 1)
    return y.contiguous() if residual is None else residual + y
