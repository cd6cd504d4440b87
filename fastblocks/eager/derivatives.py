"""Hand-written gradients that can themselves be differentiated, and where formulas have to stand in their place."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def in_function_transform() -> bool:
    """True inside `torch.func` transforms (vmap, grad, jvp), which need formulas that they can see through."""
    return torch._C._are_functorch_transforms_active()


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
        # Without, an argument that is computed from another one would be differentiated through.
        views = [value.view_as(value) if isinstance(value, Tensor) else value for value in arguments]
        results = formula(*views)
        results = [results] if isinstance(results, Tensor) else results
        used = [(result, grad) for result, grad in zip(results, grads, strict=False) if grad is not None]
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
