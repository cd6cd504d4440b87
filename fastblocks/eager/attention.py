"""Windowed RoPE attention with register tokens, in time and memory that grow with T · (window + R)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the channel pairs of x (B, T, …, D) by the angles of rope (T, D/2, 2)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = rope.to(wide).reshape(rope.shape[0], *(1,) * (x.dim() - 3), -1, 2).unbind(-1)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def _heads(qkv: Tensor, rope: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3C) -> rotated q, rotated k, v, each (B, H, T, D)."""
    q, k, v = qkv.unflatten(-1, (3, n_head, -1)).unbind(2)
    return rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)


def _merge(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def rope_attention(
    qkv: Tensor, rope: Tensor, n_head: int, window: int, register_qkv: Tensor | None, return_registers: bool
) -> Tensor | tuple[Tensor, Tensor]:
    batch, length, _ = qkv.shape
    registers = 0 if register_qkv is None else register_qkv.shape[1]
    q, k, v = _heads(qkv, rope[registers : registers + length], n_head)
    q_r = k_r = v_r = None
    if registers:
        q_r, k_r, v_r = _heads(register_qkv.expand(batch, -1, -1), rope[:registers], n_head)
    if window == -1:
        y = _full(q, k, v, k_r, v_r)
    else:
        y = _windowed(q, k, v, k_r, v_r, window // 2)
    if not return_registers:
        return _merge(y)
    return _merge(y), _merge(_full(q_r, k, v, k_r, v_r))


def _full(q: Tensor, k: Tensor, v: Tensor, k_r: Tensor | None, v_r: Tensor | None) -> Tensor:
    if k_r is not None:
        k, v = torch.cat((k_r, k), 2), torch.cat((v_r, v), 2)
    return F.scaled_dot_product_attention(q, k, v)


def _windowed(q: Tensor, k: Tensor, v: Tensor, k_r: Tensor | None, v_r: Tensor | None, reach: int) -> Tensor:
    batch, heads, length, dim = q.shape
    block = max(32, min(reach, 256))
    blocks = -(-length // block)
    tail = blocks * block - length
    span = block + 2 * reach
    q = F.pad(q, (0, 0, 0, tail)).unflatten(2, (blocks, block))
    k, v = (
        F.pad(t, (0, 0, reach, reach + tail)).unfold(2, span, block).transpose(-1, -2) for t in (k, v)
    )  # (B, H, blocks, span, D)
    offs_q = torch.arange(block, device=q.device)[:, None]
    offs_k = torch.arange(span, device=q.device)[None, :] - reach
    start = torch.arange(blocks, device=q.device)[:, None, None] * block
    seen = ((offs_q - offs_k).abs() <= reach) & (start + offs_k >= 0) & (start + offs_k < length)
    if k_r is not None:
        k = torch.cat((k_r.unsqueeze(2).expand(-1, -1, blocks, -1, -1), k), 3)
        v = torch.cat((v_r.unsqueeze(2).expand(-1, -1, blocks, -1, -1), v), 3)
        seen = torch.cat((seen.new_ones(blocks, block, k_r.shape[2]), seen), 2)
    seen = seen | (seen.sum(-1, keepdim=True) == 0)  # rows past the end see anything: no NaN, and they are cut off
    y = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=seen)
    return y.unflatten(0, (batch, heads)).flatten(2, 3)[:, :, :length]
