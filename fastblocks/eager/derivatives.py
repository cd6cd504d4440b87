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
    formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_outputs: Tensor | Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of a plain formula, as part of the graph: what a hand-written backward pass returns when somebody
    differentiates it (`create_graph=True`, `torch.autograd.grad` twice).

    Args:
        formula: plain PyTorch that gives what the forward pass gave.
        inputs: its arguments, None where it has none.
        grad_outputs: the gradients of its result.

    Returns:
        A gradient an input, None where the input is None or takes no gradient.
    """
    wanted = [i for i, tensor in enumerate(inputs) if tensor is not None and tensor.requires_grad]
    with torch.enable_grad():
        # A view of each input: gradients with respect to it stop there, but belong to the graph of the input.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        grads = torch.autograd.grad(formula(*views), [views[i] for i in wanted], grad_outputs, create_graph=True)
    result: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(wanted, grads, strict=True):
        result[i] = grad
    return tuple(result)
