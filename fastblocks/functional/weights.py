"""Normalization of weights: spectral, of several at once or of one, and by the norm of each output."""

from collections.abc import Sequence

from torch import Tensor

from fastblocks import backend
from fastblocks.eager import weights as eager
from fastblocks.functional._dispatch import require, require_floating, shape


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
    return spectral_norms([weight], [u], [v], n_power_iterations=n_power_iterations, eps=eps)[0]


def spectral_norms(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> list[Tensor]:
    """`spectral_norm` of several weights, on a GPU in as many launches as of one.

    Args:
        weights: each (O, …), with N numbers per output; O and N are each weight's own.
        us: (O,) each, changed in place.
        vs: (N,) each, changed in place.
        n_power_iterations, eps: as of `spectral_norm`.

    Returns:
        A result for each weight, of its shape and dtype.

    Raises:
        ValueError: if the lists or a weight's vectors do not fit, or n_power_iterations is negative.
    """
    _require_as_many("spectral_norm", weights, us, vs)
    for weight, u, v in zip(weights, us, vs, strict=True):
        require(
            weight.dim() > 1 and u.shape == weight.shape[:1] and shape(v) == (weight.shape[1:].numel(),),
            lambda weight=weight, u=u, v=v: (
                f"spectral_norm: a weight (O, …) of N numbers an output needs u (O,) and v (N,), got {shape(weight)}, "
                f"{shape(u)} and {shape(v)}"
            ),
        )
        require_floating("spectral_norm", weight=weight, u=u, v=v)
    require(
        n_power_iterations >= 0, lambda: f"spectral_norm: n_power_iterations must not be negative: {n_power_iterations}"
    )
    arguments = weights, us, vs, n_power_iterations, eps

    def unsupported_reason() -> str:
        from fastblocks.kernels.norms import spectral_norm

        return backend.traced_reason() or spectral_norm.unsupported_reason(*arguments)

    if weights and backend.decide("spectral_norm", weights[0], unsupported_reason):
        from fastblocks.kernels.norms import spectral_norm

        return spectral_norm.spectral_norm(*arguments)
    return eager.spectral_norms(*arguments)


def weight_norms(vs: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
    """`v · g / ‖v‖` of several weights, ‖v‖ the norm of each output's numbers; on a GPU in as many launches as of one.

    Source: Salimans and Kingma, "Weight Normalization", 2016.

    Args:
        vs: each (O, …).
        gs: (O, 1, …) each.

    Returns:
        A result for each v, of its shape and dtype.

    Raises:
        ValueError: if the lists or their shapes do not fit.
    """
    _require_as_many("weight_norm", vs, gs)
    for v, g in zip(vs, gs, strict=True):
        require(
            v.dim() > 1 and shape(g) == (len(v), *(1,) * (v.dim() - 1)),
            lambda v=v, g=g: f"weight_norm: v (O, …) needs g (O, 1, …), got {shape(v)} and {shape(g)}",
        )
        require_floating("weight_norm", v=v, g=g)

    def unsupported_reason() -> str:
        from fastblocks.kernels.norms import weight_norm

        return backend.traced_reason() or weight_norm.unsupported_reason(vs, gs)

    if vs and backend.decide("weight_norm", vs[0], unsupported_reason):
        from fastblocks.kernels.norms import weight_norm

        return weight_norm.weight_norm(vs, gs)
    return eager.weight_norms(vs, gs)


def _require_as_many(operation: str, *lists: Sequence[Tensor]) -> None:
    counts = [len(tensors) for tensors in lists]
    require(len(set(counts)) == 1, lambda: f"{operation}: lists of {' and '.join(map(str, counts))} tensors")
