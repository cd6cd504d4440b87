"""The operator of `fastblocks.functional.roformer_block`: a whole block as one node of autograd's graph.

    n = x̂ s₁   x = x + attention(n W_qkvᵀ) W_outᵀ     n = x̂ s₂   x = x + (silu(n W_gateᵀ) ∘ n W_upᵀ) W_downᵀ

x (B, T, C) and registers (B or 1, R, C) any strides; y (B, T, C), and the registers' output (B, R, C) where it is asked
for. Products are rounded to `dtype` (autocast's, where that is on); y has the promoted dtype of x and `dtype`.

Launches, 16 bits up to 128 channels: pack, norm and qkv, attention, output product and MLP: 4 forward. Backward up to
64 channels: MLP by its input, MLP by its weights, output product by its weight, attention's 1 to 3, qkv by its weight,
norm and qkv by the input, unpack and the sum of its scales: 8 to 10; up to 128 channels on sm_90 and later one more.
Above, and for float32 also forward, the library multiplies (`steps`). Registers run the same kernels over rows of their
own: one launch more forward (two with their output), three more backward (six).
Kept for backward besides the arguments: x̂₁, qkv, the attention's output and x̂₂, 12 bytes an element in 16 bits, two
rstd a row, what the attention keeps, and the packed weights. Neither x + attention nor gate and up are kept.
"""

import torch
from torch import Tensor

from fastblocks.eager import blocks as eager
from fastblocks.kernels.attention import operator as attention
from fastblocks.kernels.blocks import config, pack, steps
from fastblocks.kernels.blocks.steps import as_rows
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
    n_registers = 0 if registers is None else registers.shape[1]
    tokens, all_rows = batch * length, batch * length + (0 if registers is None else registers.shape[0] * n_registers)
    y_dtype = torch.promote_types(x.dtype, dtype)
    qkv = x.new_empty((all_rows, 3 * channels), dtype=dtype)
    qkv_tokens, qkv_registers = _tokens_and_registers(qkv, x, registers)
    attended, register_attended, lse = attention.OPERATOR.outputs(
        qkv_tokens, rope, n_head, window, qkv_registers, registers_out, None, keep
    )
    mlp_rows = tokens + (batch * n_registers if registers_out else 0)
    keep_mlp = keep or not config.fuses(channels, dtype)
    return (
        x.new_empty((batch, length, channels), dtype=y_dtype),
        x.new_empty((batch, n_registers, channels), dtype=y_dtype) if registers_out else None,
        x.new_empty((all_rows, channels), dtype=dtype),
        x.new_empty((all_rows,), dtype=torch.float32),
        qkv,
        attended,
        register_attended,
        lse,
        x.new_empty((mlp_rows, channels), dtype=dtype) if keep_mlp else None,
        x.new_empty((mlp_rows,), dtype=torch.float32) if keep_mlp else None,
        x.new_empty((pack.numbers(channels, weight_gate.shape[0], True),), dtype=dtype),
    )


