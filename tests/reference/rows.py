"""Formulas that work on rows of channels: slow, obvious, in the dtype they are given (float64 in tests)."""

from torch import Tensor


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return scale * x / ((x * x).mean(-1, keepdim=True) + eps).sqrt()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred * centred).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def swiglu_mlp(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
    return swiglu(x @ weight_gate.T, x @ weight_up.T) @ weight_down.T


def gelu(x: Tensor) -> Tensor:
    return x * (1 + (x / 2**0.5).erf()) / 2
