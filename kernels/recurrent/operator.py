"""Grouped GRU and LSTM: all groups and both directions of a layer in one launch, the time loop inside.

    GRU    r = σ(W_r x + U_r h)   z = σ(W_z x + U_z h)   n = tanh(W_n x + r · (U_n h))   h' = n + z · (h − n)
    LSTM   i, f, o = σ(W x + U h)   g = tanh(W_g x + U_g h)   c' = f · c + i · g   h' = o · tanh(c')

Layouts: x (B, T, G·I), weight_ih (N, G, S·H, I), weight_hh (N, G, S·H, H), biases (N, G, S·H), states (N, B, G·H),
y (B, T, G·N·H); S = 3 or 4, N directions, all contiguous (others are copied). A program takes 8 or 16 rows of batch,
one tile of groups and one direction; programs do not talk to each other. U stays on the chip; h and c stay float32
through time, and h is rounded only for its product and for y. B and T are not compiled in.

Dtypes: everything is computed from x and weights rounded to `dtype`, which y and the final states are stored in: x's
dtype, or under autocast its dtype (float32 inputs are then rounded inside the kernel). Gradients have their input's.

Two ways, by size (`recurrent_forward.FUSED_LIMIT`). Bytes and FLOPs are a layer's, in 16 bits, M = B·T·G·N:
- **Fused** (I, H ≤ 32, no biases): the loop also multiplies W x, and backward also sums ∂W, ∂U and makes ∂x. Forward
  reads x and writes y: 2·M·(I + H) bytes, 2·M·S·H·(I + H) FLOPs. Backward reads x, y, ∂y and writes ∂x: 4·M·(I + H)
  bytes; it makes the gates again: three times the forward's FLOPs. Kept: only x and y; an LSTM's cells, 2·M·H bytes.
- **Apart**: one batched product makes W x of all steps (four values a unit side by side, one word of 64 bits a step),
  the loop reads it and writes the gates in its place, 2·8·M·H bytes; backward reads them and writes the sums' gradients
  in the same layout, from which a batched product makes ∂x, and `recurrent_weights` ∂W and ∂U. Kept: the gates,
  8·M·H bytes, which are in memory anyway; an LSTM's cells, 2·M·H.

`keep_gates` overrules what is kept: True keeps the gates in the fused way too, False drops them in the other, where
backward then runs forward once more. Sums over tiles or slices are added in a fixed order: equal bits every time.
"""

import torch
from torch import Tensor

from fastblocks.kernels.recurrent import config as table
from fastblocks.kernels.recurrent.backward import backward
from fastblocks.kernels.recurrent.forward import (
    KEEP_GATES,
    KEEP_LITTLE,
    KEEP_NOTHING,
    forward,
    keeps_cell,
    sizes_of,
)
from fastblocks.kernels.runtime import architecture

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What y and the final state are stored in: x's dtype, under autocast its dtype, as torch.nn.GRU has it on CUDA."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def unsupported_reason(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, *rest: Tensor | None) -> str:
    """Why these kernels do not take a call, or an empty string. The rest are biases and states, where given."""
    dtype = compute_dtype(x)
    tensors = [t for t in (weight_ih, weight_hh, *rest) if t is not None]
    if dtype not in DTYPES or any(t.dtype not in DTYPES for t in tensors):
        return "no kernel for float64"
    if dtype == x.dtype and any(t.dtype != dtype for t in tensors[:2]) and not torch.is_autocast_enabled(x.device.type):
        return "input and weights differ in dtype"
    if any(t.device != x.device for t in tensors):
        return "the tensors are not on one device"
    hidden, largest = weight_hh.shape[3], table.largest_hidden(architecture(x.device), dtype == torch.float32)
    if hidden > largest:
        return (
            f"hidden size {hidden} is over {largest}: weights that do not stay on the chip are the library's strength"
        )
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
    y, h, *_ = _layer(x, weight_ih, weight_hh, bias_ih, bias_hh, state, None, keep_gates)
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
    y, h, c, *_ = _layer(x, weight_ih, weight_hh, bias_ih, bias_hh, h_first, c_first, keep_gates)
    return y, (h, c)


def _layer(x, weight_ih, weight_hh, bias_ih, bias_hh, h_first, c_first, keep_gates):
    inputs = (x, weight_ih, weight_hh, bias_ih, bias_hh, h_first, c_first)
    dtype = compute_dtype(x)
    keep = KEEP_NOTHING
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        if keep_gates is None:  # by bytes: the gates are kept only where they are in memory anyway
            keep_gates = not sizes_of(x, weight_ih, weight_hh, bias_ih, dtype)[-1]
        keep = KEEP_GATES if keep_gates else KEEP_LITTLE
    return _forward_op(*inputs, dtype, keep)


