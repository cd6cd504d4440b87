"""Mean absolute differences of many pairs of feature maps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastblocks.eager.derivatives import by_formula, must_trace


def feature_matching(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """mean |x − y| of each pair, and mean |y|, float32 or better; ys take no gradient."""
    return mean_differences(xs, ys), mean_magnitudes(ys)


def means_formula(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Both as one tensor (2, pairs), for second derivatives."""
    return torch.stack((torch.stack(_formula(ys, xs)), mean_magnitudes(ys)))


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
        wanted = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[1 + i]]
        if wanted and xs[0].is_cuda:
            signs = torch._foreach_sub([xs[i] for i in wanted], [ys[i] for i in wanted])
            torch._foreach_sign_(signs)
            scales = torch._foreach_div([grads[i] for i in wanted], [xs[i].numel() for i in wanted])
            for i, sign, scale in zip(wanted, signs, scales, strict=True):
                found[i] = sign.mul_(scale)
        else:
            for i in wanted:
                found[i] = (xs[i] - ys[i]).sign_().mul_((grads[i] / xs[i].numel()).to(xs[i].dtype))
        return None, *found
