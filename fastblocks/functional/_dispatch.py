"""The dispatch that all operations share: ask `backend` whether a kernel or plain PyTorch runs a call, and run that."""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from fastblocks import backend


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raise a ValueError unless the condition holds. The message is a function because putting one together takes
    longer than all of the checks."""
    if not condition:
        raise ValueError(message())


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def require_floating(operation: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError for integers, booleans and complex numbers."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{operation}: {name} must be floating-point, got {tensor.dtype}")


def run(operation: str, kernels: Callable[[], ModuleType] | None, eager: Callable, *arguments):
    """Call a kernel or plain PyTorch.

    Args:
        operation: the function of `fastblocks.functional`, for `explain`.
        kernels: imports and returns the module that has the operation's kernels under its name, and an
            `unsupported_reason` of the same arguments; a function, so that nothing is imported where Triton is missing.
            None: there is no kernel.
        eager: the same in plain PyTorch.
        *arguments: of either; the first is the main input.
    """
    unsupported_reason = None if kernels is None else lambda: kernels().unsupported_reason(*arguments)
    if backend.decide(operation, arguments[0], unsupported_reason):
        return getattr(kernels(), operation)(*arguments)
    return eager(*arguments)
