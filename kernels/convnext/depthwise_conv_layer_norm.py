"""Operators of `fastblocks.functional.depthwise_conv_layer_norm`: what is allocated, launched and kept.

    y = LN(conv(x)) · norm_weight + norm_bias        x (B, C, L) or (B, C, H, W) by strides, y (B, *sizes, C)

Formulas and kernels are in `depthwise` (forward, gradient of x) and `depthwise_backward` (the rest). Kept
for backward: x as it came, x̂ in y's dtype and a float32 rstd a position; without an affine (norm_weight None: it was
folded into the layer that follows) x̂ is y itself. Bytes a position and channel, bf16: forward 6 (4 without gradients
or without an affine), backward 6 + 6 in 1-D, 6 + 8 in 2-D, where caches hold the rows between taps.

Everything is float32 between reading x and writing y. Under autocast x and the weights are read as they are and y
has autocast's dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastblocks.kernels.convnext import depthwise, depthwise_backward
from fastblocks.kernels.launch import CompileCase
from fastblocks.kernels.recording import recorded

MAX_CHANNELS = 2048  # a position's channels are normalized in registers: 2048 × 8 positions in 16 warps
MAX_KERNEL = 63  # a side; tests go as far


def unsupported_reason(x: Tensor, weight: Tensor, *others: Tensor | None) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    if weight.shape[0] > MAX_CHANNELS:
        return f"{weight.shape[0]} channels do not fit in registers, {MAX_CHANNELS} do"
    if max(weight.shape[2:]) > MAX_KERNEL:
        return f"kernel {tuple(weight.shape[2:])} is larger than {MAX_KERNEL}"
    for tensor in (weight, *others):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"no kernel for parameters in {str(tensor.dtype).removeprefix('torch.')}"
        if tensor is not None and tensor.device != x.device:
            return f"parameters on {tensor.device}, input on {x.device}"
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and (x.dtype != weight.dtype or (others[0] is not None and others[0].dtype != x.dtype)):
        return "x and the convolution's parameters have different dtypes"
    return ""


def _planes(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.unsqueeze(2)


def _pair(numbers) -> tuple[int, int]:
    return tuple(numbers) if len(numbers) == 2 else (1, *numbers)


def _forward(x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps, dtype, keep):
    x, batch, channels = _planes(x), x.shape[0], x.shape[1]
    kernel, (height, width) = _pair(weight.shape[2:]), _pair(sizes)
    y = torch.empty((batch, *sizes, channels), dtype=dtype, device=x.device)
    normalized = torch.empty_like(y) if keep and norm_weight is not None else y.new_empty(0)
    rstd = torch.empty((batch, *sizes) if keep else (0,), dtype=torch.float32, device=x.device)
    taps = kernel[0] * kernel[1]
    if x.stride(3) != 1 and x.stride(1) == 1:  # channels last: neighbouring threads want neighbouring channels
        weight, weight_strides = weight.reshape(channels, taps).t().contiguous(), (1, channels)
    else:
        weight, weight_strides = weight.reshape(channels, taps).contiguous(), (taps, 1)
    depthwise.convolve(
        x,
        weight,
        weight_strides,
        bias,
        norm_weight,
        norm_bias,
        y.view(batch, height, width, channels).permute(0, 3, 1, 2),
        normalized if norm_weight is not None else None,
        rstd if keep else None,
        kernel=kernel,
        stride=_pair(stride),
        transposed=transposed,
        normalize=True,
        eps=eps,
    )
    return y, normalized, rstd


def _backward(grad_y, x, weight, bias, norm_weight, norm_bias, normalized, rstd, stride, transposed, need_x):
    batch, channels = x.shape[:2]
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grads = [None if t is None else torch.empty_like(t) for t in (norm_weight, norm_bias, bias)]
    grid = (batch, *_pair(grad_y.shape[1:-1]), channels)
    depthwise_backward.backward(
        grad_y.contiguous().view(grid),
        _planes(x),
        weight.reshape(channels, -1).t().contiguous(),
        norm_weight,
        normalized.view(grid),
        rstd,
        _planes(grad_x) if need_x else None,
        (grad_weight, *grads),
        kernel=_pair(weight.shape[2:]),
        stride=_pair(stride),
        transposed=transposed,
    )
    grad_norm_weight, grad_norm_bias, grad_bias = (weight.new_empty(0) if g is None else g for g in grads)
    return grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias


_LIBRARY = torch.library.Library("fastblocks", "FRAGMENT")
_LIBRARY.define(
    "depthwise_conv_layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "int[] stride, bool transposed, SymInt[] sizes, float eps, ScalarType dtype, bool keep) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "depthwise_conv_layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor normalized, Tensor rstd, int[] stride, bool transposed, bool need_x) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):  # the CPU's is the interpreter's
    _LIBRARY.impl("depthwise_conv_layer_norm", _forward, _device)
    _LIBRARY.impl("depthwise_conv_layer_norm_backward", _backward, _device)


@torch.library.register_fake("fastblocks::depthwise_conv_layer_norm", lib=_LIBRARY)
def _(x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps, dtype, keep):
    y = x.new_empty((x.shape[0], *sizes, x.shape[1]), dtype=dtype)
    normalized = torch.empty_like(y) if keep and norm_weight is not None else y.new_empty(0)
    return y, normalized, x.new_empty(y.shape[:-1] if keep else (0,), dtype=torch.float32)


@torch.library.register_fake("fastblocks::depthwise_conv_layer_norm_backward", lib=_LIBRARY)
def _(grad_y, x, weight, bias, norm_weight, norm_bias, normalized, rstd, stride, transposed, need_x):
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grads = (weight.new_empty(0) if t is None else torch.empty_like(t) for t in (bias, norm_weight, norm_bias))
    return grad_x, torch.empty_like(weight, memory_format=torch.contiguous_format), *grads


_forward_op = torch.ops.fastblocks.depthwise_conv_layer_norm.default
_backward_op = torch.ops.fastblocks.depthwise_conv_layer_norm_backward.default


class _DepthwiseConvLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps, dtype, keep):
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _forward_op(x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps, dtype, keep)
        y, normalized, rstd = outputs
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, y if norm_weight is None else normalized, rstd)
        ctx.call = stride, transposed, sizes, eps, dtype
        ctx.mark_non_differentiable(normalized, rstd)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, grad_y, *_):
        if grad_y is None:
            return (None,) * 11
        *inputs, normalized, rstd = ctx.saved_tensors
        stride, transposed, _, _, dtype = ctx.call
        if torch.is_grad_enabled():  # somebody will differentiate the gradient
            return (*_differentiable_backward(ctx, grad_y, inputs, dtype), *(None,) * 6)
        grads = _backward_op(grad_y, *inputs, normalized, rstd, stride, transposed, ctx.needs_input_grad[0])
        wanted = zip(grads, inputs, ctx.needs_input_grad, strict=False)
        return (*(g if t is not None and need else None for g, t, need in wanted), *(None,) * 6)


def _differentiable_backward(ctx, grad_y, inputs, dtype):
    from fastblocks.eager.convnext import depthwise_conv_layer_norm as formula

    stride, transposed, sizes, eps, _ = ctx.call
    x, weight, bias, norm_weight, norm_bias = inputs
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need and t is not None]
    with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != x.dtype):
        y = formula(x, weight, bias, norm_weight, norm_bias, tuple(stride), transposed, tuple(sizes), eps)
        grads = iter(torch.autograd.grad(y, wanted, grad_y.to(y.dtype), create_graph=True))
    pairs = zip(inputs, ctx.needs_input_grad, strict=False)
    return tuple(next(grads) if need and t is not None else None for t, need in pairs)


def _autograd(x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps, dtype, keep):
    tensors = (x, weight, bias, norm_weight, norm_bias)
    if keep:
        return _DepthwiseConvLayerNorm.apply(*tensors, stride, transposed, sizes, eps, dtype, keep)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*tensors, stride, transposed, sizes, eps, dtype, keep)


_LIBRARY.impl("depthwise_conv_layer_norm", _autograd, "Autograd")


def depthwise_conv_layer_norm(x, weight, bias, norm_weight, norm_bias, stride, transposed, sizes, eps) -> Tensor:
    """The functional operation on kernels; `norm_weight` and `norm_bias` may be None, then it returns x̂."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    tensors = (x, weight, bias, norm_weight, norm_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _forward_op(*tensors, stride, transposed, sizes, eps, dtype, keep)[0]