_library = torch.library.Library("fastblocks", "FRAGMENT")
_library.define(
    "grouped_rnn(Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? h_first, "
    "Tensor? c_first, ScalarType dtype, int keep) -> "
    "(Tensor y, Tensor h_last, Tensor c_last, Tensor gates, Tensor cell)"
)
_library.define(
    "grouped_rnn_backward(Tensor? grad_y, Tensor? grad_h_last, Tensor? grad_c_last, Tensor x, Tensor weight_ih, "
    "Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? h_first, Tensor? c_first, Tensor y, Tensor gates, "
    "Tensor cell) -> (Tensor grad_x, Tensor grad_weights, Tensor grad_h_first, Tensor grad_c_first)"
)
_forward_op = torch.ops.fastblocks.grouped_rnn.default
_backward_op = torch.ops.fastblocks.grouped_rnn_backward.default


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward_impl(x, weight_ih, weight_hh, bias_ih, bias_hh, h_first, c_first, dtype, keep):
    inputs = (x, weight_ih, weight_hh, bias_ih, bias_hh, h_first, c_first)
    return forward(*map(_dense, inputs), dtype=dtype, keep=keep)


def _backward_impl(*tensors):
    return backward(*map(_dense, tensors))


def _forward_fake(x, weight_ih, weight_hh, bias_ih, bias_hh, h_first, c_first, dtype, keep):
    batch, length, directions, groups, _, hidden, lstm, fused = sizes_of(x, weight_ih, weight_hh, bias_ih, dtype)
    state = (directions, batch, groups * hidden)
    gates = (groups, batch * length, directions, hidden, 4)
    return (
        x.new_empty(batch, length, groups * directions * hidden, dtype=dtype),
        x.new_empty(state, dtype=dtype),
        x.new_empty(state if lstm else 0, dtype=dtype),
        x.new_empty(gates if keep == KEEP_GATES else 0, dtype=dtype),
        x.new_empty(gates[:-1] if keeps_cell(keep, fused, lstm) else 0, dtype=dtype),
    )


def _backward_fake(
    grad_y, grad_h_last, grad_c_last, x, weight_ih, weight_hh, bias_ih, bias_hh, h_first, c_first, y, gates, cell
):
    weights = [t.numel() for t in (weight_ih, weight_hh, bias_ih, bias_hh) if t is not None]
    return (
        x.new_empty(x.shape),
        weight_ih.new_empty(sum(weights)),
        x.new_empty(0) if h_first is None else h_first.new_empty(h_first.shape),
        x.new_empty(0) if c_first is None else c_first.new_empty(c_first.shape),
    )


class _GroupedRNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            y, h_last, c_last, gates, cell = _forward_op(*arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:7], y, gates, cell)
        ctx.mark_non_differentiable(gates, cell, *([c_last] if c_last.numel() == 0 else []))
        return y, h_last, c_last, gates, cell

    @staticmethod
    def backward(ctx, grad_y, grad_h_last, grad_c_last, *_):
        *inputs, y, gates, cell = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable_backward((grad_y, grad_h_last, grad_c_last), inputs, y.dtype), None, None)
        grad_x, flat, grad_h, grad_c = _backward_op(grad_y, grad_h_last, grad_c_last, *inputs, y, gates, cell)
        weights = iter(flat.split([t.numel() for t in inputs[1:5] if t is not None]))
        grads = [None if t is None else next(weights).view(t.shape) for t in inputs[1:5]]
        states = [None if t is None else grad for t, grad in zip(inputs[5:], (grad_h, grad_c), strict=True)]
        return grad_x, *grads, *states, None, None


def _differentiable_backward(
    grads: tuple[Tensor | None, ...], inputs: list[Tensor | None], dtype: torch.dtype
) -> list[Tensor | None]:
    """The same gradients by formulas that autograd can see through, for derivatives of derivatives."""
    from fastblocks.eager import recurrent as eager  # looks up, not down, for the one thing that no kernel does

    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # cuDNN's has no second derivative
        inputs = [None if t is None else t.view_as(t) for t in inputs]  # one tensor may stand in two places
        *weights, h_first, c_first = [None if t is None else t.to(dtype) for t in inputs]
        if weights[1].shape[2] == 4 * weights[2].shape[3]:
            y, last = eager.grouped_lstm(*weights, None if h_first is None else (h_first, c_first))
        else:
            y, *last = eager.grouped_gru(*weights, h_first)
        outputs = [(out, grad) for out, grad in zip((y, *last), grads, strict=False) if grad is not None]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        outs, grad_outs = zip(*outputs, strict=True)
        results = iter(torch.autograd.grad(outs, wanted, grad_outs, create_graph=True, allow_unused=True))
    return [next(results) if t is not None and t.requires_grad else None for t in inputs]


def _autograd(*arguments):
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        return _GroupedRNN.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*arguments)


for _key in ("CPU", "CUDA"):
    _library.impl("grouped_rnn", _forward_impl, _key)
    _library.impl("grouped_rnn_backward", _backward_impl, _key)
_library.impl("grouped_rnn", _autograd, "Autograd")
torch.library.register_fake("fastblocks::grouped_rnn", _forward_fake, lib=_library)
torch.library.register_fake("fastblocks::grouped_rnn_backward", _backward_fake, lib=_library)
