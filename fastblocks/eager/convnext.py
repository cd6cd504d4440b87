"""Depthwise convolution with layer normalization over channels; Linear, GELU, Linear."""

import torch.nn.functional as F
from torch import Tensor

_CONV = {(1, False): F.conv1d, (2, False): F.conv2d, (1, True): F.conv_transpose1d, (2, True): F.conv_transpose2d}


def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: tuple[int, ...],
    transposed: bool,
    sizes: tuple[int, ...],
    eps: float,
) -> Tensor:
    extra = {}
    if transposed:
        smallest = ((size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True))
        extra["output_padding"] = tuple(size - small for size, small in zip(sizes, smallest, strict=True))
    padding = tuple(k // 2 for k in weight.shape[2:])
    convolve = _CONV[x.dim() - 2, transposed]
    y = convolve(x, weight, bias, stride=stride, padding=padding, groups=x.shape[1], **extra).movedim(1, -1)
    return F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps).to(y.dtype)


def convnext_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor | None
) -> Tensor:
    y = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2).movedim(-1, 1)
    return y.contiguous() if residual is None else residual + y
