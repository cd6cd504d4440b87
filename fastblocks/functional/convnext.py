"""The two halves of a ConvNeXt block."""

from types import ModuleType

from torch import Tensor

from fastblocks.eager import convnext as eager
from fastblocks.eager.convnext import window_means as window_means
from fastblocks.functional._dispatch import require, require_floating, run, shape


def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: tuple[int, ...],
    transposed: bool = False,
    output_size: tuple[int, ...] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Depthwise convolution in 1-D or 2-D, then layer normalization over channels; channels first in, last out.

    Padding is kernel // 2, so a stride of 1 keeps the size. Sizes become ceil(L / stride), or, transposed,
    (L - 1) · stride + 1 up to L · stride, as output_size says.

    Source: Liu et al., "A ConvNet for the 2020s", 2022.

    Args:
        x: (B, C, L) or (B, C, H, W).
        weight: (C, 1, *kernel), odd sizes.
        bias: (C,), or None.
        norm_weight, norm_bias: (C,).
        stride: one number a spatial dimension.
        transposed: the transposed convolution.
        output_size: spatial sizes of the transposed convolution's output; None: the smallest.
        eps: added to the variance.

    Returns:
        (B, *sizes, C), contiguous, in the convolution's dtype (under autocast: its dtype); statistics are float32 or
        better.

    Raises:
        ValueError: if shapes do not fit, a kernel size is even, or no such convolution gives output_size.
    """
    name, spatial = "depthwise_conv_layer_norm", x.dim() - 2
    require(spatial in (1, 2), lambda: f"{name}: x must be (B, C, L) or (B, C, H, W), got {shape(x)}")
    channels = x.shape[1]
    kernel = shape(weight)[2:]
    require(
        len(kernel) == spatial and shape(weight)[:2] == (channels, 1) and all(k % 2 == 1 for k in kernel),
        lambda: (
            f"{name}: x {shape(x)} needs a weight ({channels}, 1, *kernel) with {spatial} odd sizes, "
            f"got {shape(weight)}"
        ),
    )
    vectors = [vector for vector in (bias, norm_weight, norm_bias) if vector is not None]
    require(
        all(shape(vector) == (channels,) for vector in vectors),
        lambda: f"{name}: biases and norm_weight must be ({channels},), got {[shape(vector) for vector in vectors]}",
    )
    require(
        len(stride) == spatial and all(s > 0 for s in stride),
        lambda: f"{name}: stride must be {spatial} positive numbers, got {stride}",
    )
    sizes = conv_output_size(shape(x)[2:], stride, transposed, output_size)

    require_floating(name, x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)

    def kernels() -> ModuleType:
        from fastblocks.kernels.convnext import depthwise_conv_layer_norm

        return depthwise_conv_layer_norm

    arguments = (x, weight, bias, norm_weight, norm_bias, tuple(stride), transposed, sizes, eps)
    return run(name, kernels, eager.depthwise_conv_layer_norm, *arguments)


def conv_output_size(
    sizes: tuple[int, ...], stride: tuple[int, ...], transposed: bool, wanted: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Spatial sizes after a "same"-padded convolution (odd kernel, padding kernel // 2).

    Args:
        sizes: before it.
        stride: one number a dimension.
        transposed: the transposed convolution.
        wanted: what a transposed convolution shall give; None: the smallest it can.

    Raises:
        ValueError: if a size is not positive, or no such convolution gives the wanted sizes.
    """
    require(all(size > 0 for size in sizes), lambda: f"spatial sizes must be positive, got {sizes}")
    if not transposed:
        result = tuple(-(-size // s) for size, s in zip(sizes, stride, strict=True))
        require(
            wanted in (None, result),
            lambda: f"a convolution of stride {stride} turns {sizes} into {result}, not {wanted}",
        )
        return result
    smallest = tuple((size - 1) * s + 1 for size, s in zip(sizes, stride, strict=True))
    largest = tuple(size * s for size, s in zip(sizes, stride, strict=True))
    if wanted is None:
        return smallest
    require(
        len(wanted) == len(sizes) and all(a <= w <= b for a, w, b in zip(smallest, wanted, largest, strict=True)),
        lambda: (
            f"a transposed convolution of stride {stride} turns {sizes} into sizes from {smallest} to {largest}, "
            f"not {wanted}"
        ),
    )
    return tuple(wanted)


def convnext_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, residual: Tensor | None = None
) -> Tensor:
    """The pointwise half of a ConvNeXt block: Linear, exact (erf) GELU, Linear, back to channels first, residual.

    Sources: Liu et al., "A ConvNet for the 2020s", 2022; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.

    Args:
        x: (B, *sizes, C), channels last.
        weight1, bias1: (F, C) and (F,).
        weight2, bias2: (C_out, F) and (C_out,).
        residual: (B, C_out, *sizes), channels first, added at the end; or None.

    Returns:
        (B, C_out, *sizes), channels first, in the promoted dtype of the product and the residual.

    Raises:
        ValueError: if shapes do not fit.
    """
    hidden, out = weight1.shape[0], weight2.shape[0]
    require(
        x.dim() >= 3
        and shape(weight1) == (hidden, x.shape[-1])
        and shape(bias1) == (hidden,)
        and shape(weight2) == (out, hidden)
        and shape(bias2) == (out,),
        lambda: (
            f"convnext_mlp: x {shape(x)} needs weights (F, {x.shape[-1]}) and (C_out, F) with biases (F,) and "
            f"(C_out,), got {shape(weight1)}, {shape(weight2)}, {shape(bias1)} and {shape(bias2)}"
        ),
    )
    wanted = (x.shape[0], out, *x.shape[1:-1])
    require(
        residual is None or shape(residual) == wanted,
        lambda: f"convnext_mlp: residual must be {wanted}, got {residual is not None and shape(residual)}",
    )

    tensors = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "residual": residual}
    require_floating("convnext_mlp", x=x, **tensors)

    def kernels() -> ModuleType:
        from fastblocks.kernels.convnext import convnext_mlp

        return convnext_mlp

    return run("convnext_mlp", kernels, eager.convnext_mlp, x, weight1, bias1, weight2, bias2, residual)
