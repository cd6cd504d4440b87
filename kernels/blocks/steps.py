"""The steps that blocks are made of, over rows (N, C): in a fused kernel, or in the library's products with the kernels
of `rows` between them, as `config.fuses` says.

Weights are packed (`pack`): flat. y, its gradient and the residual stream have one dtype, what stands between products
that of the weights; all are contiguous, and those of the stream may be (…, C). Products by the library write into
tensors made for them (`out=`), which autocast leaves alone.
"""

import torch
from torch import Tensor

from fastblocks.backend import KERNEL_DTYPES
from fastblocks.kernels.blocks import config, mlp, mlp_backward, norm_linear
from fastblocks.kernels.blocks.grad_weight import grad_weight, grad_weights
from fastblocks.kernels.operator import compute_dtype
from fastblocks.kernels.rows import rms_norm, swiglu


def parameters_reason(x: Tensor, parameters: tuple[Tensor, ...]) -> str:
    """Why a block's kernels do not take these parameters with x; an empty string if they do."""
    if compute_dtype(x) not in KERNEL_DTYPES:
        return f"no kernel for {compute_dtype(x)}"
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype, device = x.dtype, x.device
    for parameter in parameters:
        if parameter.device != device:
            return f"parameters on {parameter.device}, input on {device}"
        if parameter.dtype != dtype:
            if parameter.dtype not in KERNEL_DTYPES:
                return f"no kernel for parameters in {parameter.dtype}"
            if not autocast:
                return f"the input is {dtype}, a parameter {parameter.dtype}"
    return ""


def norm_linear_forward(x: Tensor, weight: Tensor, out: Tensor, normalized: Tensor, rstd: Tensor, eps: float) -> None:
    """Fills out (…, M), and normalized (N, C) and rstd (N,) for backward."""
    channels = x.shape[-1]
    if config.fuses(channels, weight.dtype):
        norm_linear.forward(x, weight, out, normalized, rstd, eps)
        return
    rms_norm.forward(x, None, eps, normalized, rstd)
    torch.mm(normalized, weight.view(-1, channels).t(), out=out.view(-1, out.shape[-1]))


def norm_linear_backward(
    grad_out: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    grad_x: Tensor | None,
    partial: Tensor | None,
    fused: bool,
) -> None:
    """Fills grad_x (…, C), with the residual's gradient added, and partial (slabs, M · C), those that are not None."""
    if fused:
        if partial is not None:
            grad_weight(grad_out, normalized, partial)
        if grad_x is not None:
            norm_linear.grad_x(grad_out, normalized, rstd, weight, residual, grad_x)
        return
    weight = weight.view(-1, normalized.shape[1])
    grad_out = grad_out.view(len(normalized), -1)
    if partial is not None:
        torch.mm(grad_out.t(), normalized, out=partial[0].view(weight.shape))
    if grad_x is not None:
        grad = torch.mm(grad_out, weight, out=torch.empty_like(normalized))
        rms_norm.backward(grad, normalized, rstd, None, grad_x, kept_is_normalized=True, grad_residual=residual)


