"""A RoFormer block whose tokens see a window and a few learnable registers, which see everything."""

import torch
from torch import Tensor, nn

from fastblocks.generator.RoFormerBlock import RoFormerBlock as PlainRoFormerBlock


class AttentionRegisterRoFormerBlock(PlainRoFormerBlock):
    """A RoFormerBlock with register tokens and a sliding window: (B, T, C) -> (B, T, C).

    The registers precede the sequence, go through the whole block with it, and are removed again. Token s sees
    token t when |s - t| <= window_size // 2, and every register; a register sees everything. Time and memory grow with
    T · (window_size + R).

    Sources: Beltagy et al., "Longformer", 2020; Darcet et al., "Vision Transformers Need Registers", 2023.

    Args:
        n_embd: C, the channels.
        n_head: H, the heads; C / H must be even.
        max_seq_len: the longest T, registers not counted.
        rope_base: base of the rotary frequencies.
        num_register_tokens: R, how many registers.
        window_size: a token sees itself and window_size // 2 tokens on each side; -1: all.

    Raises:
        ValueError: as RoFormerBlock; if R is negative, or window_size is 0 or below -1.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        max_seq_len: int,
        rope_base: float = 10000,
        num_register_tokens: int = 0,
        window_size: int = -1,
    ):
        if num_register_tokens < 0:
            raise ValueError(f"num_register_tokens must not be negative, got {num_register_tokens}")
        if window_size == 0 or window_size < -1:
            raise ValueError(f"window_size must be positive, or -1 for all tokens, got {window_size}")
        nn.Module.__init__(self)
        self.num_register_tokens, self.window_size = num_register_tokens, window_size
        self._build(n_embd, n_head, max_seq_len, rope_base, num_register_tokens)
        if num_register_tokens:
            self.registers = nn.Parameter(torch.empty(num_register_tokens, n_embd).normal_(std=0.02))

    def forward(
        self, x: Tensor, registers: Tensor | None = None, return_registers: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            x: (B, T, C).
            registers: (B, R, C), the registers' output of the previous block; added to this block's own.
            return_registers: also return the registers' output; otherwise it is not computed.

        Returns:
            (B, T, C), or with return_registers a pair of it and (B, R, C).
        """
        self._check(x)
        memory = self._memory(x, registers)
        if memory is None and return_registers:
            raise ValueError("return_registers=True, but num_register_tokens is 0")
        if memory is not None:
            x = x.to(torch.promote_types(x.dtype, memory.dtype))  # as if concatenated to one sequence
        return self._run(x, memory, self.window_size, return_registers)

    def _memory(self, x: Tensor, carried: Tensor | None) -> Tensor | None:
        """The registers that stand before x: (B, R, C), or (1, R, C) where they are this block's own; None if R = 0."""
        if carried is not None:
            wanted = (x.shape[0], self.num_register_tokens, self.n_embd)
            if tuple(carried.shape) != wanted or not self.num_register_tokens:
                raise ValueError(f"registers must be {wanted}, got {tuple(carried.shape)}")
            return self.registers + carried
        return self.registers.unsqueeze(0) if self.num_register_tokens else None


# The original's file of this name calls its class so: an import that worked there must not give the block without
# registers and window.
RoFormerBlock = AttentionRegisterRoFormerBlock
