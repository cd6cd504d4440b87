"""`convert`: find blocks, read their arguments, build and compare replacements, then swap them all."""

import inspect
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from fastblocks.backend import decide, use_backend
from fastblocks.convert.adapter import Adapter, Arguments, Block, Foreign, Refused
from fastblocks.convert.adopt import adopt
from fastblocks.convert.compare import compare, require_alike
from fastblocks.convert.registry import adapter_of
from fastblocks.convert.report import ConversionReport, Row, remember
from fastblocks.eager.autocast import without_autocast

SKIPPED = "skip names it"


@dataclass
class _Plan:
    """What becomes of a block: a replacement, or a reason against it."""

    path: str
    module: nn.Module
    adapter: Adapter
    replacement: nn.Module | None = None
    reason: str = ""
    speed: str = ""  # why the replacement is no faster
    foreign: bool = False  # of another build: left alone without an error
    missing: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)  # of the caller

    @property
    def where(self) -> str:
        name = type(self.module).__name__
        return f"{name} at '{self.path}'" if self.path else name


def convert(
    model: nn.Module,
    arguments: dict[str, Arguments] | None = None,
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] | None = None,
    check: bool = True,
    strict: bool = True,
) -> nn.Module:
    """Replace every block of a model by this package's block of the same class name, in place.

    Parameters and buffers stay the objects they are, so optimizers and tied weights go on working; so do hooks, each
    child's train or eval mode and `requires_grad`. A block that has what its replacement cannot have is not swapped.
    Blocks of a known name and another build (HiFi-GAN's MultiPeriodDiscriminator) are left alone, with a reason in
    `fastblocks.conversion_report(model)`; they are an error only where `arguments` or `only` name them.

    Args:
        model: any module, a compiled one, too; if it is a block itself, use what is returned.
        arguments: constructor arguments that the blocks do not tell themselves, by class name or by path in the model
            (paths win): `{"RoFormerBlock": {"n_head": 4}}`.
        only: swap only these: class names, or paths of blocks or of what contains them.
        skip: leave these alone, and what is inside, named likewise.
        check: run each block and its replacement on small random inputs in float64, in training and evaluation mode,
            and swap only what agrees. Without it only shapes and settings are compared.
        strict: raise where a block looks like ours and cannot be swapped. False: leave it, and say why in the report.

    Returns:
        The model, or the new block where the model is one.

    Raises:
        ValueError: for missing, unknown and contradicting arguments, for names that the model does not have, and if
            strict for every block that cannot be swapped, all in one message. The model is unchanged then.
    """
    arguments = arguments or {}
    _require_known(model, {"arguments": arguments, "only": only or (), "skip": skip or ()})
    plans: dict[nn.Module, _Plan] = {}  # a block that stands in two places stays one
    places: list[tuple[str, nn.Module]] = []
    inside: list[str] = []  # what becomes of a block's children is its own affair
    rows: dict[str, Row] = {}
    for path, module, adapter in _find(model):
        if any(path.startswith(outer) for outer in inside):
            continue
        if reason := _left_out(path, module, only, skip):
            rows[path] = Row(path, type(module).__name__, False, reason)
            if reason == SKIPPED:
                inside.append(f"{path}." if path else "")
            continue
        places.append((path, module))
        if module not in plans:
            given = {**arguments.get(type(module).__name__, {}), **arguments.get(path, {})}
            plans[module] = _plan(_Plan(path, module, adapter), given, check)
        if not plans[module].foreign:
            inside.append(f"{path}." if path else "")
    _keep_what_is_held_elsewhere(model, plans)
    asked = {*arguments, *(only or ())}
    _raise_together(list(plans.values()), asked, strict)
    rows |= {path: _row(path, plans[module]) for path, module in places}
    order = [path for path, _ in model.named_modules(remove_duplicate=False) if path in rows]
    for module, plan in plans.items():
        if plan.replacement is not None:
            adopt(module, plan.replacement)
            plan.adapter.adopt(module, plan.replacement)
    result = model
    for path, module in places:
        if (replacement := plans[module].replacement) is not None:
            result = _put(model, path, replacement) if path else replacement
    remember(result, ConversionReport(tuple(rows[path] for path in order)))
    return result


def _row(path: str, plan: _Plan) -> Row:
    swapped = plan.replacement is not None
    return Row(path, type(plan.module).__name__, swapped, plan.reason, plan.speed if swapped else "")


def _names(path: str, module: nn.Module) -> set[str]:
    """Names that choose a module: its class, its path, and the paths of what contains it."""
    parts = path.split(".")
    return {type(module).__name__, *(".".join(parts[: n + 1]) for n in range(len(parts)))}


