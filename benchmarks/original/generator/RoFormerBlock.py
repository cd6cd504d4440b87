"""A transformer block with rotary positions: RMSNorm, attention, RMSNorm, SwiGLU."""

from torch import Tensor, nn

from benchmarks.original import functional
from benchmarks.original.generator._layers import MLP, RMSNorm


class SelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C), not causal."""

    def __init__(self, n_embd: int, n_head: int, max_seq_len: int, rope_base: float):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.register_buffer("rope", functional.rope_table(max_seq_len, n_embd // n_head, rope_base), persistent=False)

    def forward(self, x: Tensor, registers: int = 0, window: int = -1) -> Tensor:
        """The first `registers` positions of x are register tokens, which see all and are seen by all."""
        return self.c_proj(functional.attend(self.c_attn(x), self.rope, self.n_head, registers, window))


class RoFormerBlock(nn.Module):
    """(B, T, C) -> (B, T, C)."""

    def __init__(self, n_embd: int, n_head: int, max_seq_len: int, rope_base: float = 10000):
        super().__init__()
        self.att_norm = RMSNorm(n_embd)
        self.att = SelfAttention(n_embd, n_head, max_seq_len, rope_base)
        self.ffn_norm = RMSNorm(n_embd)
        self.mlp = MLP(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.att_norm(x))
        return x + self.mlp(self.ffn_norm(x))
