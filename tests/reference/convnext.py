"""ConvNeXt's operations written as their definitions, one output position and one tap at a time, for float64."""

import itertools
import math

import torch
from torch import Tensor


def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: tuple[int, ...],
    transposed: bool,
    sizes: tuple[int, ...],
    eps: float = 1e-6,
) -> Tensor:
    kernel = weight.shape[2:]
    rows = []
    for output in itertools.product(*map(range, sizes)):
        u = torch.zeros_like(x[(slice(None), slice(None), *(0,) * len(sizes))])  # (B, C)
        for tap in itertools.product(*map(range, kernel)):
            inputs = []
            for o, k, size, s, length in zip(output, tap, kernel, stride, x.shape[2:], strict=True):
                i = o + size // 2 - k if transposed else o * s - size // 2 + k
                if transposed and i % s:
                    break
                i = i // s if transposed else i
                if not 0 <= i < length:
                    break
                inputs.append(i)
            else:
                u = u + x[(slice(None), slice(None), *inputs)] * weight[(slice(None), 0, *tap)]
        if bias is not None:
            u = u + bias
        centered = u - u.mean(1, keepdim=True)
        normalized = centered / (centered.square().mean(1, keepdim=True) + eps).sqrt()
        rows.append(normalized * norm_weight + norm_bias)
    return torch.stack(rows, 1).unflatten(1, tuple(sizes))


def convnext_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor | None = None
) -> Tensor:
    pre = x @ weight1.T + bias1
    hidden = pre * (1 + torch.erf(pre / math.sqrt(2))) / 2
    y = (hidden @ weight2.T + bias2).movedim(-1, 1)
    return y if residual is None else y + residual


def swiglu_mlp(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
    gate = x @ weight_gate.T
    return (gate / (1 + torch.exp(-gate)) * (x @ weight_up.T)) @ weight_down.T
