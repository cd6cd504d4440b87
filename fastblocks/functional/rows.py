"""Operations on rows of channels: RMSNorm and SwiGLU."""

from types import ModuleType

from torch import Tensor

from fastblocks.eager import rows as eager
from fastblocks.functional._dispatch import require, require_floating, run, shape


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square layer normalization: `scale * x * rsqrt(mean(x²) + eps)` over the last dimension.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Args:
        x: (…, C).
        scale: (C,).
        eps: added to the mean square.

    Returns:
        (…, C), in the promoted dtype of x and scale; the statistics are float32 or better.

    Raises:
        ValueError: if scale is not (C,).
    """
    require(
        x.dim() > 0 and shape(scale) == shape(x)[-1:],
        lambda: f"rms_norm: scale must have the shape of x's last dimension, got x {shape(x)} and scale {shape(scale)}",
    )
    require_floating("rms_norm", x=x, scale=scale)

    def kernels() -> ModuleType:
        from fastblocks.kernels.rows import rms_norm

        return rms_norm

    return run("rms_norm", kernels, eager.rms_norm, x, scale, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Swish-gated linear unit, the pointwise part: `silu(gate) * up`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.

    Args:
        gate, up: the same shape (…, F).

    Returns:
        (…, F).

    Raises:
        ValueError: if the shapes differ.
    """
    require(gate.shape == up.shape, lambda: f"swiglu: gate {shape(gate)} and up {shape(up)} must have one shape")
    require_floating("swiglu", gate=gate, up=up)

    def kernels() -> ModuleType:
        from fastblocks.kernels.rows import swiglu

        return swiglu

    return run("swiglu", kernels, eager.swiglu, gate, up)


def swiglu_mlp(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
    """The whole SwiGLU layer: `(silu(x Wgᵀ) * (x Wuᵀ)) Wdᵀ`, no biases.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.

    Args:
        x: (…, C).
        weight_gate, weight_up: (F, C).
        weight_down: (C_out, F).

    Returns:
        (…, C_out); under autocast in its dtype.

    Raises:
        ValueError: if the weights do not fit x or each other.
    """
    require(
        x.dim() > 0
        and weight_gate.dim() == 2
        and weight_gate.shape == weight_up.shape
        and weight_gate.shape[1] == x.shape[-1]
        and weight_down.dim() == 2
        and weight_down.shape[1] == weight_gate.shape[0],
        lambda: (
            f"swiglu_mlp: x {shape(x)} needs weight_gate and weight_up (F, C) and weight_down (C_out, F), "
            f"got {shape(weight_gate)}, {shape(weight_up)} and {shape(weight_down)}"
        ),
    )
    require_floating("swiglu_mlp", x=x, weight_gate=weight_gate, weight_up=weight_up, weight_down=weight_down)

    def kernels() -> ModuleType:
        from fastblocks.kernels.rows import swiglu_mlp

        return swiglu_mlp

    return run("swiglu_mlp", kernels, eager.swiglu_mlp, x, weight_gate, weight_up, weight_down)
