"""Grouped GRU and LSTM: all groups and both directions of a layer in one launch, the time loop inside.

    GRU    r = σ(W_r x + U_r h)   z = σ(W_z x + U_z h)   n = tanh(W_n x + r · (U_n h))   h' = n + z · (h − n)
    LSTM   i, f, o = σ(W x + U h)   g = tanh(W_g x + U_g h)   c' = f · c + i · g   h' = o · tanh(c')

Layouts: x (B, T, G·I), weight_ih (N, G, S·H, I), weight_hh (N, G, S·H, H), biases (N, G, S·H), states (N, B, G·H),
y (B, T, G·N·H); S = 3 or 4 gates, N directions, all contiguous (others are copied). A program takes 8 or 16 rows of
batch, one tile of groups and one direction; programs are independent. U stays on the chip; h and c stay float32
through time, and h is rounded only for its product and for y. New values of B and T do not recompile.

Dtypes: everything is computed from x and weights rounded to `dtype`, which y and the final states are stored in: x's
dtype, or under autocast its dtype (float32 inputs are then rounded inside the kernel). Gradients have their input's
dtype.

Two ways, by size (`forward.FUSED_LIMIT`). Bytes and FLOPs are a layer's, in 16 bits, M = B·T·G·N:
- **Fused** (I, H ≤ 32, no biases): the loop also multiplies W x, and backward also sums ∂W, ∂U and ∂x. Forward
  reads x and writes y: 2·M·(I + H) bytes, 2·M·S·H·(I + H) FLOPs. Backward reads x, y, ∂y and writes ∂x: 4·M·(I + H)
  bytes; it recomputes the gates: three times the forward's FLOPs. Kept: only x and y; an LSTM's cells, 2·M·H bytes.
- **Not fused**: one batched product computes W x of all steps (a unit's four values of a step are one 64-bit word),
  the loop reads it and writes the gates in its place, 2·8·M·H bytes; backward reads them and writes the preactivations'
  gradients in the same layout, from which a batched product computes ∂x, and a kernel in `weights` ∂W and ∂U. Kept: the
  gates, 8·M·H bytes, which are in memory anyway; an LSTM's cells, 2·M·H.

Hidden sizes whose weights do not stay on the chip, above 128 in 16 bits, go to PyTorch. A GRU's tile of 256 units has
384 KB of weights; read again from L2 every step, at the 24 bytes a cycle that an SM of an H100 gets while all ask, the
6·H² bytes alone are predicted to take 3.6 µs a step at 160 units, 5.2 at 192 and 9.3 at 256, where 128 take 0.5.

`keep_gates` overrules what is kept: True keeps the gates when fused, too; False drops them when not, and
backward then runs forward again. Sums over tiles or slices are added in a fixed order: equal bits every time.
"""

import torch
from torch import Tensor

from fastblocks.backend import KERNEL_DTYPES
from fastblocks.eager import recurrent as eager
from fastblocks.kernels.operator import Operator, compute_dtype
from fastblocks.kernels.recurrent import backward, config, forward
from fastblocks.kernels.recurrent.forward import Inputs, sizes_of
from fastblocks.kernels.runtime import architecture

__all__ = ["grouped_gru", "grouped_lstm", "unsupported_reason"]


def unsupported_reason(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    state: Tensor | tuple[Tensor, Tensor] | None,
    keep_gates: bool | None,
) -> str:
    """Why these kernels do not take a call, or an empty string."""
    states = state if isinstance(state, tuple | list) else (state,)
    dtype = compute_dtype(x)
    tensors = [t for t in (weight_ih, weight_hh, bias_ih, bias_hh, *states) if t is not None]
    if dtype not in KERNEL_DTYPES or any(t.dtype not in KERNEL_DTYPES for t in tensors):
        return "no kernel for float64"
    if dtype == x.dtype and any(t.dtype != dtype for t in tensors[:2]) and not torch.is_autocast_enabled(x.device.type):
        return "input and weights differ in dtype"
    if any(t.device != x.device for t in tensors):
        return "the tensors are not on one device"
    hidden, largest = weight_hh.shape[3], config.largest_hidden(architecture(x.device), dtype == torch.float32)
    if hidden > largest:
        return f"hidden size {hidden} is above {largest}, whose weights fit on the chip: PyTorch's own RNN runs instead"
    return ""


def grouped_gru(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    state: Tensor | None,
    keep_gates: bool | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    y, h, _ = OPERATOR(x, weight_ih, weight_hh, bias_ih, bias_hh, state, None, dtype, keep_gates)
    return y, h


def grouped_lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    keep_gates: bool | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    h_first, c_first = (None, None) if state is None else state
    dtype = compute_dtype(x)
    y, h, c = OPERATOR(x, weight_ih, weight_hh, bias_ih, bias_hh, h_first, c_first, dtype, keep_gates)
    return y, (h, c)


def _outputs(*arguments):
    *tensors, dtype, keep_gates, keep = arguments
    sizes = sizes_of(Inputs(*tensors), dtype)
    gates_are_kept = keep and (not sizes.fused if keep_gates is None else keep_gates)
    return forward.outputs(Inputs(*tensors), dtype, gates_are_kept, keep and (gates_are_kept or sizes.fused))


def _dense(tensors) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _forward(outputs, *arguments):
    *tensors, _, _, _ = arguments
    forward.forward(Inputs(*_dense(tensors)), *outputs)


def _backward(grads, needs, *arguments):
    *tensors, _, _, y, gates, cell = arguments
    return backward.backward(*_dense(grads), Inputs(*_dense(tensors)), y, gates, cell)


def _formula(x, weight_ih, weight_hh, bias_ih, bias_hh, h_first, c_first, dtype, keep_gates):
    if weight_ih.shape[2] == 4 * weight_hh.shape[3]:
        state = None if h_first is None else (h_first, c_first)
        y, (h, c) = eager.grouped_lstm(x, weight_ih, weight_hh, bias_ih, bias_hh, state)
        return y, h, c
    return eager.grouped_gru(x, weight_ih, weight_hh, bias_ih, bias_hh, h_first)


OPERATOR = Operator(
    "grouped_rnn",
    "(Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? h_first, "
    "Tensor? c_first, ScalarType dtype, bool? keep_gates, bool keep) -> "
    "(Tensor y, Tensor h_last, Tensor c_last, Tensor gates, Tensor cell)",
    results=3,
    outputs=_outputs,
    forward=_forward,
    saved=("y", "gates", "cell"),
    backward=_backward,
    formula=_formula,
)
