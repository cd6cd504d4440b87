"""Mean absolute differences of many pairs of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastblocks.eager.derivatives import by_formula, must_trace


def mean_differences(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """mean |x − y| of each pair, float32 or better; ys take no gradient."""
    ys = [y.detach() for y in ys]
    if must_trace():
        return torch.stack(_formula(ys, xs))
    return torch.stack(_MeanDifferences.apply(ys, *xs))


def mean_magnitudes(xs: Sequence[Tensor]) -> Tensor:
    """mean |x| of each, without a gradient."""
    with torch.no_grad():
        if xs[0].is_cuda:
            norms = torch._foreach_norm([x.detach() for x in xs], 1, _wide(xs[0]))
        else:
            # a quarter of the time of vector_norm(x, 1), which a CPU does not vectorize
            norms = [x.abs().sum(dtype=_wide(x)) for x in xs]
        return torch.stack([norm / x.numel() for norm, x in zip(norms, xs, strict=True)])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _formula(ys: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
    return [(x - y).to(_wide(x)).abs().mean() for x, y in zip(xs, ys, strict=True)]


class _MeanDifferences(torch.autograd.Function):
    """Keeps no difference: the signs are computed again. On a GPU a few launches for all pairs, on a CPU pair by pair,
    because then a difference is still in the cache when its sum is made."""

    @staticmethod
    def forward(ctx, ys: Sequence[Tensor], *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*xs, *ys)
        ctx.set_materialize_grads(False)
        if xs[0].is_cuda:
            norms = torch._foreach_norm(torch._foreach_sub(list(xs), list(ys)), 1, _wide(xs[0]))
        else:
            norms = [(x - y).abs_().sum(dtype=_wide(x)) for x, y in zip(xs, ys, strict=True)]
        return tuple(norm / x.numel() for norm, x in zip(norms, xs, strict=True))

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, saved = len(grads), ctx.saved_tensors  # once: checkpointing gives each only once
        xs, ys = saved[:n], saved[n:]
        if torch.is_grad_enabled():
            return None, *by_formula(lambda *views: _formula(ys, views), xs, grads)
        found: list[Tensor | None] = [None] * n
        for i, (x, y, grad) in enumerate(zip(xs, ys, grads, strict=True)):
            if grad is not None and ctx.needs_input_grad[1 + i]:
                found[i] = (x - y).sign_().mul_((grad / x.numel()).to(x.dtype))
        return None, *found
