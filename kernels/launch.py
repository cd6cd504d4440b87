"""Every kernel is launched here: by keyword, on the tensors' device, and cached once compiled.

Triton's `kernel[grid](…)` binds and specialises its arguments in Python at every call, 10 µs with 21 arguments. Here a
compiled kernel is cached by what Triton specialises on (dtypes, 16-byte alignment of pointers, 1 and multiples of 16
among integers, constexprs), so that a second launch only looks it up and calls `compiled[grid](…)`, Triton's documented
way. Where Triton's own launcher is replaced (by its interpreter, a fault checker, a profiler that patches it), and on
AMD, whose compiler specialises on more, it is plain `kernel[grid](…)`.

`recording` makes the same launchers record what they would launch, on meta tensors, for reports that need no GPU.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.runtime import triton

__all__ = ["CompileCase", "LaunchConfig", "Prepared", "config", "launch", "recording"]


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched. `blocks` holds constexprs by name (tile sizes above all), sorted."""

    num_warps: int
    num_stages: int = 1
    blocks: tuple[tuple[str, object], ...] = ()
    _by_name: dict = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_by_name", dict(self.blocks))
        object.__setattr__(self, "_hash", hash((self.num_warps, self.num_stages, self.blocks)))

    def __hash__(self) -> int:
        return self._hash

    def __getitem__(self, name: str):
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def with_(self, **constants) -> "LaunchConfig":
        """A copy with constexprs added or replaced."""
        return config(self.num_warps, self.num_stages, **(self._by_name | constants))

    def keywords(self) -> dict:
        """Everything as keyword arguments of `kernel[grid](…)`."""
        return {**self._by_name, "num_warps": self.num_warps, "num_stages": self.num_stages}


def config(num_warps: int, num_stages: int = 1, **blocks) -> LaunchConfig:
    """A LaunchConfig from keywords: `config(4, 2, BLOCK_M=64)`."""
    return LaunchConfig(num_warps, num_stages, tuple(sorted(blocks.items())))


def launch(kernel, grid: tuple[int, ...], config: LaunchConfig, like: Tensor, **arguments) -> None:
    """Launch a `@triton.jit` kernel on the device of `like` and its current stream.

    Args:
        kernel: the `@triton.jit` function.
        grid: number of programs, in 1 to 3 dimensions.
        config: warps, stages and constexprs.
        like: a tensor on the device to launch on.
        **arguments: all other arguments of the kernel, by name; None for pointers that it does not use.
    """
    if _listener is not None:
        _listener(kernel, grid, config, arguments)
    elif runtime.INTERPRETED:
        kernel[grid](**arguments, **config.keywords())
    elif like.get_device() == torch.cuda.current_device():
        _launch_here(kernel, grid, config, arguments)
    else:
        with torch.cuda.device(like.device):
            _launch_here(kernel, grid, config, arguments)


class Prepared:
    """A launch of which everything but the tensors is known: nothing else is bound and looked at anew at a call.

    Args:
        kernel, grid, config: as of `launch`.
        **numbers: all arguments of the kernel that are not pointers, by name.
    """

    def __init__(self, kernel, grid: tuple[int, ...], config: LaunchConfig, **numbers):
        self._launch, self._numbers = (kernel, grid, config), numbers
        self._grid = (*grid, 1, 1)
        self._bind: Callable | None = None
        self._held: dict[tuple, object] = {}

    def __call__(self, like: Tensor, **pointers) -> None:
        """Launch on the device of `like`; pointers by name, None for those that the kernel does not use."""
        kernel, grid, config = self._launch
        if (
            _listener is not None
            or runtime.INTERPRETED
            or runtime.HIP
            or (device := like.get_device()) != torch.cuda.current_device()
            or not _is_tritons_own_launcher(kernel)
        ):
            launch(kernel, grid, config, like=like, **self._numbers, **pointers)
            return
        bind = self._bind
        if bind is None:
            bind = self._bind = _binder(kernel, pointers, self._numbers | config._by_name)
        key, values = bind(device, **pointers)
        compiled = self._held.get(key)
        if compiled is not None:
            compiled[self._grid](*values)
            return
        compiled = _launch_here(kernel, grid, config, self._numbers | pointers)
        if compiled is not None:
            self._held[key] = compiled


_held: dict[tuple, object] = {}
_binders: dict[int, Callable] = {}  # by id: kernels live as long as their modules, and hashing one reads its source
_makers: dict[tuple, Callable] = {}


