"""What an adapter is, and what it reads a block with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Arguments = dict[str, Any]
Call = tuple  # (method, shape of its first argument, *further arguments); a dict at the end holds keywords
_REQUIRED = object()


class Foreign(Exception):
    """A block of a known name and another build; the message says what is different."""


class Refused(Exception):
    """A block that looks like ours and cannot be swapped as it is; the message says why, or asks for a decision."""


@dataclass(frozen=True)
class Adapter:
    """How blocks of one class are swapped.

    Args:
        block: the class that takes the place.
        read: constructor arguments of a block; raises Foreign, Refused.
        calls: how a block with these arguments is called, for the comparison.
        claims: whether a module of the name is of this adapter's kind, where there is more than one.
        adopt: moves what is no parameter and no persistent buffer: called with the original and its replacement.
        changes: how the replacement computes something else on purpose; it is not compared then.
        new_keys: keys of its state_dict that the original does not have.
        fixed: parameters that keep their values in the comparison.
        no_gain: why a block with these arguments is about as fast as its original; empty where it is faster. The second
            argument says whether kernels run where the block is.
    """

    block: type[nn.Module]
    read: Callable[["Block"], Arguments]
    calls: Callable[[Arguments], list[Call]]
    claims: Callable[[nn.Module], bool] = lambda module: True
    adopt: Callable[[nn.Module, nn.Module], None] = lambda original, replacement: None
    changes: str = ""
    new_keys: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    no_gain: Callable[[Arguments, bool], str] = lambda arguments, kernels: ""


def torch_computes(what: str, *, with_kernels: bool = False) -> Callable[[Arguments, bool], str]:
    """For `Adapter.no_gain`: PyTorch does most of the work in original and replacement, on a CPU or everywhere."""
    text = f"PyTorch's own {what} do most of the work in both"
    return lambda arguments, kernels: text if with_kernels or not kernels else ""


class Block:
    """A block, and what the caller says about it. Collects what is missing and what contradicts, for one message."""

    def __init__(self, module: nn.Module, given: Arguments):
        self.module, self.given = module, given
        self.state: dict[str, Tensor] = module.state_dict(keep_vars=True)
        self.missing: list[str] = []
        self.contradictions: list[str] = []

    def shape(self, key: str) -> torch.Size:
        """The shape of an entry of the state_dict."""
        if key not in self.state:
            raise Foreign(f"it is built in another way: its state_dict has no '{key}'")
        return self.state[key].shape

    def says(self, argument: str, value: Any) -> Any:
        """An argument that the block tells; another value for it is refused."""
        if argument in self.given and _plain(self.given[argument]) != _plain(value):
            self.contradictions.append(f"{argument}={self.given[argument]!r} is given, the block has {value!r}")
        return value

    def attribute(self, argument: str, *synonyms: str, holders: tuple[nn.Module, ...] = (), default: Any = _REQUIRED):
        """An argument from an attribute of the block or of `holders`; else as given; else the default, or missing."""
        for holder in (self.module, *holders):
            for name in (argument, *synonyms):
                value = getattr(holder, name, None)
                if value is not None and not isinstance(value, Tensor | nn.Module) and not callable(value):
                    return self.says(argument, value)
        if argument not in self.given and default is _REQUIRED:
            self.missing.append(argument)
        return self.given.get(argument, default)

    def each(self, argument: str, modules: nn.ModuleList, *names: str) -> list | None:
        """An argument with an entry a sub-module, from an attribute of the block or one of each of these."""
        if isinstance(getattr(self.module, argument, None), list | tuple):
            return self.says(argument, list(getattr(self.module, argument)))
        for name in names:
            values = [getattr(module, name, None) for module in modules]
            if values and None not in values:
                return self.says(argument, values)
        return self.attribute(argument)


def _plain(value: Any) -> Any:
    """Lists as tuples, (7,) as 7, so that ways to write an argument are equal."""
    if isinstance(value, list | tuple):
        parts = tuple(_plain(part) for part in value)
        return parts[0] if len(parts) and len(set(map(repr, parts))) == 1 else parts
    return value
