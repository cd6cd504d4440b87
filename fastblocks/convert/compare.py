"""Does a replacement compute what the original computes? Settings first, then numbers."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastblocks.convert.adapter import Call, Foreign, Refused

# Originals may round to float32 on the way (rotary positions, spectra): seen 2e-7. What has to be seen is larger: tanh
# instead of erf in a GELU 1e-4, another eps of a norm 1e-3 at the second of SCALES.
TOLERANCE = 1e-5
# Weights, biases and inputs. Small ones show what is added to a mean square, which hides beside a variance of 1.
SCALES = ((1.0, 0.3, 1.0), (0.03, 1e-3, 1e-3))
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def require_alike(original: nn.Module, replacement: nn.Module, calls: list[Call], new_keys: frozenset[str]) -> None:
    """Raise Foreign for another state_dict, Refused for any other difference that can be seen without computing."""
    name = f"fastblocks.{type(replacement).__name__}"
    if differing := _other_keys(original, replacement, new_keys):
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise Foreign(f"its state_dict is not that of {name}: {'; '.join(differing[:3])}{more}")
    if difference := (
        _other_buffers(original, replacement, new_keys)
        or _other_settings(original, replacement)
        or _other_signature(original, replacement, calls)
    ):
        raise Refused(difference)


def _other_keys(original: nn.Module, replacement: nn.Module, new_keys: frozenset[str]) -> list[str]:
    have, want = original.state_dict(keep_vars=True), replacement.state_dict(keep_vars=True)
    learnt = [set(dict(module.named_parameters(remove_duplicate=False))) for module in (original, replacement)]
    differing = []
    for key in sorted((have.keys() | want.keys()) - new_keys):
        if key not in have or key not in want:
            differing.append(f"'{key}' is {'not in it' if key in want else 'only in it'}")
        elif have[key].shape != want[key].shape:
            differing.append(f"'{key}' is {tuple(have[key].shape)}, not {tuple(want[key].shape)}")
        elif (key in learnt[0]) != (key in learnt[1]):
            differing.append(f"'{key}' is {'a parameter' if key in learnt[0] else 'a buffer'}")
    return differing


def _other_buffers(original: nn.Module, replacement: nn.Module, new_keys: frozenset[str]) -> str:
    """Buffers that the arguments decide; the vectors of spectral norm are learnt."""
    have, learnt = original.state_dict(keep_vars=True), dict(replacement.named_parameters(remove_duplicate=False))
    for key, want in replacement.state_dict(keep_vars=True).items():
        decided = key not in learnt and key not in new_keys and not key.endswith(("weight_u", "weight_v"))
        if decided and not _same(have[key], want):
            return f"its buffer '{key}' has other values than these arguments give"
    return ""


def _same(have: Tensor, want: Tensor) -> bool:
    """A buffer that the arguments decide: equal up to two roundings of its dtype."""
    if have.is_meta:
        return True
    if not have.is_floating_point():
        return torch.equal(have.cpu().to(want.dtype), want)
    eps = max(torch.finfo(have.dtype).eps, torch.finfo(want.dtype).eps)
    return torch.allclose(have.detach().cpu().double(), want.double(), rtol=2 * eps, atol=2 * eps)


def _other_settings(original: nn.Module, replacement: nn.Module) -> str:
    """What children say of themselves: strides, dilations, eps; and whatever would be lost."""
    twins = dict(replacement.named_modules())
    for path, child in original.named_modules():
        at, twin = f"'{path}'" if path else "it", twins.get(path)
        if "forward" in child.__dict__:
            return f"{at} has a forward of its own"
        if getattr(child, "_compiled_call_impl", None) is not None:
            return f"{at} was compiled in place; compile the converted model"
        if twin is None:
            if _foreign_hooks(child):
                return f"{at} has hooks, and fastblocks.{type(replacement).__name__} has no such child"
            continue
        theirs, ours = _torch_class(child), _torch_class(twin)
        said, wanted = ((cls, module.extra_repr()) for cls, module in ((theirs, child), (ours, twin)))
        if None not in (theirs, ours) and said != wanted:
            return f"{at} is {theirs.__name__}({said[1]}), not {ours.__name__}({wanted[1]})"
        eps = [getattr(module, "eps", None) for module in (child, twin)]
        if None not in eps and eps[0] != eps[1]:
            return f"{at} has eps={eps[0]}, not {eps[1]}"
    return ""


def _torch_class(module: nn.Module) -> type | None:
    """The class of torch.nn that a module is, or is derived from."""
    names = (cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.") and cls is not nn.Module)
    return next(names, None)


def _foreign_hooks(module: nn.Module) -> bool:
    hooks = [hook for name in HOOKS if isinstance(module.__dict__.get(name), dict) for hook in module.__dict__[name]]
    return bool(hooks)


def _other_signature(original: nn.Module, replacement: nn.Module, calls: list[Call]) -> str:
    for method, *_ in calls:
        both = (inspect.signature(getattr(module, method)).parameters.values() for module in (original, replacement))
        theirs, ours = ({p.name: p.kind for p in parameters} for parameters in both)
        if inspect.Parameter.VAR_KEYWORD in ours.values():
            continue
        theirs = [name for name, kind in theirs.items() if kind not in (2, 4)]
        if unknown := [name for name in theirs[1:] if name not in ours]:
            return f"its {method} also takes {', '.join(unknown)}"
    return ""


def compare(
    original: nn.Module, replacement: nn.Module, calls: list[Call], fixed: frozenset[str] = frozenset()
) -> float:
    """Run both in float64 on the CPU with the same random weights and inputs: training mode with gradients of the
    input at the first of SCALES, evaluation mode at the second. Parameters named `fixed` keep their values; dropout
    draws the same numbers in both.

    The original is copied; the replacement is used up: its parameters and buffers are left as they came out.

    Returns:
        The largest relative difference.

    Raises:
        Refused: if one is larger than TOLERANCE, or either does not run.
    """
    if any(tensor.is_meta for tensor in (*original.parameters(), *original.buffers())):
        raise Refused("it is on the meta device, where nothing can be compared; check=False swaps it as it is")
    try:
        twin = _twin(original)
    except Exception as problem:
        raise Refused(f"it cannot be copied to be compared: {_line(problem)}") from problem
    replacement.double().requires_grad_(False)
    worst = 0.0
    for train, (weights, biases, inputs) in zip((True, False), SCALES, strict=True):
        _randomize(twin, weights, biases, fixed)
        replacement.load_state_dict(twin.state_dict())
        for call in calls:
            theirs = _run("the original", twin.train(train), call, inputs)
            ours = _run("fastblocks' block", replacement.train(train), call, inputs)
            where = f"in {'training' if train else 'evaluation'} its {call[0]}"
            shapes = [[tuple(tensor.shape) for tensor in outcome] for outcome in (theirs, ours)]
            if shapes[0] != shapes[1]:
                raise Refused(f"{where} gives other shapes: {shapes[0][:3]}, not {shapes[1][:3]}")
            error = max(_error(got, want) for got, want in zip(ours, theirs, strict=True))
            if not error <= TOLERANCE:
                raise Refused(
                    f"{where} computes something else than fastblocks' block, as another eps, activation or formula "
                    f"does (relative difference {error:.1e})"
                )
            worst = max(worst, error)
    return worst


def _twin(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, without hooks but for those of norms."""
    memo: dict[int, object] = {}
    for child in module.modules():
        for name in HOOKS:
            hooks = child.__dict__.get(name)
            if isinstance(hooks, dict):
                norms = [(k, hook) for k, hook in hooks.items() if isinstance(hook, SpectralNorm | WeightNorm)]
                memo[id(hooks)] = OrderedDict(norms)
        for value in child.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a weight that a norm derived
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo).cpu().double().requires_grad_(False)


