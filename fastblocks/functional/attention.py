"""Windowed rotary attention with register tokens."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager import attention as eager
from fastblocks.functional._dispatch import require, require_floating, run, shape


def rope_table(length: int, head_dim: int, base: float = 10000.0, rotary_dim: int | None = None) -> Tensor:
    """Cosines and sines of rotary position embedding: angle = position · base^(-2i/D), computed in float32.

    Channels turn in interleaved pairs (0,1), (2,3), …; a model that pairs channel i with i + D/2 needs the rows of its
    q and k weights reordered. Partial rotary turns the first `rotary_dim` channels only, and all others by no angle.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Args:
        length: how many positions.
        head_dim: D, even.
        base: of the geometric series of frequencies.
        rotary_dim: channels that turn, in place of D in the angles too; even; None: all of them.

    Returns:
        (length, D/2, 2) float32 on the CPU: `[..., 0]` the cosines, `[..., 1]` the sines.

    Raises:
        ValueError: if D or rotary_dim is odd or not positive, rotary_dim is larger than D, or length is negative.
    """
    require(
        head_dim > 0 and head_dim % 2 == 0,
        lambda: f"rope_table: rotation works on pairs of channels, so the head size must be even, got {head_dim}",
    )
    require(length >= 0, lambda: f"rope_table: length must not be negative, got {length}")
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    require(
        0 < rotary_dim <= head_dim and rotary_dim % 2 == 0,
        lambda: f"rope_table: rotary_dim must be even and at most the head size {head_dim}, got {rotary_dim}",
    )
    frequency = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), frequency)
    angle = F.pad(angle, (0, (head_dim - rotary_dim) // 2))
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rope_attention(
    qkv: Tensor,
    rope: Tensor,
    n_head: int,
    *,
    window: int | tuple[int | None, int | None] = -1,
    causal: bool = False,
    register_qkv: Tensor | None = None,
    return_registers: bool = False,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head self-attention with rotary positions, an optional sliding window and register tokens.

    q and k are rotated over interleaved channel pairs (0,1), (2,3), … by their position's angles, in float32, and
    rounded back to their dtype; a pair whose angle is zero stays (`rope_table`'s rotary_dim). Scores are scaled by
    1/sqrt(D). Token s sees every register token, and token t when |s - t| <= window // 2, or s - left <= t <= s +
    right; register tokens see everything, in a causal call too. Register token i has position i, token t position
    R + t. Cost and memory grow with T · (window + R), forward and backward.

    Sources: Su et al., "RoFormer", 2021; Beltagy et al., "Longformer" (window and global tokens), 2020; Darcet et
    al., "Vision Transformers Need Registers", 2023.

    Args:
        qkv: (B, T, 3C): q, k and v in that order, each n_head heads of D = C / n_head consecutive channels.
        rope: (at least R + T, D/2, 2) float32, as `rope_table` makes it.
        n_head: H.
        window: a token sees itself and window // 2 tokens on each side; -1: all of them. Or a pair (left, right): it
            sees itself, `left` tokens before and `right` tokens after it; -1 or None: all of them.
        causal: no token sees a later one, as with a window (left, 0).
        register_qkv: (B, R, 3C), or (1, R, 3C) for registers that are the same for the whole batch.
        return_registers: also return the register tokens' output; otherwise it is not computed.
        gate: (B, T, H), logits: each head's output is multiplied by the sigmoid of its token's. That of register tokens
            is not.

    Returns:
        (B, T, C), or with return_registers a pair of it and (B, R, C); gated, in the promoted dtype of qkv and gate.

    Raises:
        ValueError: if shapes do not fit, the table is too short, the window is 0 or below -1 or not a pair of such
            sides, or a causal window has a right side.
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
    _check_table("rope_attention", rope, width // (3 * n_head), length, registers)
    if registers == 0:
        register_qkv = None
    window = _seen_sides(window, causal, length)
    require_floating("rope_attention", qkv=qkv, rope=rope, register_qkv=register_qkv, gate=gate)
    return run(
        "rope_attention", _kernels, eager.rope_attention, qkv, rope, n_head, window, register_qkv, return_registers,
        gate,
    )  # fmt: skip


def check_positions(operation: str, rope: Tensor, head_dim: int, length: int, registers: int, window: int) -> None:
    """Raise a ValueError unless the table holds all positions and the window is one."""
    _check_width(operation, window)
    _check_table(operation, rope, head_dim, length, registers)


def _check_width(operation: str, window: int) -> None:
    require(window == -1 or window > 0, lambda: f"{operation}: window must be positive, or -1 for all, got {window}")


def _check_table(operation: str, rope: Tensor, head_dim: int, length: int, registers: int) -> None:
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


def _seen_sides(window: int | tuple[int | None, int | None], causal: bool, length: int) -> tuple[int, int]:
    """How many tokens before and after itself a token sees, -1 where these are all."""
    if isinstance(window, int):
        _check_width("rope_attention", window)
        left, right = eager.sides_of(window)
        right = 0 if causal else right
    else:
        require(
            len(window) == 2 and all(side is None or (isinstance(side, int) and side >= -1) for side in window),
            lambda: (
                f"rope_attention: window must be (left, right), each 0 or more, or -1 or None for all; got {window}"
            ),
        )
        left, right = (-1 if side is None else side for side in window)
        require(
            not causal or right in (-1, 0),
            lambda: f"rope_attention: causal=True, but the window {window} reaches {right} tokens ahead",
        )
        right = 0 if causal else right
    left, right = (-1 if side >= length - 1 > 0 else side for side in (left, right))
    return left, right


def _kernels() -> ModuleType:
    from fastblocks.kernels.attention import operator

    return operator
