"""The rival of `rope_attention`."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.original.functional import apply_rope
from benchmarks.providers.skipped import Skipped


def flex_attention(n_head: int, window: int, registers: int, device: torch.device, compiler: str) -> Callable:
    """FlexAttention with the rotation in front, compiled as one; window and registers as a block mask."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask
        from torch.nn.attention.flex_attention import flex_attention as attend
    except ImportError as problem:
        raise Skipped(f"this PyTorch has no FlexAttention: {problem}") from None
    masks: dict[int, object] = {}

    def allowed(batch, head, query, key):
        return (query < registers) | (key < registers) | ((query - key).abs() <= window // 2)

    def run(qkv: Tensor, rope: Tensor, register_qkv: Tensor | None, mask) -> Tensor:
        if register_qkv is not None:
            qkv = torch.cat([register_qkv.expand(qkv.shape[0], -1, -1), qkv], dim=1)
        batch, total, width = qkv.shape
        q, k, v = (p.view(batch, total, n_head, -1).transpose(1, 2) for p in qkv.split(width // 3, dim=-1))
        y = attend(apply_rope(q, rope[:total]), apply_rope(k, rope[:total]), v, block_mask=mask)
        return y.transpose(1, 2).reshape(batch, total, width // 3)[:, registers:]

    torch._dynamo.reset()
    fast = torch.compile(run, dynamic=False, backend=compiler)

    def call(qkv: Tensor, rope: Tensor, register_qkv: Tensor | None = None) -> Tensor:
        total = registers + qkv.shape[1]
        if window != -1 and total not in masks:
            options = {"_compile": True} if total > 8192 else {}  # else it holds every pair of tokens for a moment
            masks[total] = create_block_mask(allowed, None, None, total, total, device=device, **options)
        return fast(qkv, rope, register_qkv, masks.get(total))

    return call
