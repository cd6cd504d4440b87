"""Sliding-window attention with rotary positions and register tokens, from packed qkv to (B, T, C).

    q, k = rotate(q), rotate(k)   interleaved channel pairs, in float32, rounded to the input's dtype
    out_s = Σ_t softmax_t(q_s · k_t / √D) v_t,   t: every register, and the tokens with |s − t| ≤ window // 2

Layouts: qkv (B, T, 3C) and register_qkv (B or 1, R, 3C) with any strides but a contiguous last dimension, read in
place; rope (≥ R + T, D/2, 2) float32; out (B, T, C) contiguous. A register sees everything; what it sees is computed
only when asked for. Rows past 2^31 elements are addressed in int64.

Two families of kernels, chosen by shape alone: `attention_whole` (all keys of a head on chip; short sequences) and
`attention_blocks` (everything else; work and memory grow with T · (window + R)), with `attention_registers` beside it.
Kept for backward: the inputs, and for the second family out and the base-2 logarithm of the softmax's sum:
`lse`, flat, (B, H, T) and then, where the registers' output was asked for, (B, H, R).
Each file counts its own bytes and FLOPs.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastblocks.kernels.attention.launchers import aot_cases, backward, forward, is_whole, lse_size

__all__ = ["aot_cases", "rope_attention", "unsupported_reason"]

MIN_HEAD_DIM = 8
MAX_HEAD_DIM = 256
MAX_REGISTERS = 64  # one tile of keys


def unsupported_reason(qkv: Tensor, rope: Tensor, n_head: int, register_qkv: Tensor | None) -> str:
    """Why these kernels do not take a call; an empty string if they do."""
    head_dim = qkv.shape[2] // (3 * n_head)
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"the head size is {head_dim}, the kernel takes {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    if rope.dtype != torch.float32 or rope.device != qkv.device:
        return f"the rope table is {rope.dtype} on {rope.device}, the kernel needs float32 on {qkv.device}"
    if rope.requires_grad:
        return "the rope table wants a gradient"
    if register_qkv is not None:
        if register_qkv.dtype != qkv.dtype or register_qkv.device != qkv.device:
            found = f"{register_qkv.dtype} on {register_qkv.device}"
            return f"the registers are {found}, the tokens {qkv.dtype} on {qkv.device}"
        if register_qkv.shape[1] > MAX_REGISTERS:
            return f"{register_qkv.shape[1]} registers, the kernel takes {MAX_REGISTERS}"
    return ""


# ---- operators -------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastblocks", "FRAGMENT")
_library.define(
    "rope_attention(Tensor qkv, Tensor rope, Tensor? register_qkv, int n_head, int window, bool registers_out, "
    "bool keep_lse) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "rope_attention_backward(Tensor grad_out, Tensor? grad_register_out, Tensor qkv, Tensor rope, "
    "Tensor? register_qkv, Tensor out, Tensor register_out, Tensor lse, int n_head, int window) -> (Tensor, Tensor)"
)


def _forward_fake(qkv, rope, register_qkv, n_head, window, registers_out, keep_lse):
    batch, n_tokens, width = qkv.shape
    n_registers = 0 if register_qkv is None else register_qkv.shape[1]
    saved = keep_lse and not is_whole(qkv, n_head, n_registers)
    return (
        qkv.new_empty((batch, n_tokens, width // 3)),
        qkv.new_empty((batch, n_registers, width // 3) if registers_out else (0,)),
        qkv.new_empty(
            (lse_size(batch * n_head, n_tokens, n_registers, registers_out) if saved else 0,), dtype=torch.float32
        ),
    )


def _backward_fake(grad_out, grad_register_out, qkv, rope, register_qkv, out, register_out, lse, n_head, window):
    return qkv.new_empty(qkv.shape), qkv.new_empty((0,) if register_qkv is None else register_qkv.shape)


class _RopeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, rope, register_qkv, n_head, window, registers_out):
        with torch._C._AutoDispatchBelowAutograd():
            out, register_out, lse = _rope_attention(qkv, rope, register_qkv, n_head, window, registers_out, True)
        ctx.save_for_backward(qkv, rope, register_qkv, out, register_out, lse)
        ctx.n_head, ctx.window, ctx.registers_out = n_head, window, registers_out
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse) if registers_out else ctx.mark_non_differentiable(register_out, lse)
        return out, register_out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_register_out, _):
        qkv, rope, register_qkv, out, register_out, lse = ctx.saved_tensors
        if grad_out is None and grad_register_out is None:
            return (None,) * 6
        if torch.is_grad_enabled():  # create_graph=True: the plain formula can be differentiated again
            grad_qkv, grad_register = _formula_gradients(
                grad_out, grad_register_out, qkv, rope, register_qkv, ctx.n_head, ctx.window
            )
            return grad_qkv, None, grad_register, None, None, None
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_register_out is None and ctx.registers_out:
            grad_register_out = torch.zeros_like(register_out)
        grad_qkv, grad_register = _rope_attention_backward(
            grad_out, grad_register_out, qkv, rope, register_qkv, out, register_out, lse, ctx.n_head, ctx.window
        )
        return grad_qkv, None, None if register_qkv is None else grad_register, None, None, None


def _formula_gradients(grad_out, grad_register_out, qkv, rope, register_qkv, n_head, window):
    """Gradients of qkv and register_qkv that can be differentiated again."""
    from fastblocks.eager import attention as eager
    from fastblocks.eager.derivatives import by_formula

    grads = [grad for grad in (grad_out, grad_register_out) if grad is not None]

    def formula(qkv: Tensor, register_qkv: Tensor | None) -> list[Tensor]:
        results = eager.rope_attention(qkv, rope, n_head, window, register_qkv, grad_register_out is not None)
        results = results if isinstance(results, tuple) else (results,)
        return list(results[-len(grads) :])  # only the registers' if nobody asked for the gradient of the tokens'

    with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
        return by_formula(formula, (qkv, register_qkv), grads)


def _autograd(qkv, rope, register_qkv, n_head, window, registers_out, keep_lse):
    if torch.is_grad_enabled() and (qkv.requires_grad or (register_qkv is not None and register_qkv.requires_grad)):
        return _RopeAttention.apply(qkv, rope, register_qkv, n_head, window, registers_out)
    with torch._C._AutoDispatchBelowAutograd():
        return _rope_attention(qkv, rope, register_qkv, n_head, window, registers_out, keep_lse)


for _key in ("CPU", "CUDA"):
    _library.impl("rope_attention", forward, _key)
    _library.impl("rope_attention_backward", backward, _key)
_library.impl("rope_attention", _autograd, "Autograd")
torch.library.register_fake("fastblocks::rope_attention", _forward_fake, lib=_library)
torch.library.register_fake("fastblocks::rope_attention_backward", _backward_fake, lib=_library)
_rope_attention = torch.ops.fastblocks.rope_attention.default
_rope_attention_backward = torch.ops.fastblocks.rope_attention_backward.default


def rope_attention(
    qkv: Tensor, rope: Tensor, n_head: int, window: int, register_qkv: Tensor | None, return_registers: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastblocks.functional.rope_attention` for what `unsupported_reason` lets through."""
    out, register_out, _ = _rope_attention(qkv, rope, register_qkv, n_head, window, return_registers, False)
    return (out, register_out) if return_registers else out