def mlp_forward(
    addend: Tensor,
    weight_out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    normalized: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> None:
    """`mlp.forward`; normalized and rstd may be None only where that may be."""
    channels = x.shape[-1]
    if config.fuses(channels, weight.dtype):
        mlp.forward(addend, weight_out, x, weight, y, normalized, rstd, eps)
        return
    addend, y, weight = addend.view(-1, channels), y.view(-1, channels), weight.view(3, -1, channels)
    if weight_out is not None:
        addend = torch.mm(addend, weight_out.view(channels, channels).t(), out=torch.empty_like(addend))
    total = torch.empty_like(y)
    rms_norm.forward(x, None, eps, normalized, rstd, addend=addend, total=total)
    gate_up = _gate_up(normalized, weight)
    hidden = gate_up.new_empty(len(gate_up), weight.shape[1])
    swiglu.forward(gate_up, hidden)
    if y.dtype == weight.dtype:
        torch.addmm(total, hidden, weight[2], out=y)
    else:
        down = torch.empty_like(addend)
        torch.add(total, torch.mm(hidden, weight[2], out=down), out=y)


def _gate_up(normalized: Tensor, weight: Tensor) -> Tensor:
    """gate and up of all hidden units, (N, 2F'), in one product with weight (3, F', C)."""
    both = weight[:2].view(-1, weight.shape[2])
    return torch.mm(normalized, both.t(), out=normalized.new_empty(len(normalized), len(both)))


def mlp_backward_all(
    grad_y: Tensor,
    addend: Tensor | None,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    weight_out: Tensor | None,
    partial: Tensor | None,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the addend, which may be one tensor, in grad_y's shape; and of the weights in partial
    (slabs, numbers), where that is not None: the output product's, if there is one, then the MLP's."""
    dtype, channels = weight.dtype, normalized.shape[1]
    padded = weight.numel() // (3 * channels)
    grad_m = torch.empty_like(grad_y)
    if fused:
        narrow = None if grad_y.dtype == dtype else torch.empty_like(normalized)
        grad_addend = grad_m
        if narrow is not None or weight_out is not None:
            grad_addend = torch.empty_like(grad_y, dtype=dtype)
        stored = ()
        if partial is not None and channels > config.RECOMPUTED_CHANNELS:
            stored = tuple(normalized.new_empty(len(normalized), n * padded) for n in (2, 1))
        mlp_backward.grad_x(grad_y, normalized, rstd, weight, weight_out, grad_m, grad_addend, narrow, *stored)
        operand = grad_y if narrow is None else narrow
        if stored:
            of_product = (None, None) if weight_out is None else (grad_m, addend)
            grad_weights(stored[0], normalized, stored[1], operand, *of_product, partial)
        elif partial is not None:
            of_out, of_mlp = _out_and_mlp(partial, weight)
            mlp_backward.grad_weight(operand, normalized, weight, of_mlp)
            if of_out is not None:
                grad_weight(grad_m, addend, of_out)
        return grad_m, grad_addend

    shape, grad_y, weight = grad_y.shape, grad_y.view(-1, channels), weight.view(3, padded, channels)
    narrow = grad_y.to(dtype)
    gate_up = _gate_up(normalized, weight)
    hidden = gate_up.new_empty(len(gate_up), padded)
    torch.mm(narrow, weight[2].t(), out=hidden)  # its gradient, then, in place, itself
    swiglu.backward(hidden, gate_up, gate_up, hidden)
    both, grad = weight[:2].view(-1, channels), torch.empty_like(normalized)
    torch.mm(gate_up, both, out=grad)
    of_out = None
    if partial is not None:
        of_out, of_mlp = _out_and_mlp(partial, weight)
        of_mlp = of_mlp[0].view(3 * padded, channels)
        torch.mm(gate_up.t(), normalized, out=of_mlp[: 2 * padded])
        torch.mm(hidden.t(), narrow, out=of_mlp[2 * padded :])
    rms_norm.backward(grad, normalized, rstd, None, grad_m, kept_is_normalized=True, grad_residual=grad_y)
    narrow = grad_m.to(dtype)
    if weight_out is None:
        return grad_m, narrow
    rows = narrow.view(-1, channels)
    torch.mm(rows, weight_out.view(channels, channels), out=grad)
    if of_out is not None:
        torch.mm(rows.t(), addend.view(-1, channels), out=of_out[0].view(channels, channels))
    return grad_m, grad.view(shape)


def _out_and_mlp(partial: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """Partial sums of the output product's weight, or None, and of the MLP's."""
    square = partial.shape[1] - weight.numel()
    if not square:
        return None, partial
    return partial.unsafe_split_with_sizes((square, weight.numel()), 1)


def slabs_of(n_rows: int, channels: int, weight: Tensor, fused: bool) -> int:
    """How many slabs of partial sums the weights' gradients over these rows are."""
    return config.slabs(n_rows, channels, weight.device) if fused else 1


def new_partial(slabs: int, packed: Tensor, fused: bool) -> Tensor:
    """Memory for the partial sums of the packed weights' gradients: the library's products have their own dtype."""
    dtype = torch.float32 if fused else packed.dtype
    return packed.new_empty((slabs, packed.shape[0]), dtype=dtype)
