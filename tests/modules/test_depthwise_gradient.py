"""The hand-written gradient of a depthwise convolution's weight, on a CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.original import functional as original
from fastblocks import functional
from fastblocks.eager import convnext
from tests.compare import assert_as_exact, relative_error
from tests.modules.harness import EXACT

LEAVES = ("x", "weight", "bias", "norm_weight", "norm_bias")
CASES = {  # size of x, kernel, stride, transposed
    "1-D": ((2, 48, 301), (7,), (1,), False),
    "1-D, stride 3": ((3, 16, 1000), (5,), (3,), False),
    "1-D, transposed": ((2, 32, 300), (7,), (2,), True),
    "2-D": ((2, 8, 61, 37), (7, 7), (1, 1), False),
    "2-D, strides 2 and 1": ((1, 24, 40, 33), (3, 5), (2, 1), False),
    "2-D, transposed": ((2, 16, 23, 24), (7, 3), (2, 2), True),
    "a kernel larger than x": ((4, 1024, 3, 5), (7, 9), (1, 1), False),
}
cases = pytest.mark.parametrize("case", CASES)


def leaves_of(case, dtype=torch.float32):
    size, kernel, *_ = CASES[case]
    channels = size[1]
    sizes = [size, (channels, 1, *kernel), (channels,), (channels,), (channels,)]
    return [torch.randn(each, dtype=dtype) for each in sizes]


def gradients(run, case, leaves, grad_of):
    _, _, stride, transposed = CASES[case]
    leaves = [leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_() for leaf in leaves]
    y = run(*leaves, stride=stride, transposed=transposed)
    return torch.autograd.grad(y, leaves, grad_of(y))


@pytest.fixture
def calls(monkeypatch):
    """How often the hand-written gradient was asked for."""
    found, real = [], convnext._grad_weight
    monkeypatch.setattr(convnext, "_grad_weight", lambda *args: found.append(args) or real(*args))
    return found


@cases
@pytest.mark.parametrize("channels_last", (False, True))
def test_gradients_as_exact_as_the_library_s(case, channels_last, calls):
    leaves = leaves_of(case)
    if channels_last:
        leaves[0] = leaves[0].movedim(1, -1).contiguous().movedim(-1, 1)
    upstream = {}

    def grad_of(y):
        return upstream.setdefault("grad", torch.randn_like(y)).to(y.dtype)

    got = gradients(functional.depthwise_conv_layer_norm, case, leaves, grad_of)
    assert len(calls) == 1
    library = gradients(original.depthwise_conv_layer_norm, case, leaves, grad_of)
    exact = gradients(original.depthwise_conv_layer_norm, case, [leaf.double() for leaf in leaves], grad_of)
    for name, *values in zip(LEAVES, got, library, exact, strict=True):
        assert_as_exact(*values, what=f"gradient of {name}")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), transposed=st.booleans(), spatial=st.sampled_from((1, 2)))
def test_any_geometry(data, transposed, spatial):
    """In float64: sizes around a block's, one row, strides beyond the kernel, several chunks of examples."""
    kernel = data.draw(st.tuples(*[st.sampled_from((1, 3, 7))] * spatial))
    stride = data.draw(st.tuples(*[st.integers(1, 4)] * spatial))
    sizes = data.draw(st.tuples(*([st.integers(1, 300)] if spatial == 1 else [st.integers(1, 20)] * 2)))
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 3, 16)))
    x = torch.randn(batch, channels, *sizes, dtype=torch.float64)
    weight = torch.randn(channels, 1, *kernel, dtype=torch.float64, requires_grad=True)
    y = convnext._depthwise_conv(x, weight, None, stride, transposed, (0,) * spatial)
    grad = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, weight, grad)
    got = convnext._grad_weight(*((grad, x) if transposed else (x, grad)), torch.Size(kernel), stride)
    assert relative_error(got, want) < EXACT


@pytest.mark.parametrize("wanted", LEAVES[:3])
def test_where_one_gradient_is_wanted(wanted):
    leaves = leaves_of("2-D")
    leaves[LEAVES.index(wanted)].requires_grad_()
    got, want = (
        torch.autograd.grad(run(*leaves, stride=(1, 1)).square().sum(), leaves[LEAVES.index(wanted)])[0]
        for run in (functional.depthwise_conv_layer_norm, original.depthwise_conv_layer_norm)
    )
    assert relative_error(got, want) < 1e-5


def test_second_derivatives():
    """Through the hand-written function, as through the library's."""
    small = {"1-D": (1, 4, 9), "2-D": (1, 4, 5, 6)}
    for case, size in small.items():
        _, kernel, stride, _ = CASES[case]
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)
        weight, bias = torch.randn(4, 1, *kernel, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        arguments = x, weight.requires_grad_(), bias.requires_grad_(), stride, False, (0,) * len(stride)
        assert torch.autograd.gradcheck(convnext._CPUDepthwiseConv.apply, arguments)
        assert torch.autograd.gradgradcheck(convnext._CPUDepthwiseConv.apply, arguments)


def test_backward_inside_autocast(calls):
    """A forward pass outside autocast has float32 gradients, wherever its backward pass runs."""
    leaves = [leaf.requires_grad_() for leaf in leaves_of("1-D")]

    y = functional.depthwise_conv_layer_norm(*leaves, stride=(1,))
    grad = torch.randn_like(y)
    want = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, leaves, grad)
    assert len(calls) == 2
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 1e-5
