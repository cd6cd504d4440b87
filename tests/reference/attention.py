"""Attention written out: every row one by one over a dense mask, in float64. Slow, obvious."""

import torch
from torch import Tensor


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x (T, D): pair i of row t turned by the angle whose cosine and sine are rope[t, i]."""
    result = torch.zeros_like(x)
    for i in range(x.shape[1] // 2):
        cos, sin = rope[: x.shape[0], i, 0].double(), rope[: x.shape[0], i, 1].double()
        result[:, 2 * i] = x[:, 2 * i] * cos - x[:, 2 * i + 1] * sin
        result[:, 2 * i + 1] = x[:, 2 * i] * sin + x[:, 2 * i + 1] * cos
    return result


def visible(n_tokens: int, n_registers: int, window: int | tuple[int, int]) -> Tensor:
    """(R + T, R + T): which row sees which."""
    left, right = (window // 2, window // 2) if isinstance(window, int) else window
    rows = n_registers + n_tokens
    mask = torch.zeros(rows, rows, dtype=torch.bool)
    for s in range(rows):
        for t in range(rows):
            register = s < n_registers or t < n_registers
            mask[s, t] = register or ((left == -1 or t >= s - left) and (right == -1 or t <= s + right))
    return mask


def rope_attention(
    qkv: Tensor,
    rope: Tensor,
    n_head: int,
    window: int | tuple[int, int] = -1,
    register_qkv: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, T, C) and what the registers see (B, R, C), float64."""
    batch, n_tokens, width = qkv.shape
    channels = width // 3
    dim = channels // n_head
    n_registers = 0 if register_qkv is None else register_qkv.shape[1]
    mask = visible(n_tokens, n_registers, window).to(qkv.device)
    results = []
    for b in range(batch):
        rows = qkv[b].double()
        if register_qkv is not None:
            rows = torch.cat((register_qkv[b if register_qkv.shape[0] > 1 else 0].double(), rows))
        heads = []
        for h in range(n_head):
            q, k, v = (rows[:, i * channels + h * dim : i * channels + (h + 1) * dim] for i in range(3))
            scores = rotate(q, rope) @ rotate(k, rope).T / dim**0.5
            scores = scores.masked_fill(~mask, float("-inf"))
            y = torch.softmax(scores, dim=-1) @ v
            if gate is not None:
                y = torch.cat((y[:n_registers], y[n_registers:] / (1 + torch.exp(-gate[b, :, h, None].double()))))
            heads.append(y)
        results.append(torch.cat(heads, dim=-1))
    whole = torch.stack(results)
    return whole[:, n_registers:], whole[:, :n_registers]
