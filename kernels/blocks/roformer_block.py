"""The operator of `fastblocks.functional.roformer_block`: a whole block as one node of autograd's graph.

    n = x̂ s₁   x = x + attention(n W_qkvᵀ) W_outᵀ     n = x̂ s₂   x = x + (silu(n W_gateᵀ) ∘ n W_upᵀ) W_downᵀ

x (B, T, C) and registers (B or 1, R, C) any strides; y (B, T, C), and the registers' output (B, R, C) where it is asked
for. Products are rounded to `dtype` (autocast's, where that is on); y has the promoted dtype of x and `dtype`.

Launches, 16 bits up to 128 channels: pack, norm and qkv, attention, output product and MLP: 4 forward. Backward up to
64 channels: MLP by its input, MLP by its weights, output product by its weight, attention's 1 to 3, qkv by its weight,
norm and qkv by the input, unpack and the sum of its scales: 8 to 10; up to 128 channels on sm_90 and later one less,
because the weights of MLP and output product share a launch. Above, and for float32 also forward, the library
multiplies (`steps`). Registers run the same kernels over rows of their own: one launch more forward (two with their
output), three more backward (six; two and four above 64 channels).
Kept for backward besides the arguments: x̂₁, qkv, the attention's output and x̂₂, 12 bytes an element in 16 bits, two
rstd a row, what the attention keeps, and the packed weights. Neither x + attention nor gate and up are kept.
"""

import torch
from torch import Tensor

from fastblocks.eager import blocks as eager
from fastblocks.kernels.attention import operator as attention
from fastblocks.kernels.blocks import config, pack, steps
from fastblocks.kernels.operator import Operator, compute_dtype
from fastblocks.kernels.rows.rms_norm import MAX_CHANNELS

__all__ = ["roformer_block", "unsupported_reason"]


