"""Sliding-window attention with rotary positions and register tokens, from packed qkv to (B, T, C).

    q, k = rotate(q), rotate(k)   interleaved channel pairs, in float32, rounded to the input's dtype
    out_s = Σ_t softmax_t(q_s · k_t / √D) v_t,   t: every register, and the tokens s − left ≤ t ≤ s + right
    out_s = sigmoid(gate_s) out_s   where there are gates, one logit for each token and head

Layouts: qkv (B, T, 3C) and register_qkv (B or 1, R, 3C) with any strides but a contiguous last dimension, read in
place; rope (≥ R + T, D/2, 2) float32; gate (B, T, H); out (B, T, C) contiguous. A register token sees everything; its
output is computed only when asked for, and is not gated. window is (left, right), −1 for a side without an end, or the
width of both together. Rows past 2^31 elements are addressed in int64.

Two sets of kernels, chosen by shape alone: `short` (all keys of a head on chip; short sequences) and `long` (everything
else; work and memory grow with T · (window + R)), with `registers` for the register tokens' output and gradients.
Kept for backward: the inputs, and by `long` also out and one flat float32 tensor: where they are rotated first,
q and k (B, T, 2C) in the dtype of qkv; then `lse` (B, H, T), the base-2 logarithm of the softmax's sum; then,
where the register tokens' output was asked for, theirs (B, H, R).
Each file counts its own bytes and FLOPs.
"""

import torch
from torch import Tensor

from fastblocks.eager import attention as eager
from fastblocks.kernels import runtime
from fastblocks.kernels.attention import long, registers, rotation, short
from fastblocks.kernels.attention.config import is_rotated, most_registers, plan_of, runs_short
from fastblocks.kernels.operator import Operator

__all__ = ["rope_attention", "unsupported_reason"]

MIN_HEAD_DIM = 8
MAX_HEAD_DIM = 256
MAX_STRIDE = 2**31 // 256  # elements from a token to the next: offsets inside of a tile have 32 bits


def unsupported_reason(
    qkv: Tensor, rope: Tensor, n_head: int, window: tuple[int, int], register_qkv: Tensor | None,
    return_registers: bool,
    gate: Tensor | None,
) -> str:  # fmt: skip
    """Why these kernels do not take a call; an empty string if they do."""
    n_registers = 0 if register_qkv is None else register_qkv.shape[1]
    reason = unsupported_head(qkv.shape[2] // (3 * n_head), n_registers, rope, qkv.device)
    if reason:
        return reason
    for what, x in (("register tokens", register_qkv), ("gates", gate)):
        if x is not None and (x.dtype != qkv.dtype or x.device != qkv.device):
            return f"the {what} are {x.dtype} on {x.device}, the tokens {qkv.dtype} on {qkv.device}"
    return ""


def unsupported_head(head_dim: int, n_registers: int, rope: Tensor, device: torch.device) -> str:
    """Why these kernels take no heads of this size, so many register tokens, or this table; or an empty string."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"the head size is {head_dim}, the kernel takes {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    if rope.dtype != torch.float32 or rope.device != device:
        return f"the rope table is {rope.dtype} on {rope.device}, the kernel needs float32 on {device}"
    if rope.requires_grad:
        return "the rope table wants a gradient"
    if n_registers and n_registers > (most := most_registers(head_dim, runtime.architecture(device))):
        return f"{n_registers} register tokens of head size {head_dim}, the kernel takes {most}"
    return ""


def _outputs(qkv, rope, n_head, window, register_qkv, registers_out, gate, keep):
    batch, n_tokens, width = qkv.shape
    n_registers = 0 if register_qkv is None else register_qkv.shape[1]
    short = runs_short(qkv, n_head, n_registers)
    kept = batch * n_head * (n_tokens + n_registers if registers_out else n_tokens)
    if not short and is_rotated(n_tokens, window, qkv.element_size()):
        kept += _rotated_floats(qkv)
    return (
        qkv.new_empty((batch, n_tokens, width // 3)),
        qkv.new_empty((batch, n_registers, width // 3)) if registers_out else None,
        qkv.new_empty((kept,), dtype=torch.float32) if keep and not short else None,
    )


def _readable(x: Tensor | None) -> Tensor | None:
    """x (B, T, …) as the kernels can read it: the last dimension adjacent, tokens not farther apart than MAX_STRIDE."""
    return x if x is None or (x.stride(-1) == 1 and x.stride(1) < MAX_STRIDE) else x.contiguous()


def _rotated_floats(qkv: Tensor) -> int:
    """Numbers in float32 that take as many bytes as rotated q and k."""
    return qkv.shape[0] * qkv.shape[1] * (2 * (qkv.shape[2] // 3) * qkv.element_size() // 4)


def _parts_of(kept: Tensor, qkv: Tensor, n_head: int, rotated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Views of what is kept: rotated q and k (or qkv itself, where they are not), lse, and the register tokens' lse."""
    batch, n_tokens, width = qkv.shape
    qk, floats = qkv, _rotated_floats(qkv) if rotated else 0
    if rotated:
        qk = kept[:floats].view(qkv.dtype).view(batch, n_tokens, width // 3 * 2)
    end = floats + batch * n_head * n_tokens
    return qk, kept[floats:end], kept[end:]


def _forward(outputs, qkv, rope, n_head, window, register_qkv, registers_out, gate, keep):
    out = outputs[0]
    register_out, kept = (out if result is None else result for result in outputs[1:])  # a placeholder, not written
    qkv, rope, register_qkv, gate = _readable(qkv), rope.contiguous(), _readable(register_qkv), _readable(gate)
    plan = plan_of(qkv, n_head, window, register_qkv, registers_out, gate is not None)
    if plan.short:
        short.forward(qkv, rope, n_head, register_qkv, gate, out, register_out, plan)
        return
    if keep:
        qk, lse, register_lse = _parts_of(kept, qkv, n_head, plan.rotated)
    else:
        qk, lse, register_lse = qkv, out, out
        if plan.rotated:
            qk = qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3 * 2))
    if plan.rotated:
        rotation.rotate_tokens(qkv, qk, rope, n_head, plan)
    inputs = long.inputs_of(qkv, qk, rope, n_head, register_qkv)
    long.forward(inputs, gate, out, lse, keep, plan)
    if registers_out:
        registers.forward(inputs, register_out, register_lse, keep, plan)


