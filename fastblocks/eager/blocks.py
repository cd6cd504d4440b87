"""Whole blocks as what they are made of."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager import attention, recurrent, rows

Parts = tuple[Callable, ...]


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
    window: int,
    registers: Tensor | None,
    return_registers: bool,
    eps_attention: float,
    eps_mlp: float,
    *,
    parts: Parts = (rows.rms_norm, attention.rope_attention, rows.swiglu_mlp),
) -> Tensor | tuple[Tensor, Tensor]:
    """parts: RMSNorm, attention and SwiGLU layer, with the arguments of these."""
    rms_norm, rope_attention, swiglu_mlp = parts

    def qkv(tokens: Tensor) -> Tensor:
        return F.linear(rms_norm(tokens, scale_attention, eps_attention), weight_qkv)

    def finish(tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + F.linear(attended, weight_out)
        return tokens + swiglu_mlp(rms_norm(tokens, scale_mlp, eps_mlp), weight_gate, weight_up, weight_down)

    register_qkv = None if registers is None else qkv(registers)
    out = rope_attention(qkv(x), rope, n_head, window, register_qkv, return_registers)
    return (finish(x, out[0]), finish(registers, out[1])) if return_registers else finish(x, out)


def rnn_block(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    weight_down: Tensor,
    scale_rnn: Tensor,
    scale_mlp: Tensor,
    eps_rnn: float,
    eps_mlp: float,
    *,
    parts: Parts = (rows.rms_norm, recurrent.grouped_gru, recurrent.grouped_lstm, rows.swiglu_mlp),
) -> Tensor:
    """parts: RMSNorm, layer of GRUs, layer of LSTMs and SwiGLU layer, with the arguments of these."""
    rms_norm, grouped_gru, grouped_lstm, swiglu_mlp = parts
    layer = grouped_lstm if weight_hh.shape[3] == 4 * weight_hh.shape[4] else grouped_gru
    y = rms_norm(x, scale_rnn, eps_rnn)
    for input_weight, state_weight in zip(weight_ih.unbind(), weight_hh.unbind(), strict=True):
        y, _ = layer(y, input_weight, state_weight, None, None, None)
    x = x + y
    return x + swiglu_mlp(rms_norm(x, scale_mlp, eps_mlp), weight_gate, weight_up, weight_down)