def unsupported_reason(
    x: Tensor,
    weight_qkv: Tensor,
    weight_out: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    weight_down: Tensor,
    scale_attention: Tensor,
    scale_mlp: Tensor,
    rope: Tensor,
    n_head: int,
    window: int,
    registers: Tensor | None,
    return_registers: bool,
    eps_attention: float,
    eps_mlp: float,
) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    parameters = (weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp)
    reason = steps.parameters_reason(x, parameters)
    if reason:
        return reason
    if x.shape[-1] > MAX_CHANNELS:
        return f"rows of {x.shape[-1]} channels, the kernels take {MAX_CHANNELS}"
    if registers is not None and (registers.dtype != x.dtype or registers.device != x.device):
        return f"the registers are {registers.dtype} on {registers.device}, the tokens {x.dtype} on {x.device}"
    n_registers = 0 if registers is None else registers.shape[1]
    return attention.unsupported_head(x.shape[-1] // n_head, n_registers, rope, x.device)


def _outputs(
    x, weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp, rope, n_head, window,
    registers, registers_out, eps_attention, eps_mlp, dtype, keep,
):  # fmt: skip
    batch, length, channels = x.shape
    tokens = all_rows = mlp_rows = batch * length
    qkv_shape, n_registers, register_y = (batch, length, 3 * channels), 0, None
    y_dtype = torch.promote_types(x.dtype, dtype)
    if registers is not None:
        n_registers = registers.shape[1]
        all_rows += registers.shape[0] * n_registers
        qkv_shape = (all_rows, 3 * channels)
    if registers_out:
        mlp_rows += batch * n_registers
        register_y = x.new_empty((batch, n_registers, channels), dtype=y_dtype)
    qkv = x.new_empty(qkv_shape, dtype=dtype)
    (of_tokens,), (of_registers,) = _tokens_and_registers(tokens, registers, qkv)
    attended, register_attended, lse = attention.OPERATOR.outputs(
        *_attention(of_tokens, rope, n_head, window, of_registers, registers_out, x, registers), keep
    )
    keep_mlp = keep or not config.fuses(channels, dtype)
    return (
        x.new_empty((batch, length, channels), dtype=y_dtype),
        register_y,
        x.new_empty((all_rows, channels), dtype=dtype),
        x.new_empty(all_rows, dtype=torch.float32),
        qkv,
        attended,
        register_attended,
        lse,
        x.new_empty((mlp_rows, channels), dtype=dtype) if keep_mlp else None,
        x.new_empty(mlp_rows, dtype=torch.float32) if keep_mlp else None,
        x.new_empty(pack.numbers(channels, weight_gate.shape[0], True), dtype=dtype),
    )


def _tokens_and_registers(tokens: int, registers: Tensor | None, *tensors: Tensor | None) -> tuple:
    """Of each tensor the rows of tokens; and the rows of registers behind them, or None."""
    if registers is None:
        return tensors, (None,) * len(tensors)
    return [t if t is None else t[:tokens] for t in tensors], [t if t is None else t[tokens:] for t in tensors]


def _attention(qkv, rope, n_head, window, register_qkv, registers_out, x, registers) -> tuple:
    """The arguments of the attention's operator, but `keep`, from rows of qkv; no gate."""
    if registers is not None:
        qkv = qkv.view(*x.shape[:2], -1)
        register_qkv = register_qkv.view(*registers.shape[:2], -1)
    return qkv, rope, n_head, window, register_qkv, registers_out, None


def _forward(
    outputs, x, weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp, rope, n_head,
    window, registers, registers_out, eps_attention, eps_mlp, dtype, keep,
):  # fmt: skip
    y, register_y, normalized1, rstd1, qkv, attended, register_attended, lse, normalized2, rstd2, packed = outputs
    tokens, channels = x.shape[0] * x.shape[1], x.shape[2]
    parameters = (weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp)
    pack.pack(*[p.contiguous() for p in parameters], packed)
    qkv_weight, out_weight, mlp_weight = pack.parts(packed, channels)

    x = x.contiguous()
    of_tokens, of_registers = _tokens_and_registers(tokens, registers, qkv, normalized1, rstd1)
    steps.norm_linear_forward(x, qkv_weight, *of_tokens, eps_attention)
    if registers is not None:
        steps.norm_linear_forward(registers.contiguous(), qkv_weight, *of_registers, eps_attention)
    attention.OPERATOR.forward(
        (attended, register_attended, lse),
        *_attention(of_tokens[0], rope, n_head, window, of_registers[0], registers_out, x, registers), keep,
    )  # fmt: skip
    of_tokens, of_registers = _tokens_and_registers(tokens, registers, normalized2, rstd2)
    steps.mlp_forward(attended, out_weight, x, mlp_weight, y, *of_tokens, eps_mlp)
    if registers_out:
        residual = registers.expand(x.shape[0], -1, -1).contiguous()
        steps.mlp_forward(register_attended, out_weight, residual, mlp_weight, register_y, *of_registers, eps_mlp)


def _backward(
    grads, needs, x, weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp, rope,
    n_head, window, registers, registers_out, eps_attention, eps_mlp, dtype,
    normalized1, rstd1, qkv, attended, register_attended, lse, normalized2, rstd2, packed,
):  # fmt: skip
    grad_y, grad_register_y = grads
    batch, length, channels = x.shape
    tokens, fused = batch * length, config.fuses_backward(channels, packed)
    if grad_y is None:
        grad_y = torch.zeros(x.shape, dtype=grad_register_y.dtype, device=x.device)
    with_register_y = registers_out and grad_register_y is not None
    qkv_weight, out_weight, mlp_weight = pack.parts(packed, channels)

    slabs = slabs_rest = slabs_tokens = steps.slabs_of(tokens, channels, packed, fused)
    if registers is not None:
        slabs += steps.slabs_of(batch * registers.shape[1], channels, packed, fused)
        slabs_rest = slabs if with_register_y else slabs_tokens
    partial = of_qkv = of_rest = register_of_qkv = register_of_rest = None
    if any(needs[1:8]):
        partial = steps.new_partial(slabs, packed, fused)
        first = 3 * channels * channels
        of_qkv, of_rest = partial.unsafe_split_with_sizes((first, partial.shape[1] - first), 1)
        (of_qkv, of_rest), (register_of_qkv, register_of_rest) = _tokens_and_registers(
            slabs_tokens, registers, of_qkv, of_rest
        )

    (normalized, rstd), of_registers = _tokens_and_registers(tokens, registers, normalized2, rstd2)
    grad_m, grad_attended = steps.mlp_backward_all(
        grad_y.contiguous(), attended, normalized, rstd, mlp_weight, out_weight, of_rest, fused
    )
    grad_register_m = grad_register_attended = None
    if with_register_y:
        grad_register_m, grad_register_attended = steps.mlp_backward_all(
            grad_register_y.contiguous(), register_attended, *of_registers, mlp_weight, out_weight, register_of_rest,
            fused,
        )  # fmt: skip

    (of_tokens, normalized, rstd), (of_registers, *register_kept) = _tokens_and_registers(
        tokens, registers, qkv, normalized1, rstd1
    )
    grad_qkv, _, grad_register_qkv, *_ = attention.OPERATOR.backward(
        (grad_attended, grad_register_attended), (True, False, registers is not None),
        *_attention(of_tokens, rope, n_head, window, of_registers, registers_out, x, registers),
        attended, register_attended, lse,
    )  # fmt: skip

    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    steps.norm_linear_backward(grad_qkv, normalized, rstd, qkv_weight, grad_m, grad_x, of_qkv, fused)
    grad_registers = None
    if registers is not None:
        if needs[9]:
            grad_registers = torch.empty_like(registers, memory_format=torch.contiguous_format)
        if grad_register_m is not None and registers.shape[0] < batch:  # the same registers for the whole batch
            grad_register_m = grad_register_m.sum(0, dtype=torch.float32)
        steps.norm_linear_backward(
            grad_register_qkv, *register_kept, qkv_weight, grad_register_m, grad_registers, register_of_qkv, fused
        )
    of_weights = [None] * 7
    if partial is not None:
        parameters = (weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp)
        of_weights = pack.unpack(partial, slabs, slabs_rest, *[p.contiguous() for p in parameters])
    return grad_x, *of_weights, None, grad_registers


def _formula(*arguments):
    return eager.roformer_block(*arguments[:-1])  # without dtype: autocast says it


OPERATOR = Operator(
    "roformer_block",
    "(Tensor x, Tensor weight_qkv, Tensor weight_out, Tensor weight_gate, Tensor weight_up, Tensor weight_down, "
    "Tensor scale_attention, Tensor scale_mlp, Tensor rope, int n_head, int window, Tensor? registers, "
    "bool registers_out, float eps_attention, float eps_mlp, ScalarType dtype, bool keep) -> "
    "(Tensor y, Tensor register_y, Tensor normalized1, Tensor rstd1, Tensor qkv, Tensor attended, "
    "Tensor register_attended, Tensor lse, Tensor normalized2, Tensor rstd2, Tensor packed)",
    results=2,
    outputs=_outputs,
    forward=_forward,
    saved=(
        "normalized1", "rstd1", "qkv", "attended", "register_attended", "lse", "normalized2", "rstd2", "packed",
    ),
    backward=_backward,
    formula=_formula,
)  # fmt: skip


def roformer_block(*arguments) -> Tensor | tuple[Tensor, Tensor]:
    """`fastblocks.functional.roformer_block`, for arguments that `unsupported_reason` accepts."""
    y, register_y, *_ = OPERATOR(*arguments, compute_dtype(arguments[0]))
    return (y, register_y) if arguments[12] else y
