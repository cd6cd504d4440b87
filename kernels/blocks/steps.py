"""The steps that blocks are made of, over rows (N, C): in a fused kernel, or in the library's products with the kernels
of `rows` between them, as `config.fuses` says.

Weights are packed (`pack`); y, its gradient and the residual stream have one dtype, what stands between products that
of the weights. Products by the library write into tensors made for them (`out=`), which autocast leaves alone.
"""

import torch
from torch import Tensor

from fastblocks.kernels.blocks import config, mlp, mlp_backward, norm_linear
from fastblocks.kernels.blocks.grad_weight import grad_weight
from fastblocks.kernels.operator import compute_dtype
from fastblocks.kernels.rows import rms_norm, swiglu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parameters_reason(x: Tensor, parameters: tuple[Tensor, ...]) -> str:
    """Why a block's kernels do not take these parameters with x; an empty string if they do."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if compute_dtype(x) not in DTYPES:
        return f"no kernel for {compute_dtype(x)}"
    for parameter in parameters:
        if parameter.dtype not in DTYPES:
            return f"no kernel for parameters in {parameter.dtype}"
        if parameter.device != x.device:
            return f"parameters on {parameter.device}, input on {x.device}"
        if parameter.dtype != x.dtype and not autocast:
            return f"the input is {x.dtype}, a parameter {parameter.dtype}"
    return ""


def as_rows(x: Tensor) -> Tensor:
    """(…, C) as contiguous rows (N, C)."""
    return x.contiguous().view(-1, x.shape[-1])


def norm_linear_forward(x: Tensor, weight: Tensor, out: Tensor, normalized: Tensor, rstd: Tensor, eps: float) -> None:
    """Fills out (N, M), and normalized (N, C) and rstd (N,) for backward."""
    if config.fuses(x.shape[1], weight.dtype):
        norm_linear.forward(x, weight, out, normalized, rstd, eps)
        return
    rms_norm.forward(x, None, eps, normalized, rstd)
    torch.mm(normalized, weight.t(), out=out)


def norm_linear_backward(
    grad_out: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    grad_x: Tensor | None,
    partial: Tensor | None,
) -> None:
    """Fills grad_x (N, C), with the residual's gradient added, and partial (slabs, M, C), those that are not None."""
    fused = config.fuses_backward(weight.shape[1], weight)
    if partial is not None and fused:
        grad_weight(grad_out, normalized, partial)
    elif partial is not None:
        torch.mm(grad_out.t(), normalized, out=partial[0])
    if grad_x is not None and fused:
        norm_linear.grad_x(grad_out, normalized, rstd, weight, residual, grad_x)
    elif grad_x is not None:
        grad = torch.empty_like(normalized)
        torch.mm(grad_out, weight, out=grad)
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
    if config.fuses(x.shape[1], weight.dtype):
        mlp.forward(addend, weight_out, x, weight, y, normalized, rstd, eps)
        return
    if weight_out is not None:
        product = torch.empty_like(addend)
        addend = torch.mm(addend, weight_out.t(), out=product)
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
    """gate and up of all hidden units, (N, 2F'), in one product."""
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
    partial_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the addend, which may be one tensor, and the weights' in partial (slabs, 3, F', C) and
    partial_out (slabs, C, C), where they are not None."""
    dtype, (_, padded, channels) = weight.dtype, weight.shape
    grad_m = torch.empty_like(grad_y)
    if config.fuses_backward(channels, weight):
        narrow = None if grad_y.dtype == dtype else torch.empty_like(normalized)
        grad_addend = grad_m if narrow is None and weight_out is None else torch.empty_like(normalized)
        stored = ()
        if partial is not None and channels > config.RECOMPUTED_CHANNELS:
            stored = tuple(normalized.new_empty(len(normalized), n * padded) for n in (2, 1))
        mlp_backward.grad_x(grad_y, normalized, rstd, weight, weight_out, grad_m, grad_addend, narrow, *stored)
        if partial is not None:
            operand = grad_y if narrow is None else narrow
            if stored:
                grad_gate_up, hidden = stored
                grad_weight(grad_gate_up, normalized, partial[:, :2].view(len(partial), -1, channels))
                grad_weight(hidden, operand, partial[:, 2])
            else:
                mlp_backward.grad_weight(operand, normalized, weight, partial)
            if weight_out is not None:
                grad_weight(grad_m, addend, partial_out)
        return grad_m, grad_addend

    narrow = grad_y.to(dtype)
    gate_up = _gate_up(normalized, weight)
    hidden = gate_up.new_empty(len(gate_up), padded)
    torch.mm(narrow, weight[2].t(), out=hidden)  # its gradient, then, in place, itself
    swiglu.backward(hidden, gate_up, gate_up, hidden)
    both, grad = weight[:2].view(-1, channels), torch.empty_like(normalized)
    torch.mm(gate_up, both, out=grad)
    if partial is not None:
        torch.mm(gate_up.t(), normalized, out=partial[0, :2].view(-1, channels))
        torch.mm(hidden.t(), narrow, out=partial[0, 2])
    rms_norm.backward(grad, normalized, rstd, None, grad_m, kept_is_normalized=True, grad_residual=grad_y)
    narrow = grad_m.to(dtype)
    if weight_out is None:
        return grad_m, narrow
    torch.mm(narrow, weight_out, out=grad)
    if partial_out is not None:
        torch.mm(narrow.t(), addend, out=partial_out[0])
    return grad_m, grad


def slabs_of(n_rows: int, channels: int, weight: Tensor) -> int:
    """How many slabs of partial sums the weights' gradients over these rows are."""
    return config.slabs(n_rows, channels, weight.device) if config.fuses_backward(channels, weight) else 1


def new_partial(slabs: int, packed: Tensor, channels: int) -> Tensor:
    """Memory for the partial sums of the packed weights' gradients: the library's products have their own dtype."""
    dtype = torch.float32 if config.fuses_backward(channels, packed) else packed.dtype
    return packed.new_empty((slabs, packed.shape[0]), dtype=dtype)