def _tokens_and_registers(rows: Tensor, x: Tensor, registers: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows of tokens, followed by those of registers, as (B, T, …) and (B or 1, R, …)."""
    if registers is None:
        return rows.view(x.shape[0], x.shape[1], -1), None
    tokens = x.shape[0] * x.shape[1]
    of_registers = rows[tokens:].view(registers.shape[0], registers.shape[1], -1)
    return rows[:tokens].view(x.shape[0], x.shape[1], -1), of_registers


def _split(tensor: Tensor | None, at: int) -> tuple[Tensor | None, Tensor | None]:
    """The first `at` rows, and the rest."""
    if tensor is None or tensor.shape[0] == at:
        return tensor, None
    return tensor[:at], tensor[at:]


def _forward(
    outputs, x, weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp, rope, n_head,
    window, registers, registers_out, eps_attention, eps_mlp, dtype, keep,
):  # fmt: skip
    y, register_y, normalized1, rstd1, qkv, attended, register_attended, lse, normalized2, rstd2, packed = outputs
    channels, hidden = x.shape[2], weight_gate.shape[0]
    parameters = (weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp)
    pack.pack(*(p.contiguous() for p in parameters), packed)
    qkv_weight, out_weight, mlp_weight = pack.parts(packed, channels, hidden, True)

    rows = as_rows(x)
    kept1 = [_split(t, len(rows)) for t in (qkv, normalized1, rstd1)]
    steps.norm_linear_forward(rows, qkv_weight, *(t for t, _ in kept1), eps_attention)
    if registers is not None:
        steps.norm_linear_forward(as_rows(registers), qkv_weight, *(t for _, t in kept1), eps_attention)
    qkv_tokens, qkv_registers = _tokens_and_registers(qkv, x, registers)
    attention.OPERATOR.forward(
        (attended, register_attended, lse), qkv_tokens, rope, n_head, window, qkv_registers, registers_out, None, keep
    )
    kept2 = [_split(t, len(rows)) for t in (normalized2, rstd2)]
    steps.mlp_forward(as_rows(attended), out_weight, rows, mlp_weight, as_rows(y), *(t for t, _ in kept2), eps_mlp)
    if registers_out:
        residual = as_rows(registers.expand(x.shape[0], -1, -1))
        steps.mlp_forward(
            as_rows(register_attended), out_weight, residual, mlp_weight, as_rows(register_y),
            *(t for _, t in kept2), eps_mlp,
        )  # fmt: skip


def _backward(
    grads, needs, x, weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp, rope,
    n_head, window, registers, registers_out, eps_attention, eps_mlp, dtype,
    normalized1, rstd1, qkv, attended, register_attended, lse, normalized2, rstd2, packed,
):  # fmt: skip
    grad_y, grad_register_y = grads
    batch, length, channels = x.shape
    hidden, tokens = weight_gate.shape[0], batch * length
    needs_x, needs_registers, needs_weights = needs[0], registers is not None and needs[9], any(needs[1:8])
    if grad_y is None:
        grad_y = torch.zeros(x.shape, dtype=grad_register_y.dtype, device=x.device)
    with_register_y = registers_out and grad_register_y is not None
    qkv_weight, out_weight, mlp_weight = pack.parts(packed, channels, hidden, True)

    partial = None
    of_tokens = steps.slabs_of(tokens, channels, packed)
    of_registers = 0
    if registers is not None:
        of_registers = steps.slabs_of(batch * registers.shape[1], channels, packed)
    slabs_rest = of_tokens + (of_registers if with_register_y else 0)
    none = (None, None, None)
    sums = register_sums = none
    if needs_weights:
        partial = steps.new_partial(of_tokens + of_registers, packed, channels)
        sums = pack.parts(partial[:of_tokens], channels, hidden, True)
        if registers is not None:
            register_sums = pack.parts(partial[of_tokens:], channels, hidden, True)

    (normalized, register_normalized), (rstd, register_rstd) = _split(normalized2, tokens), _split(rstd2, tokens)
    grad_m, grad_attended = steps.mlp_backward_all(
        as_rows(grad_y), as_rows(attended), normalized, rstd, mlp_weight, out_weight, sums[2], sums[1]
    )
    grad_register_m = grad_register_attended = None
    if with_register_y:
        grad_register_m, grad_register_attended = steps.mlp_backward_all(
            as_rows(grad_register_y), as_rows(register_attended), register_normalized, register_rstd, mlp_weight,
            out_weight, register_sums[2], register_sums[1],
        )  # fmt: skip
        grad_register_attended = grad_register_attended.view(register_attended.shape)

    qkv_tokens, qkv_registers = _tokens_and_registers(qkv, x, registers)
    grad_qkv, _, grad_register_qkv, _ = attention.OPERATOR.backward(
        (grad_attended.view(x.shape), grad_register_attended), (True, False, registers is not None), qkv_tokens, rope,
        n_head, window, qkv_registers, registers_out, None, attended, register_attended, lse,
    )  # fmt: skip

    (normalized, register_normalized), (rstd, register_rstd) = _split(normalized1, tokens), _split(rstd1, tokens)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    steps.norm_linear_backward(
        as_rows(grad_qkv),
        normalized,
        rstd,
        qkv_weight,
        grad_m,
        as_rows(grad_x) if needs_x else None,
        sums[0],
    )
    grad_registers = None
    if registers is not None:
        if needs_registers:
            grad_registers = torch.empty(registers.shape, dtype=registers.dtype, device=x.device)
        if grad_register_m is not None and registers.shape[0] < batch:  # the same registers for the whole batch
            by_sample = grad_register_m.view(batch, -1, channels)
            grad_register_m = by_sample.sum(0, dtype=torch.float32)
        steps.norm_linear_backward(
            as_rows(grad_register_qkv), register_normalized, register_rstd, qkv_weight, grad_register_m,
            as_rows(grad_registers) if needs_registers else None, register_sums[0],
        )  # fmt: skip
    of_weights = [None] * 7
    if needs_weights:
        parameters = (weight_qkv, weight_out, weight_gate, weight_up, weight_down, scale_attention, scale_mlp)
        of_weights = pack.unpack(partial, len(partial), slabs_rest, *(p.contiguous() for p in parameters))
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
