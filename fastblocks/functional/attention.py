"""Windowed rotary attention with register tokens."""

from types import ModuleType

import torch
from torch import Tensor

from fastblocks.eager import attention as eager
from fastblocks.functional._dispatch import require, require_floating, run, shape


def rope_table(length: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines of rotary position embedding: angle = position · base^(-2i/D), computed in float32.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Args:
        length: how many positions.
        head_dim: D, even.
        base: of the geometric series of frequencies.

    Returns:
        (length, D/2, 2) float32 on the CPU: `[..., 0]` the cosines, `[..., 1]` the sines.

    Raises:
        ValueError: if D is odd or not positive, or length is negative.
    """
    require(
        head_dim > 0 and head_dim % 2 == 0,
        lambda: f"rope_table: rotation works on pairs of channels, so the head size must be even, got {head_dim}",
    )
    require(length >= 0, lambda: f"rope_table: length must not be negative, got {length}")
    frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), frequency)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rope_attention(
    qkv: Tensor,
    rope: Tensor,
    n_head: int,
    *,
    window: int = -1,
    register_qkv: Tensor | None = None,
    return_registers: bool = False,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head self-attention, not causal, with rotary positions, an optional sliding window and register tokens.

    q and k are rotated over interleaved channel pairs (0,1), (2,3), … by their position's angles, in float32, and
    rounded back to their dtype. Scores are scaled by 1/sqrt(D). Token s sees token t when |s - t| <= window // 2, and
    every register token; register tokens see everything. Register token i has position i, token t position R + t.
    Cost and memory grow with T · (window + R), forward and backward.

    Sources: Su et al., "RoFormer", 2021; Beltagy et al., "Longformer" (window and global tokens), 2020; Darcet et
    al., "Vision Transformers Need Registers", 2023.

    Args:
        qkv: (B, T, 3C): q, k and v in that order, each n_head heads of D = C / n_head consecutive channels.
        rope: (at least R + T, D/2, 2) float32, as `rope_table` makes it.
        n_head: H.
        window: a token sees itself and window // 2 tokens on each side; -1: all of them.
        register_qkv: (B, R, 3C), or (1, R, 3C) for registers that are the same for the whole batch.
        return_registers: also return the register tokens' output; otherwise it is not computed.
        gate: (B, T, H), logits: each head's output is multiplied by the sigmoid of its token's. That of register tokens
            is not.

    Returns:
        (B, T, C), or with return_registers a pair of it and (B, R, C); gated, in the promoted dtype of qkv and gate.

    Raises:
        ValueError: if shapes do not fit, the table is too short, or the window is 0 or below -1.
    """
    require(
        qkv.dim() == 3 and n_head > 0 and qkv.shape[-1] % (6 * n_head) == 0,
        lambda: f"rope_attention: qkv must be (B, T, 3·H·D) with an even D, got {shape(qkv)} for {n_head} heads",
    )
    batch, length, width = qkv.shape
    registers = 0
    if register_qkv is not None:
        require(
            register_qkv.dim() == 3 and register_qkv.shape[0] in (1, batch) and register_qkv.shape[2] == width,
            lambda: f"rope_attention: register_qkv must be ({batch} or 1, R, {width}), got {shape(register_qkv)}",
        )
        registers = register_qkv.shape[1]
    require(
        not return_registers or registers > 0,
        lambda: "rope_attention: return_registers=True, but there are no registers",
    )
    require(
        gate is None or shape(gate) == (batch, length, n_head),
        lambda: f"rope_attention: gate must be ({batch}, {length}, {n_head}), got {shape(gate)}",
    )
    check_positions("rope_attention", rope, width // (3 * n_head), length, registers, window)
    if registers == 0:
        register_qkv = None
    window = seen_window(window, length)
    require_floating("rope_attention", qkv=qkv, rope=rope, register_qkv=register_qkv, gate=gate)
    return run(
        "rope_attention", _kernels, eager.rope_attention, qkv, rope, n_head, window, register_qkv, return_registers,
        gate,
    )  # fmt: skip


def check_positions(operation: str, rope: Tensor, head_dim: int, length: int, registers: int, window: int) -> None:
    """Raise a ValueError unless the table holds all positions and the window is one."""
    require(window == -1 or window > 0, lambda: f"{operation}: window must be positive, or -1 for all, got {window}")
    half = head_dim // 2
    require(
        rope.dim() == 3 and shape(rope)[1:] == (half, 2) and rope.shape[0] >= registers + length,
        lambda: (
            f"{operation}: {registers} registers and {length} tokens need a rope table of at least "
            f"({registers + length}, {half}, 2), got {shape(rope)}"
        ),
    )


def seen_window(window: int, length: int) -> int:
    """The window, or -1 where it covers the whole sequence."""
    return -1 if window >= 2 * length - 2 > 0 else window


def _kernels() -> ModuleType:
    from fastblocks.kernels.attention import operator

    return operator
