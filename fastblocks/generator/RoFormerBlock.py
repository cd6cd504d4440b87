"""A transformer block with rotary positions: attention and SwiGLU, each behind an RMSNorm."""

import torch
from torch import Tensor, nn

from fastblocks import functional
from fastblocks.generator._layers import RMSNorm, SwiGLU, may_fuse, plain_mlp, require_channels_last_dim


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
        return self._run(x, None, -1, False)

    def _run(
        self, x: Tensor, registers: Tensor | None, window: int, return_registers: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The block on tokens (B, T, C) and the registers (1 or B, R, C) before them."""
        if self._is_plain():
            att, mlp = self.att, self.mlp
            return functional.roformer_block(
                x, att.c_attn.weight, att.c_proj.weight, mlp.c_fc1.weight, mlp.c_fc2.weight, mlp.c_proj.weight,
                self.att_norm.scale, self.ffn_norm.scale, att._rope_on(x.device), att.n_head, window=window,
                registers=registers, return_registers=return_registers, eps_attention=self.att_norm.eps,
                eps_mlp=self.ffn_norm.eps,
            )  # fmt: skip
        if registers is None:
            out = self.att(self.att_norm(x), **({} if window == -1 else {"window": window}))
        else:
            out = self.att(self.att_norm(x), self.att_norm(registers), window, return_registers)
        if not return_registers:
            x = x + out
            return x + self.mlp(self.ffn_norm(x))
        x, registers = x + out[0], registers + out[1]
        return x + self.mlp(self.ffn_norm(x)), registers + self.mlp(self.ffn_norm(registers))

    def _is_plain(self) -> bool:
        children = {"att_norm": RMSNorm, "att": RoFormerAttention, "ffn_norm": RMSNorm, "mlp": SwiGLU}
        return (
            may_fuse("roformer_block", self, **children)
            and may_fuse("roformer_block", self.att, c_attn=nn.Linear, c_proj=nn.Linear, bias=False)
            and plain_mlp("roformer_block", self.mlp)
        )
