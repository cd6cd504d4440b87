"""What holds for every module: shapes on the meta device, sequences without a step, dtypes under autocast."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fastblocks
from benchmarks import original
from tests.compare import relative_error
from tests.modules.harness import randomized, tensors


@dataclass(frozen=True)
class Case:
    """A module of either kit, what it is called with, and the dimensions of the input that may have any length."""

    name: str
    make: Callable[..., nn.Module]  # of the kit
    shape: tuple[int, ...]
    lengths: tuple[int, ...]
    call: Callable = lambda module, x: module(x)
    like: Callable[..., nn.Module] | None = None  # of the kit, if the original's dtypes are those of another one

    def module(self, kit=fastblocks) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # bands without a bin
            return self.make(kit)


def block(name: str, *arguments, **keywords) -> Callable:
    return lambda kit: getattr(kit, name)(*arguments, **keywords)


TOKENS = (2, 9, 16)
MODULES = [
    Case("roformer", block("RoFormerBlock", 16, 2, 12), TOKENS, (1,)),
    Case("window", block("AttentionRegisterRoFormerBlock", 16, 2, 12, window_size=3), TOKENS, (1,)),
    Case(
        "registers",
        block("AttentionRegisterRoFormerBlock", 16, 2, 12, num_register_tokens=2, window_size=3),
        TOKENS,
        (1,),
        lambda module, x: module(x, return_registers=True),
    ),
    # PyTorch's autocast leaves torch.gru alone on a CPU, and only there: for dtypes its LSTM stands in.
    *(
        Case(
            f"{kind}{'-both' if both else ''}",
            block("RNNBlock", 16, 2, groups, kind, both),
            TOKENS,
            (1,),
            like=block("RNNBlock", 16, 2, groups, "lstm", both),
        )
        for kind in ("gru", "lstm")
        for both, groups in ((False, 1), (True, 2))
    ),
    *(
        Case(
            f"{kind}-alone",
            lambda kit, kind=kind: block("RNNBlock", 16, 1, 2, kind)(kit).rnn,
            TOKENS,
            (1,),
            like=lambda kit: block("RNNBlock", 16, 1, 2, "lstm")(kit).rnn,
        )
        for kind in ("gru", "lstm")
    ),
    *(
        Case(
            f"convnext{spatial}d-{variant}-{mode}-{stride}",
            block(f"ConvNeXt{spatial}DBlock", 3, stride, 6, 6, mode, variant=variant),
            (2, 6, 7, 5)[: spatial + 2],
            tuple(range(2, spatial + 2)),
        )
        for spatial in (1, 2)
        for variant in ("convnext", "msrkit")
        for mode, stride in (("normal", 1), ("normal", 2), ("transposed", 2))
    ),
    Case("stft", block("Fourier", 32, 8), (2, 100), (1,), lambda module, x: module.stft(x)),
    Case("istft", block("Fourier", 32, 8), (2, 17, 13, 2), (2,), lambda module, x: module.istft(x, 100)),
    Case("split", block("Band", 8000, 64, 9, 2, 5), (2, 33, 3, 2), (2,), lambda module, x: module.split(x)),
    Case(
        "split-empty-bands", block("Band", 8000, 32, 20, 2, 5), (2, 17, 3, 2), (2,), lambda module, x: module.split(x)
    ),
    Case("unsplit", block("Band", 8000, 64, 9, 2, 5), (2, 5, 3, 9), (2,), lambda module, x: module.unsplit(x)),
    Case("period", block("MultiPeriodDiscriminator", periods=[3]), (2, 1, 100), (2,)),
    Case("scale", block("MultiScaleDiscriminator", 48000, [1, 2]), (2, 1, 300), (2,)),
    Case(
        "resolution",
        block("MultiResolutionDiscriminator", 2, window_lengths=[64], hidden_channels=4),
        (2, 2, 200),
        (2,),
    ),
    Case("frequency", block("MultiFrequencyDiscriminator", 1, [64], hidden_channels=2), (2, 1, 200), (2,)),
]

every_module = pytest.mark.parametrize("case", MODULES, ids=lambda case: case.name)


def shapes(outputs) -> list[tuple[int, ...]]:
    return [tuple(out.shape) for out in tensors(outputs)]


# --- the meta device


@every_module
@pytest.mark.parametrize("how", ["built there", "moved there"])
def test_forward_and_backward_on_meta(case, how):
    if how == "built there":
        with torch.device("meta"):
            module = case.module()
    else:
        module = case.module().to("meta")
    x = torch.empty(case.shape, device="meta", requires_grad=True)
    outputs = list(tensors(case.call(module, x)))
    assert shapes(outputs) == shapes(case.call(case.module(), torch.randn(case.shape)))
    assert all(out.is_meta for out in outputs)
    gradients = torch.autograd.grad(outputs, [x, *module.parameters()], outputs, allow_unused=True)
    assert gradients[0].shape == x.shape and gradients[0].is_meta
    for parameter, gradient in zip(module.parameters(), gradients[1:], strict=True):
        assert gradient is None or gradient.shape == parameter.shape


def emptied(module: nn.Module, state: dict) -> None:
    module.to_empty(device="cpu").load_state_dict(state, strict=True)


def assigned(module: nn.Module, state: dict) -> None:
    module.load_state_dict(state, strict=True, assign=True)


@every_module
@pytest.mark.parametrize("fill", [emptied, assigned])
def test_built_on_meta_and_filled_from_a_checkpoint(case, fill, poison):
    module, x = randomized(case.module()).eval(), torch.randn(case.shape)
    with torch.device("meta"):
        twin = case.module().eval()
    fill(twin, module.state_dict())
    for got, want in zip(tensors(case.call(twin, x)), tensors(case.call(module, x)), strict=True):
        assert torch.equal(got, want)


# --- no step at all


@pytest.mark.parametrize(
    "case, dim",
    [(case, dim) for case in MODULES for dim in case.lengths],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_length_of_zero_works_or_is_refused(case, dim):
    """An output without an element, a gradient, and nothing that is not a number; or an error that names the zero."""
    module = randomized(case.module())
    shape = [0 if d == dim else size for d, size in enumerate(case.shape)]
    x = torch.zeros(shape, requires_grad=True)
    try:
        outputs = list(tensors(case.call(module, x)))
    except ValueError as problem:
        assert "0" in str(problem)
        return
    full = shapes(case.call(module, torch.randn(case.shape)))
    assert [len(shape) for shape in shapes(outputs)] == [len(shape) for shape in full]
    assert all(out.isfinite().all() for out in outputs)
    sum(out.sum() for out in outputs).backward()
    assert x.grad.shape == x.shape
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


# --- autocast


def under_autocast(case: Case, module: nn.Module, x: Tensor) -> list[torch.dtype]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [out.dtype for out in tensors(case.call(module, x))]


inputs = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 input", "bfloat16 input"])
# Twice what others are, or wide layers.
SLOW_TO_COMPILE = ("gru-both", "lstm-both", "period", "scale", "resolution")


@every_module
@inputs
def test_dtypes_under_autocast_are_the_originals(case, dtype):
    x = torch.randn(case.shape).to(dtype)
    assert under_autocast(case, case.module(), x) == under_autocast(case, (case.like or case.make)(original), x)


@pytest.mark.parametrize(
    "case", [case for case in MODULES if case.name not in SLOW_TO_COMPILE], ids=lambda case: case.name
)
@inputs
def test_dtypes_under_autocast_are_the_same_when_compiled(case, dtype):
    torch.compiler.reset()
    module, x = case.module(), torch.randn(case.shape).to(dtype)
    compiled = torch.compile(lambda x: case.call(module, x), backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [out.dtype for out in tensors(compiled(x))]
    assert got == under_autocast(case, module, x)


@every_module
def test_backward_inside_autocast_of_a_forward_pass_outside(case):
    """Hand-written gradients do not raise there; products that PyTorch makes itself are rounded there."""
    module = randomized(case.module()).eval()
    leaves = [torch.randn(case.shape, requires_grad=True), *module.parameters()]
    total = sum(out.square().sum() for out in tensors(case.call(module, leaves[0])))
    want = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(total, leaves, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert relative_error(a, b) < 0.1