def _backward(grads, needs, qkv, rope, n_head, window, register_qkv, registers_out, gate, out, register_out, kept):
    grad_out, grad_register_out = grads
    registers_out = registers_out and grad_register_out is not None
    grad_out = torch.zeros_like(out) if grad_out is None else _readable(grad_out)
    grad_register_out = _readable(grad_register_out) if registers_out else grad_out
    register_out = register_out if registers_out else out  # a placeholder, not read
    qkv, rope, register_qkv, gate = _readable(qkv), rope.contiguous(), _readable(register_qkv), _readable(gate)
    plan = plan_of(qkv, n_head, window, register_qkv, registers_out, gate is not None)
    batch, n_tokens, width = qkv.shape
    grad_qkv = torch.empty((batch, n_tokens, width), dtype=qkv.dtype, device=qkv.device)
    grad_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    n_parts, first_part, last_part_q, last_part = 1, 0, 1, 1
    if not plan.short:
        blocks = long.n_query_blocks(plan)
        last_part_q = registers.n_splits(plan) if registers_out else 0
        first_part, last_part, n_parts = 0 if registers_out else 1, 1 + blocks, max(1 + blocks, last_part_q)
    partial = qkv  # a placeholder, not written
    if plan.n_registers:
        partial = torch.empty((batch, n_parts, plan.n_registers, width), dtype=torch.float32, device=qkv.device)

    if plan.short:
        short.backward(
            grad_out, grad_register_out, qkv, rope, n_head, register_qkv, gate, grad_qkv, grad_gate, partial, plan
        )
    else:
        qk, lse, register_lse = _parts_of(kept, qkv, n_head, plan.rotated)
        inputs = long.inputs_of(qkv, qk, rope, n_head, register_qkv)
        long.backward(
            inputs, gate, grad_out, grad_register_out, out, register_out, lse, register_lse, grad_qkv, grad_gate,
            partial, n_parts, plan,
        )  # fmt: skip
        if registers_out:
            registers.backward(inputs, grad_register_out, register_out, register_lse, partial, n_parts, plan)
    if register_qkv is None:
        return grad_qkv, None, None, grad_gate
    grad_register = torch.empty(register_qkv.shape, dtype=qkv.dtype, device=qkv.device)
    registers.gradient(partial, rope, n_head, grad_register, first_part, last_part_q, last_part, plan)
    return grad_qkv, None, grad_register, grad_gate


OPERATOR = Operator(
    "rope_attention",
    "(Tensor qkv, Tensor rope, int n_head, int[] window, Tensor? register_qkv, bool registers_out, Tensor? gate, "
    "bool keep) -> (Tensor out, Tensor register_out, Tensor kept)",
    results=2,
    outputs=_outputs,
    forward=_forward,
    saved=("out", "register_out", "kept"),
    backward=_backward,
    formula=eager.rope_attention,
)


def rope_attention(
    qkv: Tensor, rope: Tensor, n_head: int, window: tuple[int, int], register_qkv: Tensor | None,
    return_registers: bool,
    gate: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`fastblocks.functional.rope_attention`, for arguments that `unsupported_reason` accepts."""
    out, register_out = OPERATOR(qkv, rope, n_head, window, register_qkv, return_registers, gate)
    return (out, register_out) if return_registers else out
