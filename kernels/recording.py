"""What an operation would launch, without launching it: launchers run on meta tensors and their kernels take notes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType
from unittest import mock

import torch

from fastblocks.kernels import launch, runtime

MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class _Recorder:
    """Stands in for a kernel: `recorder[grid](**arguments)` notes what would be compiled."""

    def __init__(self, kernel, label: str, cases: list):
        self.kernel, self.label, self.cases = kernel, label, cases

    def __getitem__(self, grid) -> Callable:
        return self._note

    def _note(self, *, num_warps: int, num_stages: int, **arguments) -> None:
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            value = arguments[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = _TYPES[value.dtype]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            elif parameter.is_constexpr or value is None or value == 1:  # as Triton specialises them
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = "i32"
        name = self.kernel.fn.__name__.strip("_")
        config = launch.config(num_warps, num_stages)
        self.cases.append(launch.CompileCase(f"{self.label}: {name}", self.kernel, signature, constants, config))


def recorded(architecture: str, label: str, modules: tuple[ModuleType, ...], run: Callable) -> Iterator:
    """The `CompileCase`s of what `run()` launches from these modules on an architecture."""
    cases: list[launch.CompileCase] = []
    with ExitStack() as stack:
        for function, value in (("architecture", architecture), ("multiprocessors", MULTIPROCESSORS[architecture])):
            stack.enter_context(mock.patch.object(runtime, function, lambda device, value=value: value))
        for module in modules:
            for name, kernel in vars(module).copy().items():
                if name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, _Recorder(kernel, label, cases)))
        run()
    return iter(cases)
