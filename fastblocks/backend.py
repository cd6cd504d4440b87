"""Who runs an operation: a fused Triton kernel or plain PyTorch.

Every function of `fastblocks.functional` asks `decide` once a call. The rule, in order:

1. `use_backend("eager")` or FASTBLOCKS_BACKEND=eager: PyTorch runs everything.
2. Triton must be able to run at all: installed, and the tensors on a GPU (or, with "triton" and
   TRITON_INTERPRET=1, anywhere: the interpreter runs kernels on CPU tensors, slowly). "auto" falls back to PyTorch
   where it is not; "triton" raises, because a person who asks for it wants to know.
3. What no kernel takes (float64, function transforms such as `vmap`, layouts and sizes outside the kernel's limits)
   goes to PyTorch under "auto" and "triton" alike.

`explain` says what was decided, and why.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from fastblocks.eager.derivatives import in_function_transform

BACKENDS = ("auto", "triton", "eager")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_selected = _validated(os.environ.get("FASTBLOCKS_BACKEND", "auto"), "FASTBLOCKS_BACKEND")
_decisions: "list[Decision] | None" = None  # filled while `explain` watches


@dataclass(frozen=True)
class Decision:
    """Who runs one call of `operation`; `reason` says why it is not Triton and is empty when it is."""

    operation: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.backend}" + (f" ({self.reason})" if self.reason else "")


class use_backend:
    """Select who runs the operations of this process (all threads), now or for a `with` block.

    Args:
        name: `"auto"` (Triton wherever it can run, the default), `"triton"` (the same, but an error where Triton
            cannot run at all) or `"eager"` (PyTorch only).

    Raises:
        ValueError: if the name is none of these.

    Example::

        use_backend("eager")            # from here on
        with use_backend("triton"):     # for this block, then back
            y = block(x)
    """

    def __init__(self, name: str):
        global _selected
        self.name = _validated(name, "backend")
        self._previous, _selected = _selected, self.name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exception) -> None:
        global _selected
        _selected = self._previous

    def __repr__(self) -> str:
        return f"use_backend({self.name!r})"


@cache
def _kernel_runtime() -> "tuple[ModuleType | None, str]":
    """The kernels' runtime and an empty string, or None and why there is none."""
    try:
        from fastblocks.kernels import runtime
    except ImportError as problem:
        if (problem.name or "").startswith("fastblocks"):  # not a machine without Triton, but half an installation
            reason = f"this installation of fastblocks is incomplete: {problem}"
            warnings.warn(f"{reason}; everything runs in plain PyTorch", stacklevel=2)
            return None, reason
        return None, f"Triton cannot be imported: {problem}"
    return runtime, ""


def decide(operation: str, tensor: torch.Tensor, unsupported_reason: Callable[[], str] | None = None) -> bool:
    """True if the Triton kernel runs this call of `operation`, False if PyTorch does.

    Args:
        operation: the name of the function in `fastblocks.functional`.
        tensor: its main input; device and dtype are read from it.
        unsupported_reason: called last; says why the kernel does not take this call, or returns an empty string. It
            may import the kernel, which is there by then. None where the operation has no kernel.

    Raises:
        RuntimeError: under "triton", if Triton cannot run on this machine or on the tensor's device.
    """
    reason = _reason_against(operation, tensor, unsupported_reason)
    if _decisions is not None:
        _decisions.append(Decision(operation, "eager" if reason else "triton", reason))
    return not reason


def _reason_against(operation: str, tensor: torch.Tensor, unsupported_reason: Callable[[], str] | None) -> str:
    if _selected == "eager":
        return "the backend 'eager' is selected"
    if _selected == "auto" and not tensor.is_cuda:  # the common case on a CPU, before anything is imported
        return f"the input is on {tensor.device.type}, Triton needs a GPU"
    runtime, problem = _kernel_runtime()
    problem = problem or runtime.unsupported_reason(tensor.device)
    if problem:
        if _selected == "triton":
            raise RuntimeError(f"{operation}: the backend 'triton' is selected, but {problem}")
        return problem
    if unsupported_reason is None:
        return "it has no kernel"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"no kernel for {str(tensor.dtype).removeprefix('torch.')}"
    if in_function_transform():
        return "a function transform (vmap, grad, jvp) is active"
    if tensor.numel() == 0:
        return "the input is empty"
    return unsupported_reason()


@contextmanager
def _watch() -> Iterator[list[Decision]]:
    global _decisions
    previous, _decisions = _decisions, []
    try:
        yield _decisions
    finally:
        _decisions = previous


def explain(function: "torch.nn.Module | Callable", *inputs, **keywords) -> str:
    """Say who runs each fused operation of a module or function on these inputs, and why not Triton.

    The call is made once, without gradients; buffers of a module (such as the vectors of spectral norm) keep their
    values.

    Args:
        function: a module, or a function such as those of `fastblocks.functional`.
        *inputs, **keywords: what it is called with.

    Returns:
        A line an operation, in the order of the first call: `rope_attention: eager (the input is on cpu, …)`.
    """
    with torch.no_grad(), _watch() as decisions:
        if isinstance(function, torch.nn.Module):
            buffers = {name: buffer.clone() for name, buffer in function.named_buffers()}
            torch.func.functional_call(function, buffers, inputs, keywords)
        else:
            function(*inputs, **keywords)
    counts: dict[Decision, int] = {}
    for decision in decisions:
        counts[decision] = counts.get(decision, 0) + 1
    lines = [f"{decision}" + (f" × {count}" if count > 1 else "") for decision, count in counts.items()]
    return "\n".join(lines) or "no fused operation is used"
