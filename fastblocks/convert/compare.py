"""Does a replacement compute what the original computes? Settings first, then numbers."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from fastblocks.convert.adapter import Call

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


def unlike(original: nn.Module, replacement: nn.Module, calls: list[Call], new_keys: frozenset[str]) -> str:
    """The first difference that can be seen without computing; empty if there is none."""
    return (
        _other_state(original, replacement, new_keys)
        or _other_settings(original, replacement)
        or _other_signature(original, replacement, calls)
    )


def _other_state(original: nn.Module, replacement: nn.Module, new_keys: frozenset[str]) -> str:
    have, want = original.state_dict(keep_vars=True), replacement.state_dict(keep_vars=True)
    parameters = [set(dict(module.named_parameters(remove_duplicate=False))) for module in (original, replacement)]
    differing = []
    for key in sorted((have.keys() | want.keys()) - new_keys):
        if key not in have or key not in want:
            differing.append(f"'{key}' is {'not in it' if key in want else 'only in it'}")
        elif have[key].shape != want[key].shape:
            differing.append(f"'{key}' is {tuple(have[key].shape)}, not {tuple(want[key].shape)}")
        elif (key in parameters[0]) != (key in parameters[1]):
            differing.append(f"'{key}' is {'a parameter' if key in parameters[0] else 'a buffer'}")
        elif key.endswith(("weight_u", "weight_v")) or key in parameters[1]:
            continue  # learnt
        elif not _same(have[key], want[key]):
            differing.append(f"'{key}' has other values")
    if not differing:
        return ""
    name = type(replacement).__name__
    return f"its state_dict is not that of fastblocks.{name}: {'; '.join(differing[:3])}" + (
        f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    )


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
        theirs, ours = (
            [p.name for p in inspect.signature(getattr(module, method)).parameters.values() if p.kind not in (2, 4)]
            for module in (original, replacement)
        )
        if unknown := [name for name in theirs[1:] if name not in ours]:
            return f"its {method} also takes {', '.join(unknown)}"
    return ""


def disagreement(original: nn.Module, replacement: nn.Module, calls: list[Call]) -> tuple[str, float]:
    """Run both in float64 on the CPU with the same random weights and inputs: training mode with gradients of the
    input at the first of SCALES, evaluation mode at the second.

    The original is copied; the replacement is used up: its parameters and buffers are left as they came out.

    Returns:
        What is different, empty if nothing is; and the largest relative error.
    """
    if any(tensor.is_meta for tensor in (*original.parameters(), *original.buffers())):
        return "it is on the meta device, where nothing can be compared", 0.0
    try:
        twin = _twin(original)
    except Exception as problem:
        return f"it cannot be copied to be compared: {_line(problem)}", 0.0
    replacement.double().requires_grad_(False)
    worst = 0.0
    for train, (weights, biases, inputs) in zip((True, False), SCALES, strict=True):
        _randomize(twin, weights, biases)
        replacement.load_state_dict(twin.state_dict())
        for call in calls:
            outcomes = []
            for who, module in (("the original", twin), ("fastblocks' block", replacement)):
                try:
                    outcomes.append(_run(module.train(train), call, inputs, train))
                except Exception as problem:
                    return f"{who} does not run {call[0]} on {call[1]}: {_line(problem)}", 0.0
            mode = "training" if train else "evaluation"
            shapes = [[tuple(tensor.shape) for tensor in outcome] for outcome in outcomes]
            if shapes[0] != shapes[1]:
                return f"in {mode} its {call[0]} gives other shapes: {shapes[0][:3]}, not {shapes[1][:3]}", 0.0
            error = max(_error(ours, theirs) for theirs, ours in zip(*outcomes, strict=True))
            if not error <= TOLERANCE:
                return f"in {mode} its {call[0]} computes something else (relative difference {error:.1e})", error
            worst = max(worst, error)
    return "", worst


def _twin(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, without hooks but for spectral norm's."""
    memo: dict[int, object] = {}
    for child in module.modules():
        for name in HOOKS:
            hooks = child.__dict__.get(name)
            if isinstance(hooks, dict):
                spectral = [(k, hook) for k, hook in hooks.items() if isinstance(hook, SpectralNorm)]
                memo[id(hooks)] = OrderedDict(spectral)
        for value in child.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a weight that spectral norm derived
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo).cpu().double().requires_grad_(False)


def _randomize(module: nn.Module, weights: float, biases: float) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.rpartition(".")[2].startswith("bias"):
            value *= biases
        elif parameter.dim() > 1:
            value *= weights / max(1, parameter[0].numel()) ** 0.5
        else:  # scales of norms
            value = 1 + 0.3 * value
        parameter.data = value


def _run(module: nn.Module, call: Call, scale: float, gradient: bool) -> list[Tensor]:
    """Outputs, and the gradient of the input."""
    method, shape, *further = call
    generator = torch.Generator("cpu").manual_seed(1)
    x = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_(gradient)
    # called as a module, so that spectral norm's hooks run
    outputs = list(_tensors((module if method == "forward" else getattr(module, method))(x, *further)))
    if not gradient:
        return outputs
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    (grad,) = torch.autograd.grad(sum((out * w).sum() for out, w in zip(outputs, weights, strict=True)), x)
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
