"""Weights divided by their largest singular values, or by the norms of their rows.

The singular value comes from the product that the power iteration has already computed, and the gradient through the
division is a dot product and a rank-one update: half the passes over the weight that torch.nn.utils.spectral_norm
makes. There it takes a third of a training step of five period discriminators on half a second.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager.derivatives import by_formula, must_trace


def spectral_norm(weight: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float) -> Tensor:
    with torch.no_grad():
        matrix = weight.flatten(1)
        product = None
        for _ in range(n_power_iterations):
            F.normalize(torch.mv(matrix.T, u), dim=0, eps=eps, out=v)
            product = torch.mv(matrix, v)
            F.normalize(product, dim=0, eps=eps, out=u)
        if n_power_iterations:
            u, v = u.clone(), v.clone()  # the next forward changes the buffers in place
    if must_trace():
        return _formula(weight, u, v)
    with torch.no_grad():
        sigma = torch.dot(u, torch.mv(matrix, v) if product is None else product)
    return _DivideBySingularValue.apply(weight, u, v, sigma)


def _formula(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return weight / torch.dot(u, torch.mv(weight.flatten(1), v))


class _DivideBySingularValue(torch.autograd.Function):
    """weight / sigma where sigma = uᵀ W v, for W the weight as a matrix (out, …)."""

    @staticmethod
    def forward(ctx, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        normed = weight / sigma
        ctx.save_for_backward(weight, u, v, sigma, normed)
        return normed

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, u, v, sigma, normed = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *by_formula(lambda w: _formula(w, u, v), (weight,), grad), None, None, None
        along = torch.dot(grad.flatten(), normed.flatten())
        return torch.addr(grad.flatten(1), u * -along, v).div_(sigma).view_as(weight), None, None, None


def spectral_norms(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], n_power_iterations: int, eps: float
) -> list[Tensor]:
    return [spectral_norm(w, u, v, n_power_iterations, eps) for w, u, v in zip(weights, us, vs, strict=True)]


def weight_norm(v: Tensor, g: Tensor) -> Tensor:
    return torch._weight_norm(v, g, 0)


def weight_norms(vs: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
    return [weight_norm(v, g) for v, g in zip(vs, gs, strict=True)]
