"""How a module is held against its reference: random weights, forward, and every gradient."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tests.compare import FACTOR, ROUNDING, assert_close, relative_error

# A float64 module shares formulas with its reference or it does not: six digits are left for badly conditioned inputs.
EXACT = 1e-10


def randomized(module: nn.Module) -> nn.Module:
    """Weights of a size that keeps signals near 1, scales around 1, and biases that show."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith(("scale", "norm.weight")):
                parameter.normal_(1.0, 0.3)
            else:
                fan = parameter[0].numel() if parameter.dim() > 1 else 4
                parameter.normal_(std=max(1, fan) ** -0.5)
    return module


def tensors(value) -> Iterator[Tensor]:
    """The tensors of nested lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from tensors(item)


def state_of(module: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A detached copy of the state_dict in `dtype`; parameters ask for gradients."""
    parameters = dict(module.named_parameters())
    state = {}
    for name, value in module.state_dict().items():
        value = value.detach().clone()
        value = value.to(dtype) if value.is_floating_point() else value
        state[name] = value.requires_grad_(name in parameters)
    return state


def results(outputs, leaves: dict[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradient of every leaf (zeros where it has no influence), by name."""
    outputs = list(tensors(outputs))
    cotangents = [c.to(out.dtype) for c, out in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, materialize_grads=True)
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def both(module: nn.Module, reference: Callable, inputs: tuple, call: Callable | None, dtype: torch.dtype):
    """Results of the module as it is, and of the reference in `dtype`, for the same random cotangents."""
    state = state_of(module, dtype)
    inexact = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().to(dtype).requires_grad_() for x in inputs]
    got, want = (call or module)(*inexact), reference(state, *exact)
    cotangents = [torch.randn_like(out).to(torch.bfloat16) for out in tensors(got)]  # the same number in every dtype
    names = [f"input {i}" for i in range(len(inputs))]
    parameters = dict(module.named_parameters())
    return (
        results(got, dict(zip(names, inexact, strict=True)) | parameters, cotangents),
        results(want, dict(zip(names, exact, strict=True)) | {n: state[n] for n in parameters}, cotangents),
    )


def check(
    module: nn.Module,
    reference: Callable,
    *inputs: Tensor,
    terms: int,
    call: Callable | None = None,
    jointly: bool = False,
) -> None:
    """Forward and every gradient of `module(*inputs)` against `reference(state, *inputs)` in float64.

    terms: the longest sum of products on the way, forward or backward. Float64 modules are held to EXACT instead.
    jointly: hold all gradients as one vector. For widths of one or two, where a single gradient may happen to cancel
        to nearly nothing, and its rounding does not.
    """
    got, want = both(module, reference, inputs, call, torch.float64)
    if jointly and got["output 0"].dtype != torch.float64:
        got, want = joined(got), joined(want)
    for what, value in got.items():
        if value.dtype == torch.float64:
            error = relative_error(value, want[what]) if want[what].norm() > 1e-12 else float(value.norm())
            assert error <= EXACT, f"{what}: error {error:.2e}"
        else:
            assert_close(value, want[what], terms, what)


def joined(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """All gradients as one vector."""
    gradients = [value.flatten() for what, value in values.items() if what.startswith("gradient")]
    outputs = {what: value for what, value in values.items() if not what.startswith("gradient")}
    return outputs | {"all gradients": torch.cat(gradients)}


def check_low_precision(
    module: nn.Module, reference: Callable, *inputs: Tensor, dtype: torch.dtype, call=None, layers: int = 0
) -> None:
    """The module's error against float64 is at most FACTOR times that of the plain formulas computed in `dtype`.

    layers: convolutions with spectral norm in a row. The roundings of a layer's weight, its norm, the quotient and the
    output hit all of its elements alike, in the module and in the plain formulas by different luck: four a layer.
    """
    got, naive = both(module, reference, inputs, call, dtype)
    state = state_of(module)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = list(tensors(reference(state, *exact)))
    for i, value in enumerate(want):
        what = f"output {i}"
        error = relative_error(got[what], value)
        allowed = FACTOR * relative_error(naive[what], value) + (1 + 4 * layers) * ROUNDING[dtype]
        assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"
    for what, value in got.items():
        assert value.isfinite().all(), f"{what} is not finite"


def functional(module: nn.Module, keywords: dict | None = None) -> tuple[Callable, list[Tensor]]:
    """`f(x, *parameters)` and the parameters, for checks by finite differences."""
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *values: Tensor):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,), keywords)

    return call, [p.detach().clone().requires_grad_() for p in module.parameters()]
