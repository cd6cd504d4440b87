"""Windowed RoPE attention with register tokens, in time and memory that grow with T · (window + R)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager.derivatives import by_formula, must_trace, twice_differentiable

# Queries of a block see block + left + right keys: larger blocks waste more of them, smaller ones leave the products
# small. On a CPU (2 cores, D 32, left and right 32, forward + backward): 32 queries 78 ms, 64 55, 128 59, 256 86.
_MIN_BLOCK, _MAX_BLOCK = 64, 512


def sides_of(window: int | Sequence[int]) -> tuple[int, int]:
    """How many tokens before and after itself a token sees, -1 for all: a window's width W is W // 2 on each side."""
    if isinstance(window, int):
        return (-1, -1) if window == -1 else (window // 2, window // 2)
    left, right = window
    return left, right


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the channel pairs of x (B, T, …, D) by the angles of rope (T, D/2, 2)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rope = rope.to(wide).reshape(rope.shape[0], *(1,) * (x.dim() - 3), *rope.shape[1:])
    pairs = x.to(wide).unflatten(-1, (-1, 2))
    if must_trace() or not _viewable_as_complex(pairs):
        cos, sin = rope.unbind(-1)
        even, odd = pairs.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # one pass instead of seven: on a CPU 1.6 ms instead of 23 at (64, 282, 2, 4, 32)
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return rotated.flatten(-2).to(x.dtype)


def _viewable_as_complex(pairs: Tensor) -> bool:
    return pairs.stride(-1) == 1 and all(s % 2 == 0 for s in pairs.stride()[:-1]) and pairs.storage_offset() % 2 == 0


def _heads(qkv: Tensor, rope: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3C) -> rotated q, rotated k, v, each (B, H, T, D)."""
    qk, v = qkv.unflatten(-1, (3, n_head, -1)).split((2, 1), dim=2)
    q, k = rotate(qk, rope).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.squeeze(2).transpose(1, 2)


def _merge(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def rope_attention(
    qkv: Tensor,
    rope: Tensor,
    n_head: int,
    window: int | Sequence[int],
    register_qkv: Tensor | None,
    return_registers: bool,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    batch, length, _ = qkv.shape
    registers = 0 if register_qkv is None else register_qkv.shape[1]
    q, k, v = _heads(qkv, rope[registers : registers + length], n_head)
    q_r = k_r = v_r = None
    if registers:
        q_r, k_r, v_r = (t.expand(batch, -1, -1, -1) for t in _heads(register_qkv, rope[:registers], n_head))
    left, right = sides_of(window)
    if left == right == -1 or length == 0:
        y = _full(q, k, v, k_r, v_r)
    elif -1 in (left, right):
        y = _full(q, k, v, k_r, v_r, _one_sided(q, left, right, registers))
    else:
        y = _windowed(q, k, v, k_r, v_r, left, right)
    y = _merge(y)
    if gate is not None:
        y = (y.unflatten(-1, (n_head, -1)) * gate.sigmoid().unsqueeze(-1)).flatten(-2)
    if not return_registers:
        return y
    return y, _merge(_full(q_r, k, v, k_r, v_r))


def _full(
    q: Tensor, k: Tensor, v: Tensor, k_r: Tensor | None, v_r: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    if k_r is not None:
        k, v = torch.cat((k_r, k), 2), torch.cat((v_r, v), 2)
    return _attend(q, k, v, bias)


def _one_sided(q: Tensor, left: int, right: int, registers: int) -> Tensor:
    """The bias (1, 1, T, R + T) of a window that has no end on one side: no block of keys is small."""
    offs = torch.arange(q.shape[2], device=q.device)
    ahead = offs - offs[:, None]
    return _bias(F.pad(ahead <= right if left == -1 else -ahead <= left, (registers, 0), value=True)[None], q)


def _bias(seen: Tensor, q: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))[None]


def _windowed(q: Tensor, k: Tensor, v: Tensor, k_r: Tensor | None, v_r: Tensor | None, left: int, right: int) -> Tensor:
    """Blocks of queries, each against the registers and the keys within its window."""
    batch, heads, length, _ = q.shape
    block = min(max(_MIN_BLOCK, (left + right) // 2), _MAX_BLOCK)
    if torch.compiler.is_compiling():  # always several blocks and a tail: other cases would be further graphs
        blocks = -(-length // block) + 1
    else:
        block = max(1, min(block, length))
        blocks = -(-length // block)
    tail = blocks * block - length
    span = block + left + right
    q = F.pad(q, (0, 0, 0, tail)).unflatten(2, (blocks, block))
    k = _stretches(k, left, right + tail, span, block, k_r)
    v = _stretches(v, left, right + tail, span, block, v_r)
    offs_q = torch.arange(block, device=q.device)[:, None]
    offs_k = torch.arange(span, device=q.device) - left
    start = torch.arange(blocks, device=q.device)[:, None, None] * block
    ahead = offs_k - offs_q
    seen = (ahead >= -left) & (ahead <= right) & (start + offs_k >= 0) & (start + offs_k < length)
    seen = seen | (start + offs_q >= length)  # rows past the end are cut off below; fully masked they would be NaN
    if k_r is not None:
        seen = F.pad(seen, (k_r.shape[2], 0), value=True)
    y = _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), _bias(seen, q))
    return y.unflatten(0, (batch, heads)).flatten(2, 3)[:, :, :length]


def _stretches(x: Tensor, before: int, after: int, span: int, block: int, registers: Tensor | None) -> Tensor:
    """(B, H, T, D) -> (B, H, blocks, R + span, D): the registers, then the tokens from `before` before each block
    on."""
    x = F.pad(x, (0, 0, before, after)).unfold(2, span, block).transpose(-1, -2)
    if registers is None:
        return x
    return torch.cat((registers.unsqueeze(2).expand(-1, -1, x.shape[2], -1, -1), x), 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(D) + bias) v."""
    if q.dtype == torch.float64 or must_trace():
        return _attention_formula(q, k, v, bias)
    if q.is_cpu and q.numel():
        return _CPUAttention.apply(q, k, v, bias)
    return _library(q, k, v, bias)


def _library(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return twice_differentiable(F.scaled_dot_product_attention, _attention_formula, (q, k, v, bias))


def _attention_formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v


class _CPUAttention(torch.autograd.Function):
    """PyTorch's flash attention on the CPU, which has no second derivative of its own."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
        ctx.save_for_backward(q, k, v, bias, y, logsumexp)
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, y, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_formula(_attention_formula, (q, k, v, bias), grad_y)
        return *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_y, q, k, v, y, logsumexp, 0.0, False, attn_mask=bias
        ), None