def aot_cases(architecture: str = "sm_90") -> Iterator[CompileCase]:
    """Every kernel of the standard workloads, as it would be launched, forward and backward."""
    shapes = {"cnx-1d": ((16, 512, 1000), (1,))}
    for channels, height, width in ((32, 282, 64), (64, 141, 32), (128, 71, 16), (256, 36, 8)):
        for stride in (1, 2):
            shapes[f"cnx-2d C {channels} stride {stride}"] = (4, channels, height, width), (stride, stride)
    modules = (depthwise, depthwise_backward)
    for dtype in (torch.bfloat16, torch.float32):
        for name, (shape, stride) in shapes.items():
            for transposed in (False, True):

                def run(shape=shape, stride=stride, dtype=dtype, transposed=transposed):
                    x = torch.empty(shape, dtype=dtype, device="meta")
                    weight = torch.empty((shape[1], 1, *(7,) * len(stride)), device="meta")
                    vector = torch.empty(shape[1], device="meta")
                    pairs = list(zip(shape[2:], stride, strict=True))
                    sizes = [size * s if transposed else -(-size // s) for size, s in pairs]
                    inputs = (x, weight, vector, vector, vector)
                    y, normalized, rstd = _forward(*inputs, stride, transposed, sizes, 1e-6, dtype, True)
                    _backward(y, *inputs, normalized, rstd, stride, transposed, True)

                label = f"{name}{' transposed' if transposed else ''} {str(dtype).removeprefix('torch.')}"
                yield from recorded(architecture, label, modules, run)
