"""Second derivatives of operations with hand-written gradients: by plain formulas in their place.

Hand-written backward passes on a CPU run under the autocast state of their forward pass (torch.amp.custom_bwd), not of
the place that calls `backward`: their products would get other dtypes there.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_function_transform() -> bool:
    """True inside `torch.func` transforms (vmap, grad, jvp) and `torch.autograd.forward_ad.dual_level`, which need
    plain PyTorch operations."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def must_trace() -> bool:
    """True where a formula has to stay plain PyTorch: function transforms, `torch.compile`, `torch.export`."""
    return torch.compiler.is_compiling() or in_function_transform()


def by_formula(
    formula: Callable[..., Tensor | Sequence[Tensor]],
    arguments: Sequence,
    grad_results: Tensor | Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of a plain formula, as part of the graph: what a hand-written backward pass returns when somebody
    differentiates it (`create_graph=True`, `torch.autograd.grad` twice).

    Args:
        formula: plain PyTorch that gives what the forward pass gave.
        arguments: its arguments, tensors and others.
        grad_results: the gradients of its results, None for those that nobody used.

    Returns:
        A gradient for each argument, None where it is not a tensor or takes no gradient.
    """
    wanted = [i for i, value in enumerate(arguments) if isinstance(value, Tensor) and value.requires_grad]
    grads = [grad_results] if isinstance(grad_results, Tensor) else grad_results
    with torch.enable_grad():
        # A view of each tensor: gradients with respect to it stop there, but belong to the graph of the argument.
        # Otherwise a gradient would also flow through an argument that is computed from another one.
        views = [value.view_as(value) if isinstance(value, Tensor) else value for value in arguments]
        results = formula(*views)
        results = [results] if isinstance(results, Tensor) else results
        pairs = zip(results, grads, strict=False)
        used = [(result, grad) for result, grad in pairs if grad is not None and result.requires_grad]
        found = torch.autograd.grad(
            [result for result, _ in used],
            [views[i] for i in wanted],
            [grad for _, grad in used],
            create_graph=True,
            allow_unused=True,
        )
    gradients: list[Tensor | None] = [None] * len(arguments)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


def keep(ctx, *tensors: Tensor) -> None:
    """What `ctx.save_for_backward` does, for one node of results that have nothing to do with each other: they may get
    their gradients one after the other, and saved tensors are gone after the first backward pass."""
    ctx.kept_tensors, ctx.kept_versions = tensors, [tensor._version for tensor in tensors]


def kept(ctx) -> tuple[Tensor, ...]:
    """What `keep` kept.

    Raises:
        RuntimeError: if somebody has changed one of them meanwhile, as autograd has it of saved tensors.
    """
    if [tensor._version for tensor in ctx.kept_tensors] != ctx.kept_versions:
        raise RuntimeError(
            "a norm's weight, or what it has become, has been modified by an inplace operation between forward and "
            "backward pass"
        )
    return ctx.kept_tensors


def twice_differentiable(
    library: Callable[..., Tensor | tuple[Tensor, ...]],
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
) -> Tensor | tuple[Tensor, ...]:
    """`library(*inputs)` with the library's own gradient, or the formula's where that is differentiated
    (`create_graph`).

    For fused functions that have a backward pass, but no derivative of it: cuDNN's recurrences, oneDNN's LSTM, flash
    attention. The library's graph is an ordinary part of the whole, so that hooks on saved tensors see all of it.
    """
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return library(*inputs)
    outputs = library(*(_Entry.apply(t) if t is not None and t.requires_grad else t for t in inputs))
    single = isinstance(outputs, Tensor)
    outputs = (outputs,) if single else tuple(outputs)
    outputs = _Exit.apply(formula, len(outputs), *outputs, *inputs)
    return outputs[0] if single else outputs


class _Entry(torch.autograd.Function):
    """The identity before a library's function; passes no gradient on where `_Exit` has used the formula."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor | None:
        return None if torch.is_grad_enabled() else grad


class _Exit(torch.autograd.Function):
    """The identity after a library's function; with `create_graph` its gradient goes by the formula to the inputs."""

    @staticmethod
    def forward(ctx, formula, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.formula, ctx.count = formula, count
        ctx.save_for_backward(*tensors[count:])
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, None, *grads, *(None for _ in inputs)
        # The library's backward runs anyway, and not every library accepts None as a gradient.
        zeros = (torch.zeros_like(grad) for grad in grads)
        return None, None, *zeros, *by_formula(ctx.formula, inputs, grads)
