"""What a benchmark case is: one workload that two providers compute with the same weights and inputs."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Outputs = list[Tensor]


@dataclass(frozen=True)
class Case:
    """One workload.

    Args:
        name: unique; `python -m benchmarks NAME` selects by substring.
        what: "operation", "block", "spectral", "discriminator" or "model".
        shape: for the table, in a few words.
        build: kit -> a module, or a function that needs no weights of its own. Two kits' modules share a state_dict.
        inputs: generator -> the arguments, on the CPU in float32. Floating-point tensors that `constant` does not
            name get gradients.
        flops: of one forward, products and sums counted singly, the original's formulas without padding or masked
            pairs; pointwise work is left out. 0: not counted.
        constant: positions of arguments that need no gradient.
        step: (callable, inputs) -> None, one whole training step with its backward pass; None: the sum of the outputs
            with fixed random weights, and the gradients of everything.
    """

    name: str
    what: str
    shape: str
    build: Callable[[ModuleType], Callable]
    inputs: Callable[[torch.Generator], Sequence[Any]]
    flops: int = 0
    constant: tuple[int, ...] = ()
    step: "Callable[[Callable, Sequence[Any]], None] | None" = None


@dataclass
class Instance:
    """A case made for one provider: everything that a sample needs, ready to run."""

    case: Case
    call: Callable
    inputs: list[Any]
    weights: list[Tensor] = field(default_factory=list)  # what else gets gradients: the module's parameters
    cotangents: Outputs | None = None

    @torch.no_grad()
    def forward(self) -> Outputs:
        return flatten(self.call(*self.inputs))

    def train(self) -> Outputs:
        """Forward and backward, one or all of a step's; leaves gradients on inputs and weights."""
        for tensor in self.leaves():
            tensor.grad = None
        if self.case.step:
            self.case.step(self.call, self.inputs)
            return []
        outputs = [out for out in flatten(self.call(*self.inputs)) if out.requires_grad]
        if self.cotangents is None:
            generator = torch.Generator().manual_seed(1)
            self.cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        torch.autograd.backward(outputs, self.cotangents)
        return [out.detach() for out in outputs]

    def leaves(self) -> list[Tensor]:
        return [t for t in self.inputs if isinstance(t, Tensor) and t.requires_grad] + self.weights

    def set_training(self, training: bool) -> None:
        if isinstance(self.call, nn.Module):
            self.call.train(training)

    def bytes_moved(self, outputs: Outputs) -> int:
        """Each input and weight read once, each output written once."""
        tensors = [t for t in self.inputs if isinstance(t, Tensor)] + self.weights + outputs
        return sum(t.numel() * t.element_size() for t in tensors)


def make_instances(
    case: Case, kits: dict[str, ModuleType], device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Instance]:
    """One instance for each kit, with the weights of the first and equal inputs."""
    torch.manual_seed(seed)
    state, instances = None, {}
    inputs = list(case.inputs(torch.Generator().manual_seed(seed)))
    for name, kit in kits.items():
        call = case.build(kit)
        weights = []
        if isinstance(call, nn.Module):
            if state is None:
                state = copy.deepcopy(call.state_dict())
            call.load_state_dict(state, strict=True)
            call = call.to(device, dtype)
            weights = [p for p in call.parameters() if p.requires_grad]
        own = [_place(value, i not in case.constant, device, dtype) for i, value in enumerate(inputs)]
        instances[name] = Instance(case, call, own, weights)
    return instances


def _place(value: Any, gradient: bool, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(device, dtype if value.is_floating_point() else None, copy=True)
    return value.requires_grad_(gradient and value.is_floating_point())


def flatten(outputs: Any) -> Outputs:
    """All tensors of nested tuples and lists, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in flatten(part)]


def worst_error(got: Outputs, want: Outputs) -> float:
    """Largest absolute error over the largest absolute value, the worst of all outputs; NaN if there is a NaN."""
    errors = []
    for g, w in zip(got, want, strict=True):
        g, w = g.detach().double().cpu(), w.detach().double().cpu()
        errors.append(((g - w).abs().max() / w.abs().max().clamp_min(1e-30)).item() if w.numel() else 0.0)
    return float("nan") if any(e != e for e in errors) else max(errors)


def select(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """Cases whose names contain one of the patterns; all if there are no patterns.

    Raises:
        ValueError: for a pattern that no name contains.
    """
    for pattern in patterns:
        if not any(pattern.lower() in case.name.lower() for case in cases):
            names = ", ".join(case.name for case in cases)
            raise ValueError(f"no case is called anything like {pattern!r}; there are: {names}")
    return [case for case in cases if not patterns or any(p.lower() in case.name.lower() for p in patterns)]
