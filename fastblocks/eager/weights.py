"""Weights divided by their largest singular values, or by the norms of their rows.

The singular value comes from the product that the power iteration has already computed, and the gradient through the
division is a dot product and a rank-one update: half the passes over the weight that torch.nn.utils.spectral_norm
makes. There it takes a third of a training step of five period discriminators on half a second.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager.derivatives import by_formula, keep, kept, must_trace

# Numbers of a weight up to which those of one shape are computed together. Milliseconds of one thread, one by one /
# together, forward: 15 of (32, 2, 3, 9) 0.53 / 0.17, 15 of (32, 32, 3, 9) 0.67 / 0.34, 3 of (64, 32, 3, 9) 0.17 / 0.18.
MAX_SHARED = 1 << 15


def spectral_norm(weight: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float) -> Tensor:
    learns = torch.is_grad_enabled() and weight.requires_grad
    with torch.no_grad():
        matrix = weight.flatten(1)
        product = None
        for _ in range(n_power_iterations):
            _normalize(torch.mv(matrix.T, u), eps, v)
            product = torch.mv(matrix, v)
            _normalize(product, eps, u)
        if n_power_iterations and (learns or must_trace()):
            u, v = u.clone(), v.clone()  # the next forward changes the buffers in place
    if must_trace():
        return _formula(weight, u, v)
    with torch.no_grad():
        sigma = torch.dot(u, torch.mv(matrix, v) if product is None else product)
    return _DivideBySingularValue.apply(weight, u, v, sigma) if learns else weight / sigma


def _normalize(x: Tensor, eps: float, out: Tensor) -> None:
    """F.normalize, in two thirds of the time where a vector is short."""
    torch.div(x, torch.linalg.vector_norm(x).clamp_min_(eps), out=out)


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
    """Small weights of one shape together, others one by one."""
    alike: dict[object, list[int]] = {}
    for i, weight in enumerate(weights):
        small = weight.numel() <= MAX_SHARED and not must_trace()
        alike.setdefault((weight.shape, weight.dtype, us[i].dtype, weight.device) if small else i, []).append(i)
    normed = list(weights)
    for key, indices in alike.items():
        several = [[tensors[i] for i in indices] for tensors in (weights, us, vs)]
        if isinstance(key, tuple):
            results = _spectral_norms_of_one_shape(*several, n_power_iterations, eps)
        else:
            results = [spectral_norm(*(tensor for (tensor,) in several), n_power_iterations, eps)]
        for i, result in zip(indices, results, strict=True):
            normed[i] = result
    return normed


def _spectral_norms_of_one_shape(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], n_power_iterations: int, eps: float
) -> Sequence[Tensor]:
    with torch.no_grad():
        matrices = torch.stack(weights).flatten(2)  # [N, O, I]
        u, v = torch.stack(us)[:, None], torch.stack(vs)[:, None]  # rows: ten times as fast as columns
        product = None
        for _ in range(n_power_iterations):
            v = F.normalize(torch.bmm(u, matrices), dim=2, eps=eps)
            product = torch.bmm(v, matrices.mT)
            u = F.normalize(product, dim=2, eps=eps)
        if n_power_iterations:
            torch._foreach_copy_([*us, *vs], [*u[:, 0], *v[:, 0]])
        sigma = (u * (torch.bmm(v, matrices.mT) if product is None else product)).sum(2, keepdim=True)
        normed = matrices.div_(sigma)
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return _DivideBySingularValues.apply(normed, u, v, sigma, *weights)
    return normed.view(-1, *weights[0].shape).unbind()


class _DivideBySingularValues(torch.autograd.Function):
    """`_DivideBySingularValue` of N weights (O, …) of one shape; it is given its results as matrices (N, O, I)."""

    @staticmethod
    def forward(ctx, normed: Tensor, u: Tensor, v: Tensor, sigma: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        keep(ctx, normed, u, v, sigma, *weights)
        ctx.set_materialize_grads(False)
        return normed.view(-1, *weights[0].shape).unbind()

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        normed, u, v, sigma, *weights = kept(ctx)
        used = [i for i, grad in enumerate(grads) if grad is not None]
        found: list[Tensor | None] = [None] * len(weights)  # none for what nobody used, as from nodes of their own
        if not used:
            return None, None, None, None, *found
        if torch.is_grad_enabled():
            formula = lambda *weights: list(map(_formula, weights, u[:, 0], v[:, 0]))  # noqa: E731
            return None, None, None, None, *by_formula(formula, weights, grads)
        if len(used) < len(weights):
            normed, u, v, sigma = (tensor[used] for tensor in (normed, u, v, sigma))
        grad = torch.stack([grads[i] for i in used]).flatten(2)
        along = (grad * normed).sum((1, 2), keepdim=True)
        grad = torch.baddbmm(grad, u.mT * -along, v).div_(sigma)
        for i, part in zip(used, grad.view(-1, *weights[0].shape).unbind(), strict=True):
            found[i] = part
        return None, None, None, None, *found


def weight_norm(v: Tensor, g: Tensor) -> Tensor:
    return torch._weight_norm(v, g, 0)


def weight_norms(vs: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
    return [weight_norm(v, g) for v, g in zip(vs, gs, strict=True)]