def _find(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Blocks of a known name, outer ones first; a block that stands in several places is found in each."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if (adapter := adapter_of(module)) is not None:
            yield path, module, adapter


def _left_out(path: str, module: nn.Module, only, skip) -> str:
    """Why a block is none of those that were asked for; empty if it is."""
    names = _names(path, module)
    if skip and names & set(skip):
        return SKIPPED
    return "" if only is None or names & set(only) else "only does not name it"


def _require_known(model: nn.Module, given: dict[str, Collection[str]]) -> None:
    for argument, names in given.items():
        if isinstance(names, str):
            raise ValueError(f"{argument} must be a collection of class names and paths, got the string {names!r}")
    modules = list(model.named_modules(remove_duplicate=False))
    known = {name for path, module in modules for name in (path, type(module).__name__)}
    blocks = {name for path, module in modules if adapter_of(module) for name in (path, type(module).__name__)}
    for argument, names in given.items():
        if unknown := set(names) - (blocks if argument == "arguments" else known):
            raise ValueError(f"{argument} names {sorted(unknown)}, but the model has no such block")


def _plan(plan: _Plan, given: Arguments, check: bool) -> _Plan:
    """Read, build and compare; the plan then has a replacement, or a reason."""
    adapter, block = plan.adapter, Block(plan.module, given)
    accepted = list(inspect.signature(adapter.block).parameters)
    if unknown := [name for name in given if name not in accepted]:
        plan.mistakes = [f"unknown arguments {unknown}; {adapter.block.__name__} takes {', '.join(accepted)}"]
        return plan
    try:
        plan.replacement, plan.reason, arguments = _replacement(adapter, block, check)
        plan.missing = block.missing
        if plan.replacement is not None:
            plan.speed = _no_gain(adapter, arguments, plan.module)
    except Foreign as difference:
        plan.reason, plan.foreign = str(difference), True
    except Refused as difference:
        plan.reason = str(difference)
    plan.mistakes = block.contradictions
    return plan


def _no_gain(adapter: Adapter, arguments: Arguments, module: nn.Module) -> str:
    """Why the replacement is no faster where the block is now; empty where it is."""
    tensor = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    if tensor is None or tensor.is_meta:
        return ""
    with use_backend("auto"):
        kernels = decide("convert", tensor, lambda: "")
    if tensor.is_cuda and not kernels:
        return "no kernel runs on this GPU in this dtype, and plain PyTorch may be slower than the original"
    return adapter.no_gain(arguments, kernels)


def _replacement(adapter: Adapter, block: Block, check: bool) -> tuple[nn.Module | None, str, Arguments]:
    """What takes the block's place, how they were compared, and the arguments it has; None where arguments are missing
    or contradict."""
    try:
        arguments = adapter.read(block)
    except (LookupError, AttributeError, TypeError, ValueError, StopIteration) as problem:
        raise Foreign(f"it is built in another way ({type(problem).__name__}: {problem})") from problem
    if block.missing or block.contradictions:
        return None, f"it does not tell {', '.join(block.missing)}", arguments
    calls = adapter.calls(arguments)
    with _as_if_alone():
        try:
            replacement = adapter.block(**arguments)
        except ValueError as refusal:
            raise Refused(str(refusal)) from refusal
        require_alike(block.module, replacement, calls, adapter.new_keys)
        if adapter.changes:
            return replacement, adapter.changes, arguments
        adapter.adopt(block.module, replacement)
        how = "not compared"
        if check:
            how = f"agrees to {compare(block.module, replacement, calls, adapter.fixed):.0e}"
        _empty(replacement)
    return replacement, how, arguments


def _keep_what_is_held_elsewhere(model: nn.Module, plans: dict[nn.Module, _Plan]) -> None:
    """A list or an attribute that holds a block beside the tree of modules would go on with the original."""
    for path, holder in model.named_modules():
        for name, value in holder.__dict__.items():
            values = list(value.values()) if isinstance(value, dict) else value
            for held in (values if isinstance(values, list | tuple) else [values]) if name != "_modules" else ():
                plan = plans.get(held) if isinstance(held, nn.Module) else None
                where = f"'{path}'" if path else "the model"
                if plan is not None and plan.replacement is not None and holder not in set(held.modules()):
                    plan.replacement, plan.reason = None, f"{where} holds it in its attribute {name}, too"


@contextmanager
def _as_if_alone() -> Iterator[None]:
    """Whatever mode the caller is in; its random numbers stay untouched."""
    cpu = torch.device("cpu")
    with ExitStack() as stack:
        for context in (torch.random.fork_rng(devices=[]), cpu, torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(context)
        stack.enter_context(without_autocast(cpu))
        stack.enter_context(use_backend("eager"))
        yield


def _empty(replacement: nn.Module) -> None:
    """Give back the memory of weights that adoption puts others in place of."""
    replacement.to("meta")
    for child in replacement.modules():
        for name, value in child.__dict__.items():
            if isinstance(value, torch.Tensor):  # a weight that a norm derived
                child.__dict__[name] = value.detach().to("meta")


def _raise_together(plans: list[_Plan], asked: set[str], strict: bool) -> None:
    """One ValueError for everything that keeps the model from being converted."""
    lines = [f"{plan.where}: {mistake}" for plan in plans for mistake in plan.mistakes]
    if strict:
        for plan in plans:
            wanted = not plan.foreign or asked & {plan.path, type(plan.module).__name__}
            if plan.replacement is None and not plan.mistakes and not plan.missing and wanted:
                lines.append(f"{plan.where}: {plan.reason}")
        if missing := [plan for plan in plans if plan.missing]:
            lines.append(_question(missing))
    if lines:
        more = "" if not strict else "\n(skip=… leaves blocks alone, strict=False all that cannot be swapped)"
        raise ValueError("the model is unchanged:\n" + "\n".join(lines) + more)


def _question(plans: list[_Plan]) -> str:
    """Asks for all arguments at once, by class name."""
    wanted: dict[str, list[str]] = {}
    for plan in plans:
        known = wanted.setdefault(type(plan.module).__name__, [])
        known += [name for name in plan.missing if name not in known]
    entries = ", ".join(f"'{name}': {{{', '.join(f'{a!r}: …' for a in names)}}}" for name, names in wanted.items())
    where = ", ".join(plan.where for plan in plans)
    return f"cannot tell all arguments of {where}; pass arguments={{{entries}}} (or the same by path)"


def _put(model: nn.Module, path: str, block: nn.Module) -> nn.Module:
    parent, _, child = path.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, child, block)
    if type(holder).__name__ == "OptimizedModule":  # torch.compile's: it holds the call of what it was made of
        holder._initialize()
    return model
