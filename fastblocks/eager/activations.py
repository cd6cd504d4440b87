"""What follows a convolution, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_leaky_relu(x: Tensor, bias: Tensor, slope: float) -> Tensor:
    """leaky_relu(x + bias) for x (B, C, …); in place of the sum, which nobody else sees and no gradient needs."""
    return F.leaky_relu(x + _by_channel(bias.to(x.dtype), x), slope, inplace=True)


def bias_leaky_relu_from_output(y: Tensor, bias: Tensor, slope: float) -> Tensor:
    """A function of x with the derivatives of `bias_leaky_relu`, where y = `bias_leaky_relu(x, bias)` stands for x: it
    is linear between the points where y changes its sign."""
    return ((y + _by_channel(bias, y)) * torch.where(y.detach() > 0, 1.0, slope)).to(y.dtype)


def _by_channel(bias: Tensor, x: Tensor) -> Tensor:
    return bias.view(-1, *[1] * (x.dim() - 2))