def _randomize(module: nn.Module, weights: float, biases: float, fixed: frozenset[str]) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    for name, parameter in module.named_parameters():
        if name in fixed:
            continue
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.rpartition(".")[2].startswith("bias"):
            value *= biases
        elif parameter.dim() > 1:
            value *= weights / max(1, parameter[0].numel()) ** 0.5
        else:  # scales of norms
            value = 1 + 0.3 * value
        parameter.data = value


def _run(who: str, module: nn.Module, call: Call, scale: float) -> list[Tensor]:
    """Outputs; in training mode the gradient of the input, too."""
    method, shape, *further = call
    named = further.pop() if further and isinstance(further[-1], dict) else {}
    generator = torch.Generator("cpu").manual_seed(1)
    x = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_(module.training)
    torch.default_generator.manual_seed(1)  # and no GPU's: those numbers are the caller's
    run = module if method == "forward" else getattr(module, method)  # as a module, so that hooks of norms run
    try:
        outputs = list(_tensors(run(x, *further, **named)))
        if not module.training:
            return outputs
        weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
        (grad,) = torch.autograd.grad(sum((out * w).sum() for out, w in zip(outputs, weights, strict=True)), x)
    except Exception as problem:
        raise Refused(f"{who} does not run {method} on {tuple(shape)}: {_line(problem)}") from problem
    return [*(out.detach() for out in outputs), grad]


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _error(got: Tensor, want: Tensor) -> float:
    scale = want.double().norm()
    return float((got.double() - want.double()).norm() / (scale if scale > 0 else 1))


def _line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:150]}"
