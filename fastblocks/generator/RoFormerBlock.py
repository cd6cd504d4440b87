"""A transformer block with rotary positions: attention and SwiGLU, each behind an RMSNorm."""

import torch
from torch import Tensor, nn

from fastblocks import functional
from fastblocks.generator._layers import RMSNorm, SwiGLU, require_channels_last_dim


class RoFormerAttention(nn.Module):
    """Multi-head self-attention with rotary positions, not causal: (B, T, C) -> (B, T, C), no biases.

    Args:
        n_embd: C, the channels.
        n_head: H, the heads, of C / H consecutive channels each.
        positions: how many positions the rotary table covers.
        rope_base: base of the rotary frequencies.
    """

    def __init__(self, n_embd: int, n_head: int, positions: int, rope_base: float):
        super().__init__()
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_embd must be divisible by n_head, got n_embd={n_embd} and n_head={n_head}")
        self.n_embd, self.n_head, self.head_dim = n_embd, n_head, n_embd // n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
        self._table = (positions, n_embd // n_head, rope_base)
        self.register_buffer("rope", functional.rope_table(*self._table), persistent=False)

    @property
    def rope_cache(self) -> Tensor:
        """The rotary table (positions, C / H / 2, 2) under its name in the original."""
        return self.rope

    def _apply(self, fn, recurse=True):
        """Move like any module, but keep the rope table's values: no checkpoint restores them.

        Of what `fn` returns for the table only the device is used: `to_empty` would leave it uninitialised, and
        `bfloat16()` would round its angles until positions 300 and 301 are the same. A table that was assigned from
        outside is kept, too. On the way to the meta device it stays where it was, and `forward` moves it.
        """
        rope = self.rope
        super()._apply(fn, recurse)
        device = self.rope.device
        self.rope = rope if device.type == "meta" else self._real(rope).to(device)
        return self

    def _real(self, rope: Tensor) -> Tensor:
        """The table, rebuilt if it is on the meta device (by a patched `register_buffer`)."""
        return functional.rope_table(*self._table) if rope.is_meta else rope

    def _rope_on(self, device: torch.device) -> Tensor:
        """The table on the input's device; not every way to load weights moves buffers (`assign=True`)."""
        if self.rope.device != device:
            if device.type == "meta":
                return self.rope.to(device)
            self.rope = self._real(self.rope).to(device)
        return self.rope

    def forward(
        self, x: Tensor, registers: Tensor | None = None, window: int = -1, return_registers: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend among the tokens x (B, T, C) and the registers (1 or B, R, C) before them."""
        register_qkv = None if registers is None else self.c_attn(registers)
        y = functional.rope_attention(
            self.c_attn(x),
            self._rope_on(x.device),
            self.n_head,
            window=window,
            register_qkv=register_qkv,
            return_registers=return_registers,
        )
        if return_registers:
            return self.c_proj(y[0]), self.c_proj(y[1])
        return self.c_proj(y)


class RoFormerBlock(nn.Module):
    """`x = x + att(att_norm(x))`, then `x = x + mlp(ffn_norm(x))`: (B, T, C) -> (B, T, C).

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Args:
        n_embd: C, the channels.
        n_head: H, the heads; C / H must be even.
        max_seq_len: the longest T.
        rope_base: base of the rotary frequencies.

    Raises:
        ValueError: if C is not divisible by H or C / H is odd; in forward, if T is beyond max_seq_len.
    """

    def __init__(self, n_embd: int, n_head: int, max_seq_len: int, rope_base: float = 10000):
        super().__init__()
        self._build(n_embd, n_head, max_seq_len, rope_base, 0)

    def _build(self, n_embd: int, n_head: int, max_seq_len: int, rope_base: float, registers: int) -> None:
        self.n_embd, self.max_seq_len = n_embd, max_seq_len
        self.att_norm = RMSNorm(n_embd)
        self.att = RoFormerAttention(n_embd, n_head, registers + max_seq_len, rope_base)
        self.ffn_norm = RMSNorm(n_embd)
        self.mlp = SwiGLU(n_embd)

    def _check(self, x: Tensor) -> None:
        require_channels_last_dim(x, self.n_embd, type(self).__name__)
        if x.shape[1] > self.max_seq_len:
            raise ValueError(f"a sequence of length {x.shape[1]} is longer than max_seq_len={self.max_seq_len}")

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        x = x + self.att(self.att_norm(x))
        return x + self.mlp(self.ffn_norm(x))
