"""The operator of `fastblocks.functional.rnn_block`: a whole block as one node of autograd's graph.

    x = x + rnn(x̂ s₁)     n = x̂ s₂   x = x + (silu(n W_gateᵀ) ∘ n W_upᵀ) W_downᵀ

x (B, T, C) any strides; y (B, T, C). Everything between the norms is rounded to `dtype` (autocast's, where that is on);
y has the promoted dtype of x and `dtype`. The layers of the recurrence have one shape, and their tensors stand in one.

Launches with L fused layers, 16 bits up to 128 channels: pack, norm, L, MLP: 3 + L forward. Backward, up to 64 channels
or on sm_90 and later: MLP by its input and by its weights, 2 a layer, norm 2, unpack 2: 6 + 2L. Above, and for float32
also forward, the library multiplies (`steps`).
Kept for backward besides the arguments: the normalized x, every layer's output and x̂₂, 4 + 2L bytes an element in 16
bits, two rstd a row, what the recurrence keeps, and the packed weights.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fastblocks.eager import blocks as eager
from fastblocks.kernels.blocks import config, pack, steps
from fastblocks.kernels.operator import Operator, compute_dtype
from fastblocks.kernels.recurrent import operator as recurrent
from fastblocks.kernels.rows import rms_norm

__all__ = ["rnn_block", "unsupported_reason"]


def unsupported_reason(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    weight_down: Tensor,
    scale_rnn: Tensor,
    scale_mlp: Tensor,
    eps_rnn: float,
    eps_mlp: float,
) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    parameters = (weight_ih, weight_hh, weight_gate, weight_up, weight_down, scale_rnn, scale_mlp)
    reason = steps.parameters_reason(x, parameters)
    if not reason and x.shape[-1] > rms_norm.MAX_CHANNELS:
        reason = f"rows of {x.shape[-1]} channels, the kernels take {rms_norm.MAX_CHANNELS}"
    return reason or recurrent.unsupported_reason(x, weight_ih[0], weight_hh[0], None, None, None, None)


def _layer(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, dtype: torch.dtype) -> tuple:
    """The arguments of the recurrence's operator, but `keep`: no biases, no state, and gates kept as it sees fit."""
    return x, weight_ih, weight_hh, None, None, None, None, dtype, None


def _layer_results(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, dtype: torch.dtype, keep: bool) -> list:
    """Shape and dtype of each result of a layer, or None."""
    results = recurrent.OPERATOR.outputs(*_layer(x, weight_ih, weight_hh, dtype), keep)
    return [None if t is None else (tuple(t.shape), t.dtype) for t in results]


@lru_cache(maxsize=1024)
def _layer_results_of(x: torch.Size, weight_ih: torch.Size, weight_hh: torch.Size, dtype: torch.dtype, keep: bool):
    """The same from shapes alone, without allocating anything."""
    return _layer_results(*(torch.empty(size, device="meta") for size in (x, weight_ih, weight_hh)), dtype, keep)


def _outputs(
    x, weight_ih, weight_hh, weight_gate, weight_up, weight_down, scale_rnn, scale_mlp, eps_rnn, eps_mlp, dtype, keep
):
    batch, length, channels = x.shape
    n_layers, *of_input = weight_ih.shape
    if type(x) is Tensor:
        results = _layer_results_of(x.shape, tuple(of_input), tuple(weight_hh.shape[1:]), dtype, keep)
    else:  # a fake, of symbolic shape maybe
        results = _layer_results(x, weight_ih[0], weight_hh[0], dtype, keep)
    return (
        x.new_empty((batch, length, channels), dtype=torch.promote_types(x.dtype, dtype)),
        x.new_empty((batch, length, channels), dtype=dtype),
        x.new_empty(batch * length, dtype=torch.float32),
        *[None if of is None else x.new_empty((n_layers, *of[0]), dtype=of[1]) for of in results],
        x.new_empty((batch * length, channels), dtype=dtype),
        x.new_empty(batch * length, dtype=torch.float32),
        x.new_empty(pack.numbers(channels, weight_gate.shape[0], False), dtype=dtype),
    )


def _unbind(tensor: Tensor | None, layers: int) -> tuple[Tensor | None, ...]:
    return (None,) * layers if tensor is None else tensor.unbind()


