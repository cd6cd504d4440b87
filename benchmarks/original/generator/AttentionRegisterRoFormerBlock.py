"""A RoFormerBlock with register tokens and a sliding window, through a dense mask."""

import torch
from torch import Tensor, nn

from benchmarks.original.generator.RoFormerBlock import RoFormerBlock


class AttentionRegisterRoFormerBlock(RoFormerBlock):
    """(B, T, C) -> (B, T, C); R registers go through the block in front of the sequence."""

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        max_seq_len: int,
        rope_base: float = 10000,
        num_register_tokens: int = 0,
        window_size: int = -1,
    ):
        super().__init__(n_embd, n_head, max_seq_len + num_register_tokens, rope_base)
        self.num_register_tokens, self.window_size = num_register_tokens, window_size
        if num_register_tokens:
            self.registers = nn.Parameter(0.02 * torch.randn(num_register_tokens, n_embd))

    def forward(
        self, x: Tensor, registers: Tensor | None = None, return_registers: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        count = self.num_register_tokens
        if count:
            memory = self.registers.expand(x.shape[0], -1, -1)
            x = torch.cat([memory if registers is None else memory + registers, x], dim=1)
        x = x + self.att(self.att_norm(x), count, self.window_size)
        x = x + self.mlp(self.ffn_norm(x))
        return (x[:, count:], x[:, :count]) if return_registers else x[:, count:]
