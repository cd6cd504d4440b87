"""What a benchmark workload is: one computation that several providers make with the same weights and inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE_RATE = 48000


@dataclass(frozen=True)
class Workload:
    """One workload at one size.

    Args:
        name: unique; its start up to a hyphen selects it, too.
        what: "operation" (tensors in the dtype that is measured), or else "layer", "block", "discriminator" or "model":
            a module with float32 weights, which 16-bit dtypes reach through autocast.
        shape: for the tables, in a few words.
        build: kit -> a module, or a function that needs no weights of its own. Two kits' modules share a state_dict.
        inputs: generator -> the arguments, on the CPU in float32. Floating-point tensors that `constant` does not
            name get gradients.
        flops: of one forward, products and sums counted singly, the original's formulas without padding or masked
            pairs; pointwise work is left out. 0: not counted.
        constant: positions of arguments that need no gradient.
        step: (callable, inputs) -> None, one whole training step with its backward pass; None: the sum of the outputs
            with fixed random weights, and the gradients of everything.
        rivals: name of a rival -> what it has to know of the shape.
        banded: attention whose float64 reference must not hold all pairs of tokens.
        modes: of `workloads.MODES`, those that say something.
        package: whose module `build` imports, beside the kits.
    """

    name: str
    what: str
    shape: str
    build: Callable[[ModuleType], Callable]
    inputs: Callable[[torch.Generator], Sequence[Any]]
    flops: int = 0
    constant: tuple[int, ...] = ()
    step: "Callable[[Callable, Sequence[Any]], None] | None" = None
    rivals: dict[str, dict[str, Any]] = field(default_factory=dict)
    banded: bool = False
    modes: tuple[str, ...] = ("forward", "backward", "training")
    package: str = ""

    @property
    def is_operation(self) -> bool:
        return self.what == "operation"


def normal(*shapes: tuple[int, ...], scale: float = 1.0) -> Callable[[torch.Generator], list[Tensor]]:
    """Inputs of these shapes, normally distributed; weights are (out, in) with variance 1 / in where scale is 0."""

    def draw(generator: torch.Generator) -> list[Tensor]:
        return [torch.randn(shape, generator=generator) * (scale or shape[-1] ** -0.5) for shape in shapes]

    return draw


def operation(name: str, **options) -> Callable[[ModuleType], Callable]:
    """kit -> its function of that name."""
    return lambda kit: partial(getattr(kit.functional, name), **options)


def block(name: str, *arguments, **keywords) -> Callable[[ModuleType], nn.Module]:
    """kit -> its module of that name."""
    return lambda kit: getattr(kit, name)(*arguments, **keywords)


def by(sizes: Sequence[int]) -> str:
    """282×64."""
    return "×".join(map(str, sizes))