def _forward(
    outputs, x, weight_ih, weight_hh, weight_gate, weight_up, weight_down, scale_rnn, scale_mlp, eps_rnn, eps_mlp,
    dtype, keep,
):  # fmt: skip
    y, normalized1, rstd1, *of_layers, normalized2, rstd2, packed = outputs
    mlp_parameters = [p.contiguous() for p in (weight_gate, weight_up, weight_down)]
    pack.pack(None, None, *mlp_parameters, None, scale_mlp.contiguous(), packed)
    x = x.contiguous()
    rms_norm.forward(x, scale_rnn.contiguous(), eps_rnn, normalized1, rstd1)
    kept = zip(*[_unbind(t, len(weight_ih)) for t in of_layers], strict=True)
    last = normalized1
    for input_weight, state_weight, results in zip(weight_ih.unbind(), weight_hh.unbind(), kept, strict=True):
        recurrent.OPERATOR.forward(results, *_layer(last, input_weight, state_weight, dtype), keep)
        last = results[0]
    steps.mlp_forward(last, None, x, packed, y, normalized2, rstd2, eps_mlp)


def _backward(
    grads, needs, x, weight_ih, weight_hh, weight_gate, weight_up, weight_down, scale_rnn, scale_mlp, eps_rnn, eps_mlp,
    dtype, normalized1, rstd1, layers, gates, cell, normalized2, rstd2, packed,
):  # fmt: skip
    channels, n_layers = x.shape[2], len(weight_ih)
    fused, partial = config.fuses_backward(channels, packed), None
    slabs = steps.slabs_of(x.shape[0] * x.shape[1], channels, packed, fused)
    if any(needs[3:6]) or needs[7]:
        partial = steps.new_partial(slabs, packed, fused)
    grad_m, grad = steps.mlp_backward_all(grads[0].contiguous(), None, normalized2, rstd2, packed, None, partial, fused)

    results, of_layers = layers.unbind(), []
    kept = zip(
        (normalized1, *results[:-1]), weight_ih.unbind(), weight_hh.unbind(), results, _unbind(gates, n_layers),
        _unbind(cell, n_layers), strict=True,
    )  # fmt: skip
    for last, input_weight, state_weight, *of_layer in reversed(list(kept)):
        grad, by_input_weight, by_state_weight, *_ = recurrent.OPERATOR.backward(
            (grad, None, None), [], *_layer(last, input_weight, state_weight, dtype), *of_layer
        )
        of_layers.insert(0, (by_input_weight, by_state_weight))
    grad_ih, grad_hh = (torch.stack(grads) for grads in zip(*of_layers, strict=True))

    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    grad_scale = torch.empty_like(scale_rnn, memory_format=torch.contiguous_format) if needs[6] else None
    if needs[0] or needs[6]:
        rms_norm.backward(
            grad, x.contiguous(), rstd1, scale_rnn.contiguous(), grad_x,
            kept_is_normalized=False, grad_residual=grad_m, grad_weight=grad_scale,
        )  # fmt: skip
    of_mlp = [None] * 7
    if partial is not None:
        mlp_parameters = [p.contiguous() for p in (weight_gate, weight_up, weight_down)]
        of_mlp = pack.unpack(partial, slabs, slabs, None, None, *mlp_parameters, None, scale_mlp.contiguous())
    return grad_x, grad_ih, grad_hh, *of_mlp[2:5], grad_scale, of_mlp[6]


def _formula(*arguments):
    return eager.rnn_block(*arguments[:-1])  # without dtype: autocast says it


OPERATOR = Operator(
    "rnn_block",
    "(Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor weight_gate, Tensor weight_up, Tensor weight_down, "
    "Tensor scale_rnn, Tensor scale_mlp, float eps_rnn, float eps_mlp, ScalarType dtype, bool keep) -> "
    "(Tensor y, Tensor normalized1, Tensor rstd1, Tensor layers, Tensor h_last, Tensor c_last, Tensor gates, "
    "Tensor cell, Tensor normalized2, Tensor rstd2, Tensor packed)",
    results=1,
    outputs=_outputs,
    forward=_forward,
    saved=("normalized1", "rstd1", "layers", "gates", "cell", "normalized2", "rstd2", "packed"),
    backward=_backward,
    formula=_formula,
)


def rnn_block(*arguments) -> Tensor:
    """`fastblocks.functional.rnn_block`, for arguments that `unsupported_reason` accepts."""
    return OPERATOR(*arguments, compute_dtype(arguments[0]))[0]