def _launch_here(kernel, grid, config, arguments) -> object:
    """Returns the compiled kernel if it is held now, else None."""
    if runtime.HIP or not _is_tritons_own_launcher(kernel):
        kernel[grid](**arguments, **config.keywords())
        return None
    bind = _binders.get(id(kernel))
    if bind is None:
        bind = _binders[id(kernel)] = _binder(kernel, arguments)
    key, values = bind(torch.cuda.current_device(), **arguments, **config._by_name)
    key = (id(kernel), config.num_warps, config.num_stages, *key)
    compiled = _held.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)](*values)
        return compiled
    compiled = kernel[grid](**arguments, **config.keywords())
    if not hasattr(compiled, "packed_metadata"):  # a future: Triton may compile in the background
        return None
    _held[key] = compiled
    return compiled


_seen_run: object = None
_is_own: bool = False


def _is_tritons_own_launcher(kernel) -> bool:
    """Whether `kernel[grid]` runs Triton's own launcher: neither replaced, wrapped nor hooked."""
    global _seen_run, _is_own
    run = type(kernel).run
    if run is not _seen_run:
        _seen_run = run
        _is_own = run.__code__.co_filename == triton.runtime.jit.__file__
    return _is_own and not kernel.pre_run_hooks


def _binder(kernel, arguments: dict, known: dict | None = None) -> Callable:
    """Returns a function of the device's index and the kernel's arguments, but for those that are known. It gives what
    Triton specialises on, and all arguments in the kernel's order."""
    known = known or {}
    which = (id(kernel), *known)
    if which not in _makers:
        _makers[which] = _maker(kernel, arguments, known)
    return _makers[which](**known)


def _maker(kernel, arguments: dict, known: Iterable[str]) -> Callable:
    """Generated as source with one expression per argument: a Python loop over 30 of them takes longer than the
    launch."""
    key = ["device"]
    for parameter in kernel.params:
        name = parameter.name
        if name in known:
            continue
        if parameter.is_constexpr:
            key.append(name)
        elif name.endswith("_ptr"):
            key += [f"{name} is None or {name}.dtype", f"{name} is None or {name}.data_ptr() % 16 == 0"]
        elif isinstance(arguments[name], int):
            if not parameter.do_not_specialize:
                key += [f"{name} == 1", f"{name} % 16 == 0"]
            key.append(f"{name} >= 2147483648")
        elif not isinstance(arguments[name], float):
            raise TypeError(f"{kernel.fn.__name__}: {name} is a {type(arguments[name]).__name__}, not a number")
    given = ", ".join(name for name in kernel.arg_names if name not in known)
    bind = f"lambda device, {given}: (({', '.join(key)},), ({', '.join(kernel.arg_names)},))"
    return eval(f"lambda {', '.join(known)}: {bind}")


# ---- recording of launches -------------------------------------------------------------------------------------------

_listener: Callable | None = None
_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


@dataclass(frozen=True)
class CompileCase:
    """One kernel as one launch compiles it."""

    label: str
    kernel: object  # the @triton.jit function
    signature: dict[str, str]
    constants: dict[str, object]
    config: LaunchConfig
    divisible: tuple[str, ...] = ()  # arguments that are multiples of 16 (pointers: 16-byte aligned)
    grid: tuple[int, ...] = field(default=(), compare=False)


def case_of(label: str, kernel, grid: tuple[int, ...], config: LaunchConfig, arguments: dict) -> CompileCase:
    """What Triton compiles for a launch with these arguments; tensors may be on the device "meta"."""
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name = parameter.name
        value = arguments[name] if name in arguments else config[name]
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(name)
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if value >= 2**31 else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(name)
    return CompileCase(label, kernel, signature, constants, config, tuple(divisible), grid)


@contextmanager
def recording(architecture: str, label: str = "") -> Iterator[list[CompileCase]]:
    """Inside it nothing is launched: the list collects what would be launched on a GPU of that architecture.

    Args:
        architecture: as `runtime.architecture` names one, such as "sm_90".
        label: prefix of the kernel's name in every case.
    """
    global _listener
    cases: list[CompileCase] = []

    def note(kernel, grid, config, arguments) -> None:
        name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
        cases.append(case_of(f"{label}: {name}" if label else name, kernel, grid, config, arguments))

    previous, _listener = _listener, note
    try:
        with runtime.pretending(architecture):
            yield cases
    finally:
        _listener = previous
