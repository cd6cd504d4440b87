"""Pointwise operations on feature maps: what follows a convolution."""

from types import ModuleType

from torch import Tensor

from fastblocks.eager import activations as eager
from fastblocks.functional._dispatch import require, require_floating, run, shape


def bias_leaky_relu(x: Tensor, bias: Tensor, slope: float = 0.01) -> Tensor:
    """`leaky_relu(x + bias)`, for the output of a convolution that was called without its bias.

    Source: Maas et al., "Rectifier Nonlinearities Improve Neural Network Acoustic Models", 2013.

    Args:
        x: (B, C, …), channels first, in memory first or last.
        bias: (C,).
        slope: what negative numbers are multiplied by, not negative itself.

    Returns:
        x's shape, dtype and memory format. On a GPU it is what is kept for the backward pass, and x is not.

    Raises:
        ValueError: if bias is not (C,), or slope is negative.
    """
    require(
        x.dim() > 1 and shape(bias) == shape(x)[1:2],
        lambda: f"bias_leaky_relu: x (B, C, …) needs a bias (C,), got {shape(x)} and {shape(bias)}",
    )
    require(slope >= 0, lambda: f"bias_leaky_relu: slope must not be negative, got {slope}")
    require_floating("bias_leaky_relu", x=x, bias=bias)

    def kernels() -> ModuleType:
        from fastblocks.kernels.activations import bias_leaky_relu

        return bias_leaky_relu

    return run("bias_leaky_relu", kernels, eager.bias_leaky_relu, x, bias, slope)
