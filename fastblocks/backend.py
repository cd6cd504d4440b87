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
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
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


_initial = _validated(os.environ.get("FASTBLOCKS_BACKEND", "auto"), "FASTBLOCKS_BACKEND")
_of_process: "list[use_backend]" = []  # process-wide selections; the last one counts
_of_block: ContextVar[tuple[str, ...]] = ContextVar("fastblocks_backend", default=())  # innermost last
_traced = threading.local()  # a copy for traced code: torch.compile can neither trace nor guard a ContextVar
_decisions: "ContextVar[list[Decision] | None]" = ContextVar("fastblocks_decisions", default=None)  # of `explain`


def selected() -> str:
    """The backend that is in force here: of the innermost `with` block, else of the process."""
    blocks = getattr(_traced, "blocks", ()) if torch.compiler.is_compiling() else _of_block.get()
    if blocks:
        return blocks[-1]
    return _of_process[-1].name if _of_process else _initial


def _set_blocks(blocks: tuple[str, ...]) -> None:
    if not torch.compiler.is_compiling():
        _of_block.set(blocks)
    _traced.blocks = blocks


@dataclass(frozen=True)
class Decision:
    """Who runs one call of `operation`; `reason` says why it is not Triton and is empty when it is."""

    operation: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.backend}" + (f" ({self.reason})" if self.reason else "")


class use_backend(ContextDecorator):
    """Select who runs the operations: of the process from here on, or of a `with` block or a decorated function.

    A block counts in its own thread (or asynchronous task) and in the backward passes that it starts; other threads do
    not see it.

    Args:
        name: `"auto"` (Triton wherever it can run, the default), `"triton"` (the same, but an error where Triton
            cannot run at all) or `"eager"` (PyTorch only).

    Raises:
        ValueError: if the name is none of these.

    Example::

        use_backend("eager")            # all threads, from here on
        with use_backend("triton"):     # for this block
            y = block(x)

        @use_backend("eager")           # for each call
        def reference(x): ...
    """

    def __init__(self, name: str):
        self.name = _validated(name, "backend")
        _of_process.append(self)  # undone if it turns out to be meant for a block

    def _only_for_a_block(self) -> None:
        if self in _of_process:
            _of_process.remove(self)

    def __enter__(self) -> "use_backend":
        self._only_for_a_block()
        _set_blocks((*_of_block.get(), self.name))
        return self

    def __exit__(self, *exception) -> None:
        _set_blocks(_of_block.get()[:-1])

    def __call__(self, function: Callable) -> Callable:
        self._only_for_a_block()
        return super().__call__(function)

    def __repr__(self) -> str:
        return f"use_backend({self.name!r})"


@cache
def _kernel_runtime() -> "tuple[ModuleType | None, str]":
    """The kernels' runtime and an empty string, or None and why there is none."""
    try:
        from fastblocks.kernels import runtime
    except ImportError as problem:
        if (problem.name or "").startswith("fastblocks"):  # a part of fastblocks is missing, not Triton
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
    _note(Decision(operation, "eager" if reason else "triton", reason))
    return not reason


def traced_reason() -> str:
    """Why kernels that read addresses, which a compiler cannot follow, leave a call to it; empty outside of one."""
    return "torch.compile traces the plain formula" if torch.compiler.is_compiling() else ""


def declined(operation: str, reason: str) -> None:
    """Tell `explain` that a module did without a fused operation, and why."""
    _note(Decision(operation, "eager", reason))


def _note(decision: Decision) -> None:
    if not torch.compiler.is_compiling() and (decisions := _decisions.get()) is not None:
        decisions.append(decision)


def _reason_against(operation: str, tensor: torch.Tensor, unsupported_reason: Callable[[], str] | None) -> str:
    backend = selected()
    if backend == "eager":
        return "the backend 'eager' is selected"
    if backend == "auto" and not tensor.is_cuda:  # the common case on a CPU, before anything is imported
        return f"the input is on {tensor.device.type}, Triton needs a GPU"
    runtime, problem = _kernel_runtime()
    problem = problem or runtime.unsupported_reason(tensor.device)
    if problem:
        if backend == "triton":
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
    token = _decisions.set([])
    try:
        yield _decisions.get()
    finally:
        _decisions.reset(token)


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
