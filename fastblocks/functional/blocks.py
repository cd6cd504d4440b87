"""Whole blocks: a norm, attention or a recurrence, a norm, a SwiGLU layer, and their residuals."""

from functools import partial
from types import ModuleType

from torch import Tensor

from fastblocks.eager import blocks as eager
from fastblocks.functional._dispatch import require, require_floating, run, shape
from fastblocks.functional.attention import check_positions, rope_attention, seen_window
from fastblocks.functional.rows import rms_norm, swiglu_mlp


def roformer_block(
    x: Tensor,
    weight_qkv: Tensor,
    weight_out: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    weight_down: Tensor,
    scale_attention: Tensor,
    scale_mlp: Tensor,
    rope: Tensor,
    n_head: int,
    *,
    window: int = -1,
    registers: Tensor | None = None,
    return_registers: bool = False,
    eps_attention: float = 1e-6,
    eps_mlp: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """A transformer block with rotary positions, an optional sliding window and register tokens.

    `x = x + rope_attention(rms_norm(x) W_qkvᵀ) W_outᵀ`, then `x = x + swiglu_mlp(rms_norm(x))`; registers go through
    the same block beside x. Where no kernel takes the whole, it is put together from `rms_norm`, `rope_attention` and
    `swiglu_mlp`, each of which may still run in a kernel of its own.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Args:
        x: (B, T, C).
        weight_qkv: (3C, C): q, k and v in that order.
        weight_out: (C, C).
        weight_gate, weight_up: (F, C).
        weight_down: (C, F).
        scale_attention, scale_mlp: (C,), of the norms.
        rope: (at least R + T, D/2, 2) float32, as `rope_table` makes it.
        n_head: H.
        window: a token sees itself and window // 2 tokens on each side; -1: all of them.
        registers: (B, R, C), or (1, R, C) for registers that are the same for the whole batch.
        return_registers: also return the registers' output; otherwise it is not computed.
        eps_attention, eps_mlp: of the norms.

    Returns:
        (B, T, C), or with return_registers a pair of it and (B, R, C); in the promoted dtype of x and, under autocast,
        autocast's.

    Raises:
        ValueError: if shapes do not fit, the table is too short, or the window is 0 or below -1.
    """
    require(
        x.dim() == 3 and n_head > 0 and x.shape[2] % (2 * n_head) == 0,
        lambda: f"roformer_block: x must be (B, T, H·D) with an even D, got {shape(x)} for {n_head} heads",
    )
    batch, length, width = x.shape
    require(
        shape(weight_qkv) == (3 * width, width)
        and shape(weight_out) == (width, width)
        and weight_gate.dim() == 2
        and weight_gate.shape[1] == width
        and weight_up.shape == weight_gate.shape
        and shape(weight_down) == (width, weight_gate.shape[0])
        and shape(scale_attention) == shape(scale_mlp) == (width,),
        lambda: (
            f"roformer_block: x {shape(x)} needs weight_qkv ({3 * width}, {width}), weight_out ({width}, {width}), "
            f"weight_gate and weight_up (F, {width}), weight_down ({width}, F) and scales ({width},), got "
            f"{shape(weight_qkv)}, {shape(weight_out)}, {shape(weight_gate)}, {shape(weight_up)}, "
            f"{shape(weight_down)}, {shape(scale_attention)} and {shape(scale_mlp)}"
        ),
    )
    n_registers = 0
    if registers is not None:
        require(
            registers.dim() == 3 and registers.shape[0] in (1, batch) and registers.shape[2] == width,
            lambda: f"roformer_block: registers must be ({batch} or 1, R, {width}), got {shape(registers)}",
        )
        n_registers = registers.shape[1]
    require(
        not return_registers or n_registers > 0,
        lambda: "roformer_block: return_registers=True, but there are no registers",
    )
    check_positions("roformer_block", rope, width // n_head, length, n_registers, window)
    weights = {"weight_qkv": weight_qkv, "weight_out": weight_out, "weight_gate": weight_gate, "weight_up": weight_up}
    scales = {"weight_down": weight_down, "scale_attention": scale_attention, "scale_mlp": scale_mlp}
    require_floating("roformer_block", x=x, **weights, **scales, rope=rope, registers=registers)
    if n_registers == 0:
        registers = None
    return run(
        "roformer_block", _kernels, _composed, x, *weights.values(), *scales.values(), rope, n_head,
        seen_window(window, length), registers, return_registers, eps_attention, eps_mlp,
    )  # fmt: skip


def _attention(
    qkv: Tensor, rope: Tensor, n_head: int, window: int, register_qkv: Tensor | None, return_registers: bool
) -> Tensor | tuple[Tensor, Tensor]:
    return rope_attention(
        qkv, rope, n_head, window=window, register_qkv=register_qkv, return_registers=return_registers
    )


_composed = partial(eager.roformer_block, parts=(rms_norm, _attention, swiglu_mlp))


def _kernels() -> ModuleType:
    from fastblocks.kernels.blocks import roformer_block

    return roformer_block
