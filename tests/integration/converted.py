"""How a converted module is held against its original: as close to float64 as that is."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.compare import assert_as_exact
from tests.modules.harness import tensors


def in_float64(value):
    """A module, or tensors however nested: copies in float64; complex numbers alike, others as they are."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor):
        exact = value.detach().to(torch.promote_types(value.dtype, torch.float64)) if _inexact(value) else value
        return exact.clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: in_float64(item) for name, item in value.items()}
    return type(value)(map(in_float64, value)) if isinstance(value, list | tuple) else value


def _inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def with_gradients(module: nn.Module, call: Callable, *inputs: Tensor) -> list[Tensor]:
    """What `call(module, *inputs)` returns, then the gradients of the inputs and of all that learns."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = list(tensors(call(module, *inputs)))
    leaves = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
    weights = [torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights, materialize_grads=True)]


def assert_follows(
    converted: nn.Module,
    original: nn.Module,
    *inputs,
    call: Callable = lambda module, *inputs: module(*inputs),
    gradients: bool = True,
) -> None:
    """The results of `call(module, *inputs)` are as exact in the converted module as in the original: outputs and, if
    asked for, gradients, against the original in float64."""
    run = with_gradients if gradients else lambda module, call, *inputs: list(tensors(call(module, *inputs)))
    exact = run(in_float64(original), call, *in_float64(inputs))
    eager, got = run(original, call, *inputs), run(converted, call, *inputs)
    assert len(got) == len(eager)
    for i, parts in enumerate(zip(got, eager, exact, strict=True)):
        assert_as_exact(*parts, what=f"result {i} of {len(got)}")
