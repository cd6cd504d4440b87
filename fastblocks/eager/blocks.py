"""Whole blocks as what they are made of."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager import attention, rows

Parts = tuple[Callable, Callable, Callable]
PARTS: Parts = (rows.rms_norm, attention.rope_attention, rows.swiglu_mlp)


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
    parts: Parts = PARTS,
) -> Tensor | tuple[Tensor, Tensor]:
    """parts: RMSNorm, attention and SwiGLU layer, with the arguments that `PARTS` take."""
    rms_norm, rope_attention, swiglu_mlp = parts

    def qkv(tokens: Tensor) -> Tensor:
        return F.linear(rms_norm(tokens, scale_attention, eps_attention), weight_qkv)

    def finish(tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + F.linear(attended, weight_out)
        return tokens + swiglu_mlp(rms_norm(tokens, scale_mlp, eps_mlp), weight_gate, weight_up, weight_down)

    register_qkv = None if registers is None else qkv(registers)
    out = rope_attention(qkv(x), rope, n_head, window, register_qkv, return_registers)
    return (finish(x, out[0]), finish(registers, out[1])) if return_registers else finish(x, out)
