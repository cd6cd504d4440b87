"""How a converted module is held against its original: as close to float64 as that is."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.compare import assert_as_exact, relative_error
from tests.modules.harness import EXACT, tensors


def in_float64(value):
    """A module, or tensors however nested: copies in float64; complex numbers alike, others as they are."""
    if isinstance(value, nn.Module):
        return copied(value).double()
    if isinstance(value, Tensor):
        exact = value.detach().to(torch.promote_types(value.dtype, torch.float64)) if _inexact(value) else value
        return exact.clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: in_float64(item) for name, item in value.items()}
    return type(value)(map(in_float64, value)) if isinstance(value, list | tuple) else value


def copied(module: nn.Module) -> nn.Module:
    """A copy, whose weights that norms have derived are detached: PyTorch's own hooks leave them in the way of one."""
    held = [value for child in module.modules() for value in child.__dict__.values() if isinstance(value, Tensor)]
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in held if not value.is_leaf})


def _inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def results(module: nn.Module, call: Callable, inputs: tuple, gradients: bool, jointly: bool) -> tuple[Tensor, ...]:
    """What `call(module, *inputs)` returns, then the gradients of the inputs and of all that learns."""
    if not gradients:
        return tuple(tensors(call(module, *inputs)))
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = list(tensors(call(module, *inputs)))
    leaves = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
    weights = [torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y) for y in outputs]
    found = torch.autograd.grad(outputs, leaves, weights, materialize_grads=True)
    return (*outputs, *([torch.cat([grad.flatten() for grad in found])] if jointly else found))


def assert_follows(
    converted: nn.Module,
    original: nn.Module,
    *inputs,
    call: Callable = lambda module, *inputs: module(*inputs),
    gradients: bool = True,
    jointly: bool = False,
) -> None:
    """The results of `call(module, *inputs)` are as exact in the converted module as in the original: outputs and, if
    asked for, gradients, against the original in float64. Float64 modules are held to EXACT.

    jointly: hold all gradients as one vector. For whole models, where a gradient of a few numbers may happen to be
        exact, and the error that it shares with others is not.
    """
    exact = results(in_float64(original), call, in_float64(inputs), gradients, jointly)
    eager, got = (results(module, call, inputs, gradients, jointly) for module in (original, converted))
    for i, parts in enumerate(zip(got, eager, exact, strict=True)):
        if parts[0].dtype == torch.float64:
            assert (error := relative_error(*parts[:2])) <= EXACT, f"result {i} of {len(got)}: error {error:.2e}"
        else:
            assert_as_exact(*parts, what=f"result {i} of {len(got)}")
