"""One provider's instance of a workload, in the three modes that are timed: forward, backward alone, training."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import original
from benchmarks.workloads.workload import Workload


class Skipped(Exception):
    """A provider cannot take part; the message says why."""


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


def flatten(outputs: Any) -> list[Tensor]:
    """All tensors of nested tuples and lists, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in flatten(part)]


class Cast:
    """Calls something under autocast; its attributes are those of what it calls."""

    def __init__(self, call: Callable, context: Callable[[], AbstractContextManager]):
        self._call, self._context = call, context

    def __call__(self, *arguments, **keywords):
        with self._context():
            return self._call(*arguments, **keywords)

    def __getattr__(self, name: str):
        return getattr(self._call, name)


@dataclass
class Runner:
    """A workload with one provider's callable and its own copy of the inputs.

    `run(mode)` gives what is compared with the reference: outputs, or gradients of inputs and weights in order.
    `prepare` does what a mode needs beforehand and is not timed: for backward, the forward pass.
    """

    workload: Workload
    call: Callable
    inputs: list[Any]
    weights: list[Tensor]
    foreign: bool = False  # its weights are laid out differently: only the inputs' gradients compare
    before_call: Callable[[], None] = field(default=lambda: None)
    initial: dict[str, Tensor] = field(default_factory=dict)  # of what a training step changes
    _outputs: list[Tensor] = field(default_factory=list)
    _cotangents: list[Tensor] = field(default_factory=list)
    _plain: list[Any] = field(default_factory=list)

    def leaves(self) -> list[Tensor]:
        return [t for t in self.inputs if isinstance(t, Tensor) and t.requires_grad] + self.weights

    def tensors(self) -> list[Tensor]:
        return [t for t in self.inputs if isinstance(t, Tensor)]

    def prepare(self, mode: str) -> None:
        if mode == "backward":
            self._outputs = self._forward_with_graph()

    def run(self, mode: str) -> list[Tensor | None]:
        if mode == "forward":
            self.before_call()
            if not self._plain:  # inputs that want gradients are refused by some even where none are made
                self._plain = [t.detach() if isinstance(t, Tensor) else t for t in self.inputs]
            with torch.no_grad():
                return flatten(self.call(*self._plain))
        if mode == "backward":
            outputs, self._outputs = self._outputs, []
            return self._gradients(outputs)
        step = self.workload.step
        if step is None:
            return self._gradients(self._forward_with_graph())
        leaves = self.leaves()
        for leaf in leaves:
            leaf.grad = None
        self.before_call()
        step(self.call, self.inputs)
        return [leaf.grad for leaf in leaves]

    def compared(self, results: list[Tensor | None], mode: str) -> list[Tensor | None]:
        """The part of `run`'s results that every provider has."""
        if mode == "forward" or not self.foreign:
            return results
        return results[: len(self.leaves()) - len(self.weights)]

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the initial weights, buffers and optimizer states, in place."""
        for name, tensor in self.call.state_dict(keep_vars=True).items() if self.initial else ():
            tensor.copy_(self.initial[name])
        for optimizer in getattr(self.call, "optimizers", list)():
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()

    def release(self) -> None:
        """Let go of graphs and gradients."""
        self._outputs = []
        for leaf in self.leaves():
            leaf.grad = None

    def _forward_with_graph(self) -> list[Tensor]:
        self.before_call()
        return [out for out in flatten(self.call(*self.inputs)) if out.requires_grad]

    def _gradients(self, outputs: list[Tensor]) -> list[Tensor | None]:
        if not self._cotangents:
            generator = torch.Generator().manual_seed(1)
            self._cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        return list(torch.autograd.grad(outputs, self.leaves(), self._cotangents, allow_unused=True))


def make_runner(
    workload: Workload,
    kit: ModuleType,
    device: torch.device,
    dtype: str,
    *,
    double: bool = False,
    wrap: Callable[[Callable], Callable] = lambda call: call,
) -> Runner:
    """A runner of one kit.

    Args:
        workload: what to run.
        kit: `benchmarks.original` or `fastblocks`; a module gets the original's initial weights, whatever order its own
            constructor draws them in.
        device: where.
        dtype: a key of `DTYPES`. An operation's tensors have it; a module stays float32 under autocast.
        double: the reference: the same values, computed in float64.
        wrap: changes the callable before autocast is put around it, e.g. compiles it.
    """
    torch.manual_seed(0)
    call = workload.build(kit)
    own = DTYPES[dtype] if workload.is_operation else torch.float32
    weights: list[Tensor] = []
    if isinstance(call, nn.Module):
        torch.manual_seed(0)
        call.load_state_dict(workload.build(original).state_dict(), strict=True)
        call = call.to(device, torch.float64 if double else torch.float32)
        call.train(workload.step is not None)
        weights = [p for p in call.parameters() if p.requires_grad]
    initial = {name: tensor.clone() for name, tensor in call.state_dict().items()} if workload.step else {}
    call = wrap(call)
    if not workload.is_operation and own != DTYPES[dtype] and not double:
        call = Cast(call, lambda: torch.autocast(device.type, DTYPES[dtype]))
    inputs = []
    for i, value in enumerate(workload.inputs(torch.Generator().manual_seed(0))):
        if isinstance(value, Tensor) and value.is_floating_point():
            constant = i in workload.constant
            value = value.to(device).to(torch.float32 if constant else own)
            value = (value.double() if double else value).detach().requires_grad_(not constant)
        inputs.append(value)
    return Runner(workload, call, inputs, weights, initial=initial)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may go through TF32; cuDNN's default is that they may.

    A PyTorch that has the switches named `fp32_precision` raises where the old ones are read after them.
    """
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches, name, values = (cuda, cudnn.conv, cudnn.rnn), "fp32_precision", ("ieee", "tf32")
    if not hasattr(cuda, name):
        switches, name, values = (cuda, cudnn), "allow_tf32", (False, True)
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, values[allowed])
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)
