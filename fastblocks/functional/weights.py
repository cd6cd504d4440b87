"""Spectral normalization of a weight."""

from torch import Tensor

from fastblocks.eager import weights as eager
from fastblocks.functional._dispatch import require, require_floating, run, shape


def spectral_norm(weight: Tensor, u: Tensor, v: Tensor, *, n_power_iterations: int = 1, eps: float = 1e-12) -> Tensor:
    """`weight / (uᵀ W v)` for W the weight as a matrix (O, …), after power iterations that bring u and v closer to its
    first singular vectors.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018.

    Args:
        weight: (O, …), with N numbers per output.
        u: (O,), of length 1; changed in place by the power iterations, and takes no gradient.
        v: (N,), as u.
        n_power_iterations: how many; 0 (in evaluation) leaves u and v as they are.
        eps: lower bound of the norm that a vector is divided by.

    Returns:
        (O, …), the weight's shape and dtype.

    Raises:
        ValueError: if u and v do not fit the weight, or n_power_iterations is negative.
    """
    require(
        weight.dim() > 1 and u.shape == weight.shape[:1] and shape(v) == (weight.shape[1:].numel(),),
        lambda: (
            f"spectral_norm: a weight (O, …) of N numbers an output needs u (O,) and v (N,), got {shape(weight)}, "
            f"{shape(u)} and {shape(v)}"
        ),
    )
    require(
        n_power_iterations >= 0, lambda: f"spectral_norm: n_power_iterations must not be negative: {n_power_iterations}"
    )
    require_floating("spectral_norm", weight=weight, u=u, v=v)
    return run("spectral_norm", None, eager.spectral_norm, weight, u, v, n_power_iterations, eps)
