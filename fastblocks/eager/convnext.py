"""Depthwise convolution with layer normalization over channels; Linear, GELU, Linear."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager.autocast import autocast_enabled
from fastblocks.eager.derivatives import by_formula, must_trace

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
    flat = x.dim() == 4 and not transposed and stride == (1, 1)
    if flat and x.is_cpu and x.dtype == torch.float32 and not autocast_enabled(x.device) and not must_trace():
        # Channels last, as the normalization wants it; else the library copies both ways, and the normalization once
        # more. One thread, ms, forward and in training: 32 channels of 2 · 282×64: 4.2 and 23.0, with it 3.6 and 18.0;
        # 128 of 4 · 71×16: 1.65 and 9.0, with it 1.54 and 8.5. Strided and 1-D ones gain nothing.
        x = x.contiguous(memory_format=torch.channels_last)
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


def window_means(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """(B, C, *sizes) -> (B, C, *ceil(sizes / stride)): means over windows of `stride`, the last over what it has."""
    if x.is_cpu and x.dtype in (torch.float32, torch.float64) and x.numel() and not must_trace():
        return _CPUWindowMeans.apply(x, stride)
    pool = F.avg_pool1d if len(stride) == 1 else F.avg_pool2d
    if not torch.compiler.is_compiling():
        return pool(x, stride, stride, ceil_mode=True)
    # Inductor's gradient of a partial last window is wrong (seen in PyTorch 2.13): whole windows, with zeros in them.
    missing = [-size % s for size, s in zip(x.shape[2:], stride, strict=True)]
    y = pool(F.pad(x, [n for rest in reversed(missing) for n in (0, rest)]), stride, stride)
    for dim, (s, size) in enumerate(zip(stride, x.shape[2:], strict=True), start=2):
        if size % s:
            y = y * (s * _inverse_counts(y, dim, s, size))
    return y


class _CPUWindowMeans(torch.autograd.Function):
    """One thread, ms, the library's pooling and this: 32 channels of 2 · 282×64 by 2×2: 2.0 and 0.3; 128 of 8 · 1000 by
    2: 3.1 and 0.4. Both passes are differentiable PyTorch."""

    @staticmethod
    def forward(ctx, x: Tensor, stride: tuple[int, ...]) -> Tensor:
        ctx.stride, ctx.sizes = stride, x.shape[2:]
        for dim, s in enumerate(stride, start=2):
            if s > 1:
                inverse = _inverse_counts(x, dim, s, x.shape[dim])
                first, *others = (x[(slice(None),) * dim + (slice(j, None, s),)] for j in range(min(s, x.shape[dim])))
                x = first.clone(memory_format=torch.contiguous_format)
                for other in others:
                    x.narrow(dim, 0, other.shape[dim]).add_(other)
                x *= inverse
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        for dim, (s, size) in enumerate(zip(ctx.stride, ctx.sizes, strict=True), start=2):
            if s > 1:
                grad = (grad * _inverse_counts(grad, dim, s, size)).repeat_interleave(s, dim).narrow(dim, 0, size)
        return grad, None


def _inverse_counts(x: Tensor, dim: int, stride: int, size: int) -> Tensor:
    """One over the positions of each window along `dim`, of that size, in x's dtype, to be multiplied with sums."""
    counts = x.new_full((-(-size // stride), *(1,) * (x.dim() - dim - 1)), 1 / stride)
    if size % stride:
        counts[-1] = 1 / (size % stride)
    return counts


def convnext_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor | None
) -> Tensor:
    tensors = [t for t in (x, weight1, bias1, weight2, bias2, residual) if t is not None]
    own = x.is_cpu and x.numel() and x.dtype in (torch.float32, torch.float64)
    own = own and all(t.dtype == x.dtype for t in tensors) and not autocast_enabled(x.device) and not must_trace()
    if not own:
        return _convnext_mlp_formula(x, weight1, bias1, weight2, bias2, residual)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _CPUConvNeXtMLP.apply(x, weight1, bias1, weight2, bias2, residual)
    return _second_product(torch.ops.aten.gelu_(F.linear(x, weight1, bias1)), weight2, bias2, residual)


def _convnext_mlp_formula(x, weight1, bias1, weight2, bias2, residual) -> Tensor:
    y = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2).movedim(-1, 1)
    return y.contiguous() if residual is None else residual + y


def _second_product(activations: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """(B, *sizes, F) through weight (C_out, F), plus bias and residual: (B, C_out, *sizes), by a product that is added
    where residual and bias already lie, channels first: nothing is transposed.

    One thread, ms, as a product of rows and a sum, and so; with the first product and GELU in place: 32 channels of
    2 · 282×64: 16.6 and 14.7; to 64 of 2 · 141×32: 4.2 and 3.3; 256 of 8 · 1000: 106 and 96; 64 of 256 · 64: 19.0 and
    16.9. A few rows at a time, in the cache, take 11 instead of 15 on one thread, and on two that others use, too, up
    to four times as long: every small product is one more point where threads wait for each other.
    """
    batch, *sizes, hidden = activations.shape
    rows = activations.view(batch, -1, hidden)
    if residual is None:
        y = bias[:, None].repeat(batch, 1, rows.shape[1])
    else:
        y = torch.add(residual.reshape(batch, -1, rows.shape[1]), bias[:, None])
    return y.baddbmm_(weight.expand(batch, -1, -1), rows.mT).unflatten(2, sizes)


class _CPUConvNeXtMLP(torch.autograd.Function):
    """Keeps x, preactivations and activations, as autograd of the formula does, and fills fewer tensors on the way."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight1, bias1, weight2, bias2, residual) -> Tensor:
        preactivations = F.linear(x, weight1, bias1)
        activations = F.gelu(preactivations)
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, residual, preactivations, activations)
        return _second_product(activations, weight2, bias2, residual)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, preactivations, activations = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_formula(_convnext_mlp_formula, inputs, grad)
        x, weight1, _, weight2, *_ = inputs
        tokens, pre, act = (t.reshape(-1, t.shape[-1]) for t in (x, preactivations, activations))
        grad_rows = grad.flatten(2).transpose(1, 2).reshape(-1, grad.shape[1])
        grad_pre = grad_rows @ weight2
        torch.ops.aten.gelu_backward.grad_input(grad_pre, pre, grad_input=grad_pre)
        return (
            (grad_pre @ weight1).view(x.shape) if ctx.needs_input_grad[0] else None,
            grad_pre.T @ tokens,
            grad_pre.sum(0),
            grad_rows.T @ act,
            grad_rows.sum(0),
            grad if ctx.needs_input_grad[5] else None,
        )
