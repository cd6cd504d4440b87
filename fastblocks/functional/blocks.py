"""Whole blocks: a norm, attention or a recurrence, a norm, a SwiGLU layer, and their residuals."""

from functools import partial
from types import ModuleType

from torch import Tensor

from fastblocks.eager import blocks as eager
from fastblocks.functional._dispatch import require, require_floating, run, shape
from fastblocks.functional.attention import check_positions, rope_attention, seen_window
from fastblocks.functional.recurrent import grouped_gru, grouped_lstm
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
        weight_qkv.shape == (3 * width, width) and weight_out.shape == (width, width),
        lambda: (
            f"roformer_block: x {shape(x)} needs weight_qkv ({3 * width}, {width}) and weight_out ({width}, {width}), "
            f"got {shape(weight_qkv)} and {shape(weight_out)}"
        ),
    )
    _check_mlp("roformer_block", x, weight_gate, weight_up, weight_down, scale_attention, scale_mlp)
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
    require_floating(
        "roformer_block", x=x, weight_qkv=weight_qkv, weight_out=weight_out, weight_gate=weight_gate,
        weight_up=weight_up, weight_down=weight_down, scale_attention=scale_attention, scale_mlp=scale_mlp, rope=rope,
        registers=registers,
    )  # fmt: skip
    if n_registers == 0:
        registers = None
    return run(
        "roformer_block", _roformer_kernels, _composed_roformer, x, weight_qkv, weight_out, weight_gate, weight_up,
        weight_down, scale_attention, scale_mlp, rope, n_head, seen_window(window, length), registers,
        return_registers, eps_attention, eps_mlp,
    )  # fmt: skip


def rnn_block(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    weight_down: Tensor,
    scale_rnn: Tensor,
    scale_mlp: Tensor,
    *,
    eps_rnn: float = 1e-6,
    eps_mlp: float = 1e-6,
) -> Tensor:
    """A block of independent GRUs or LSTMs, L layers deep, and a SwiGLU layer, each behind an RMSNorm.

    `x = x + rnn(rms_norm(x))`, then `x = x + swiglu_mlp(rms_norm(x))`; layers as in `grouped_gru` and `grouped_lstm`,
    from zero states, without biases. Where no kernel takes the whole, it is put together from `rms_norm`, those and
    `swiglu_mlp`, each of which may still run in a kernel of its own.

    Args:
        x: (B, T, C), C = G·N·H.
        weight_ih: (L, N, G, 3H, N·H), or with 4H an LSTM's; N = 1 for one direction, 2 for both.
        weight_hh: (L, N, G, 3H or 4H, H).
        weight_gate, weight_up: (F, C).
        weight_down: (C, F).
        scale_rnn, scale_mlp: (C,), of the norms.
        eps_rnn, eps_mlp: of the norms.

    Returns:
        (B, T, C), in the promoted dtype of x and, under autocast, autocast's.

    Raises:
        ValueError: if shapes do not fit.
    """
    require(x.dim() == 3, lambda: f"rnn_block: x must be (B, T, C), got {shape(x)}")
    width = x.shape[2]
    fits = weight_ih.dim() == weight_hh.dim() == 5
    if fits:
        layers, directions, groups, rows, hidden = weight_hh.shape
        fits = (
            layers > 0
            and directions in (1, 2)
            and rows in (3 * hidden, 4 * hidden)
            and width == groups * directions * hidden
            and weight_ih.shape == (layers, directions, groups, rows, directions * hidden)
        )
    require(
        fits,
        lambda: (
            f"rnn_block: x {shape(x)} needs weight_ih (L, N, G, 3H or 4H, N·H) and weight_hh (L, N, G, 3H or 4H, H) "
            f"with G·N·H = {width} and N 1 or 2, got {shape(weight_ih)} and {shape(weight_hh)}"
        ),
    )
    _check_mlp("rnn_block", x, weight_gate, weight_up, weight_down, scale_rnn, scale_mlp)
    require_floating(
        "rnn_block", x=x, weight_ih=weight_ih, weight_hh=weight_hh, weight_gate=weight_gate, weight_up=weight_up,
        weight_down=weight_down, scale_rnn=scale_rnn, scale_mlp=scale_mlp,
    )  # fmt: skip
    return run(
        "rnn_block", _rnn_kernels, _composed_rnn, x, weight_ih, weight_hh, weight_gate, weight_up, weight_down,
        scale_rnn, scale_mlp, eps_rnn, eps_mlp,
    )  # fmt: skip


def _check_mlp(
    operation: str, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, first_scale: Tensor, scale: Tensor
) -> None:
    width = x.shape[2]
    require(
        gate.dim() == 2
        and gate.shape[1] == width
        and up.shape == gate.shape
        and down.shape == (width, gate.shape[0])
        and first_scale.shape == scale.shape == (width,),
        lambda: (
            f"{operation}: x {shape(x)} needs weight_gate and weight_up (F, {width}), weight_down ({width}, F) and "
            f"scales ({width},), got {shape(gate)}, {shape(up)}, {shape(down)}, {shape(first_scale)} and {shape(scale)}"
        ),
    )


# ---- put together from operations that are asked one by one ----------------------------------------------------------


def _attention(
    qkv: Tensor, rope: Tensor, n_head: int, window: int, register_qkv: Tensor | None, return_registers: bool
) -> Tensor | tuple[Tensor, Tensor]:
    return rope_attention(
        qkv, rope, n_head, window=window, register_qkv=register_qkv, return_registers=return_registers
    )


def _gru(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, *nothing: None) -> tuple[Tensor, Tensor]:
    return grouped_gru(x, weight_ih, weight_hh)


def _lstm(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, *nothing: None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return grouped_lstm(x, weight_ih, weight_hh)


_composed_roformer = partial(eager.roformer_block, parts=(rms_norm, _attention, swiglu_mlp))
_composed_rnn = partial(eager.rnn_block, parts=(rms_norm, _gru, _lstm, swiglu_mlp))


def _roformer_kernels() -> ModuleType:
    from fastblocks.kernels.blocks import roformer_block

    return roformer_block


def _rnn_kernels() -> ModuleType:
    from fastblocks.kernels.blocks import rnn_block

    return rnn_block
