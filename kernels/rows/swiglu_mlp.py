"""The operator of `fastblocks.functional.swiglu_mlp`: two products into one tensor, SwiGLU, a product; no biases.

    gate | up = x [Wg; Wu]ᵀ,   hidden = silu(gate) · up,   y = hidden Wdᵀ

The library multiplies, a kernel of `swiglu` does the rest. F is padded with zeros to a multiple of PAD at every call:
at F = 341, rows of odd length would cost every product its 16-byte loads. Padded columns of gate, up, hidden and their
gradients are zero, so results are the same.

Kept for backward: x, and gate and up as the first product wrote them, 2·F per position; the plain formula keeps 4·F
(gate, up, silu and hidden). Computing them again would keep nothing, and repeat a third of forward: 4·C·F FLOPs, and
4·F bytes per position written once more, in 16 bits. Hidden is computed again, by the kernel that reads gate and up
anyway, in place of its own gradient.

Products are rounded to `dtype` (autocast's, where that is on), in which y is.
"""

import torch
from torch import Tensor

from fastblocks.backend import KERNEL_DTYPES
from fastblocks.eager import rows as eager
from fastblocks.kernels.operator import Operator, compute_dtype
from fastblocks.kernels.rows import swiglu

__all__ = ["swiglu_mlp", "unsupported_reason"]

PAD = 16  # elements: 32 bytes in 16 bits, 64 in float32


def unsupported_reason(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    weights = (weight_gate, weight_up, weight_down)
    for weight in weights:
        if weight.dtype not in KERNEL_DTYPES:
            return f"no kernel for weights in {str(weight.dtype).removeprefix('torch.')}"
        if weight.device != x.device:
            return f"weights on {weight.device}, input on {x.device}"
    if not torch.is_autocast_enabled(x.device.type) and any(weight.dtype != x.dtype for weight in weights):
        return "x and the weights have different dtypes"
    return ""


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b. Given an output, autocast leaves the operands alone, whichever is on when backward runs."""
    return torch.mm(a, b, out=a.new_empty((a.shape[0], b.shape[1])) if out is None else out)


def _padded(hidden: int) -> int:
    return -(-hidden // PAD) * PAD


def _gate_up_weight(weight_gate: Tensor, weight_up: Tensor, dtype: torch.dtype) -> Tensor:
    """Both weights as one (2 · padded F, C)."""
    hidden, channels = weight_gate.shape
    both = weight_gate.new_zeros((2, _padded(hidden), channels), dtype=dtype)
    both[0, :hidden].copy_(weight_gate)
    both[1, :hidden].copy_(weight_up)
    return both.view(-1, channels)


def _down_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(C_out, padded F)."""
    hidden = weight.shape[1]
    if hidden % PAD == 0:
        return weight.to(dtype)
    padded = weight.new_zeros((weight.shape[0], _padded(hidden)), dtype=dtype)
    padded[:, :hidden].copy_(weight)
    return padded


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _outputs(x, weight_gate, weight_up, weight_down, dtype, keep):
    rows, hidden = x.shape[:-1], _padded(weight_gate.shape[0])
    y = x.new_empty((*rows, weight_down.shape[0]), dtype=dtype)
    return y, x.new_empty((rows.numel(), 2 * hidden), dtype=dtype) if keep else None


def _forward(outputs, x, weight_gate, weight_up, weight_down, dtype, keep):
    y, gate_up = outputs
    gate_up = _product(_rows(x, dtype), _gate_up_weight(weight_gate, weight_up, dtype).t(), gate_up)
    hidden = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    swiglu.forward(gate_up, hidden)
    _product(hidden, _down_weight(weight_down, dtype).t(), y.view(-1, y.shape[-1]))


def _backward(grads, needs, x, weight_gate, weight_up, weight_down, dtype, gate_up):
    grad_y = grads[0].reshape(-1, grads[0].shape[-1])
    need_x, need_gate, need_up, need_down = needs
    grad_hidden = _product(grad_y, _down_weight(weight_down, dtype))
    grad_gate_up = torch.empty_like(gate_up)  # gate_up may be needed for another backward pass
    hidden = grad_hidden if need_down else None
    swiglu.backward(grad_hidden, gate_up, grad_gate_up, hidden)
    grad_x, *grad_weights = [None] * 4
    if need_x:
        grad_x = _product(grad_gate_up, _gate_up_weight(weight_gate, weight_up, dtype)).view(x.shape).to(x.dtype)
    if need_gate or need_up:
        grad_both = _product(grad_gate_up.t(), _rows(x, dtype)).view(2, -1, x.shape[-1])
        grad_weights[:2] = (_cut(grad, weight_gate) for grad in grad_both)
    if need_down:
        grad_weights[2] = _cut(_product(grad_y.t(), hidden), weight_down)
    return grad_x, *grad_weights


def _cut(grad: Tensor, weight: Tensor) -> Tensor:
    """A weight's gradient without the padding, in memory of its own."""
    rows, columns = weight.shape
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device).copy_(grad[:rows, :columns])


def _formula(x, weight_gate, weight_up, weight_down, dtype):
    return eager.swiglu_mlp(x, weight_gate, weight_up, weight_down)


_operator = Operator(
    "swiglu_mlp",
    "(Tensor x, Tensor weight_gate, Tensor weight_up, Tensor weight_down, ScalarType dtype, bool keep) -> "
    "(Tensor y, Tensor gate_up)",
    results=1,
    outputs=_outputs,
    forward=_forward,
    saved=("gate_up",),
    backward=_backward,
    formula=_formula,
)


def swiglu_mlp(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
    """`fastblocks.functional.swiglu_mlp`, for arguments that `unsupported_reason` accepts."""
    return _operator(x, weight_gate, weight_up, weight_down, compute_dtype(x))[0]
