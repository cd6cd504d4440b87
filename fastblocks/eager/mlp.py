"""Pointwise layers: SwiGLU and ConvNeXt's Linear, GELU, Linear."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_mlp(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
    return F.linear(swiglu(F.linear(x, weight_gate), F.linear(x, weight_up)), weight_down)


def convnext_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor | None
) -> Tensor:
    y = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2).movedim(-1, 1)
    return y.contiguous() if residual is None else residual + y
