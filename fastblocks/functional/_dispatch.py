"""What every operation does before it runs: check its arguments, and ask who runs it."""

from collections.abc import Callable

from torch import Tensor


def require(condition: bool, message: Callable[[], str]) -> None:
    """The message is a function because putting one together takes longer than all of the checks."""
    if not condition:
        raise ValueError(message())


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
