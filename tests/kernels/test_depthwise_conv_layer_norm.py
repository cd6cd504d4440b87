import math

import pytest
import torch

from fastblocks import backend
from fastblocks.functional import depthwise_conv_layer_norm
from fastblocks.functional.convnext import conv_output_size
from tests.compare import assert_as_exact, assert_close
from tests.reference import convnext as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias")

# batch, channels, sizes, kernel, stride, transposed, output size
CASES = {
    "aligned": (2, 24, (32,), (7,), (1,), False, None),
    "unaligned": (2, 7, (13,), (7,), (1,), False, None),
    "pairs": (2, 24, (14,), (5,), (1,), False, None),
    "one channel": (2, 1, (9,), (7,), (1,), False, None),
    "wide": (1, 96, (20,), (7,), (1,), False, None),
    "wider": (1, 384, (11,), (7,), (1,), False, None),
    "shorter than the kernel": (2, 5, (3,), (9,), (1,), False, None),
    "length 1": (3, 7, (1,), (7,), (1,), False, None),
    "kernel 1": (1, 8, (16,), (1,), (1,), False, None),
    "stride": (2, 7, (16,), (7,), (2,), False, None),
    "stride beyond the kernel": (1, 7, (17,), (3,), (5,), False, None),
    "33 taps": (1, 4, (40,), (33,), (1,), False, None),
    "63 taps": (1, 4, (40,), (63,), (1,), False, None),
    "63 taps, strided": (1, 3, (40,), (63,), (3,), False, None),
    "transposed": (2, 7, (6,), (7,), (2,), True, None),
    "transposed, larger": (2, 7, (6,), (7,), (2,), True, (12,)),
    "transposed, stride 1": (2, 8, (16,), (7,), (1,), True, None),
    "transposed, stride beyond the kernel": (1, 5, (4,), (3,), (5,), True, (18,)),
    "transposed, 63 taps": (1, 3, (9,), (63,), (2,), True, (18,)),
    "2-D": (1, 24, (5, 16), (7, 7), (1, 1), False, None),
    "2-D, unaligned": (2, 7, (4, 5), (3, 5), (1, 1), False, None),
    "2-D, H 1": (1, 7, (1, 8), (7, 7), (1, 1), False, None),
    "2-D, W 1": (1, 7, (8, 1), (7, 7), (1, 1), False, None),
    "2-D, stride": (1, 7, (5, 8), (7, 7), (2, 2), False, None),
    "2-D, uneven stride": (1, 5, (7, 4), (3, 3), (4, 1), False, None),
    "2-D, uneven kernel and stride": (1, 5, (7, 6), (3, 7), (3, 2), False, None),
    "2-D, transposed": (1, 7, (3, 4), (7, 7), (2, 2), True, (6, 7)),
    "2-D, transposed, uneven": (1, 5, (2, 4), (3, 5), (3, 1), True, (5, 4)),
    "2-D, 15 × 15": (1, 3, (4, 8), (15, 15), (1, 1), False, None),
}
GPU_CASES = {
    "cnx-1d": (2, 512, (1000,), (7,), (1,), False, None),
    "cnx-2d": (2, 32, (70, 64), (7, 7), (1, 1), False, None),
    "cnx-2d, deep": (2, 256, (36, 8), (7, 7), (1, 1), False, None),
    "cnx-2d, stride": (2, 64, (71, 32), (7, 7), (2, 2), False, None),
    "cnx-2d, transposed": (2, 64, (36, 16), (7, 7), (2, 2), True, (71, 32)),
    "2048 channels": (1, 2048, (100,), (7,), (1,), False, None),
}


def make(case, device, layout="contiguous", bias=True, offset=0.0):
    batch, channels, sizes, kernel, stride, transposed, wanted = case
    x = torch.randn(batch, channels, *sizes) + offset
    parameters = [torch.randn(channels, 1, *kernel), *(torch.randn(channels) for _ in range(3))]
    if channels < 8:
        # Where all channels of a position come out nearly equal, the normalization divides the convolution's rounding
        # by next to nothing, and no bound on sums holds, of PyTorch's own result either: with 3 channels and 63 taps
        # one draw in 30. So they are kept apart.
        parameters[1] += 3 * math.prod(kernel) ** 0.5 * torch.arange(channels)
    if not bias:
        parameters[1] = None
    keywords = {"stride": stride, "transposed": transposed, "output_size": wanted}
    tensors = [None if t is None else t.to(device) for t in (x, *parameters)]
    tensors[0] = laid_out(tensors[0], layout)
    return tensors, keywords


def laid_out(x, layout):
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":  # every other sample and position of something larger
        padded = x.new_zeros(2 * x.shape[0], x.shape[1] + 1, *x.shape[2:-1], 2 * x.shape[-1] + 1)
        view = padded[::2, 1:, ..., 1::2]
        return view.copy_(x)
    return x


def run(name, tensors, keywords, dtype):
    """The result and all gradients, by backend `name`."""
    inputs = [None if t is None else t.to(dtype).detach().requires_grad_() for t in tensors]
    with backend.use_backend(name):
        y = depthwise_conv_layer_norm(*inputs, **keywords)
    return y, torch.autograd.grad(y, [t for t in inputs if t is not None], cotangent(y))


def cotangent(y):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(y.shape, generator=generator).to(y.device, y.dtype)


def run_reference(tensors, keywords, dtype):
    inputs = [None if t is None else t.to(dtype).detach().double().requires_grad_() for t in tensors]
    sizes = conv_output_size(
        tuple(inputs[0].shape[2:]), keywords["stride"], keywords["transposed"], keywords["output_size"]
    )
    y = reference.depthwise_conv_layer_norm(*inputs, keywords["stride"], keywords["transposed"], sizes)
    return y, torch.autograd.grad(y, [t for t in inputs if t is not None], cotangent(y.to(dtype)).double())


def check(tensors, keywords, dtype):
    y, grads = run("triton", tensors, keywords, dtype)
    y_eager, grads_eager = run("eager", tensors, keywords, dtype)
    y_exact, grads_exact = run_reference(tensors, keywords, dtype)
    assert y.is_contiguous()
    names = ["y", *(f"gradient of {name}" for name, t in zip(NAMES, tensors, strict=True) if t is not None)]
    for name, got, eager, exact in zip(
        names, (y, *grads), (y_eager, *grads_eager), (y_exact, *grads_exact), strict=True
    ):
        if dtype == torch.float32 and not torch.cuda.is_available():
            # The interpreter rounds every product and every sum, PyTorch fuses the two: half the roundings of a tap.
            taps, positions = tensors[1][0].numel(), y[..., 0].numel()
            of_parameter = name.startswith("gradient") and name != "gradient of x"  # a sum over positions
            assert_close(got, exact, terms=positions if of_parameter else taps, what=name)
            assert got.dtype == eager.dtype
        else:
            assert_as_exact(got, eager, exact, name)


@pytest.mark.parametrize("name", CASES)
def test_every_shape(name, device, poison):
    check(*make(CASES[name], device), torch.float32)


@pytest.mark.parametrize("name", ["aligned", "stride", "2-D", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sixteen_bits(name, dtype, device, poison):
    check(*make(CASES[name], device), dtype)


@pytest.mark.parametrize("name", ["aligned", "transposed", "2-D, unaligned"])
@pytest.mark.parametrize("layout", ["channels last", "strided"])
def test_layouts_are_read_as_they_are(name, layout, device, poison):
    tensors, keywords = make(CASES[name], device, layout)
    check(tensors, keywords, torch.float32)


@pytest.mark.parametrize("name", GPU_CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="large: a GPU's")
def test_large_shapes(name, dtype, device, poison):
    tensors, keywords = make(GPU_CASES[name], device)
    y, grads = run("triton", tensors, keywords, dtype)
    y_eager, grads_eager = run("eager", tensors, keywords, dtype)
    exact = [t.to(dtype).double() for t in tensors]
    y_exact, grads_exact = run("eager", exact, keywords, torch.float64)
    assert_as_exact(y, y_eager, y_exact, "y")
    for name_, got, eager, want in zip(NAMES, grads, grads_eager, grads_exact, strict=True):
        assert_as_exact(got, eager, want, f"gradient of {name_}")


@pytest.mark.parametrize("length", range(7, 10))  # (3 - 1) · 3 + 1 … 3 · 3
def test_transposed_gives_every_output_size(length, device, poison):
    check(*make((1, 5, (3,), (5,), (3,), True, (length,)), device), torch.float32)


def test_without_bias(device, poison):
    check(*make(CASES["aligned"], device, bias=False), torch.float32)
    check(*make(CASES["2-D, unaligned"], device, bias=False), torch.float32)


@pytest.mark.parametrize("name", ["triton", "eager"])
def test_offsets_do_not_spoil_the_variance(name, device):
    tensors, keywords = make((1, 24, (16,), (3,), (1,), False, None), device, offset=1000.0)
    tensors[1] = torch.full_like(tensors[1], 0.25)  # so that the offset is every channel's
    tensors[2] = torch.zeros_like(tensors[2])
    y, _ = run(name, tensors, keywords, torch.float32)
    want, _ = run_reference(tensors, keywords, torch.float32)
    # The convolution's own rounding, 750 · 2^-24 · a few, beside a standard deviation of about 0.4.
    assert (y.double() - want).abs().max() < 4e-3


@pytest.mark.parametrize("name", ["triton", "eager"])
def test_constant_channels_give_the_bias(name, device):
    tensors, keywords = make(CASES["aligned"], device)
    tensors[0] = torch.full_like(tensors[0], 0.5)
    tensors[1] = torch.full_like(tensors[1], 0.5)
    tensors[2] = torch.zeros_like(tensors[2])
    y, grads = run(name, tensors, keywords, torch.float32)
    torch.testing.assert_close(y, tensors[4].expand_as(y))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("2-D", torch.bfloat16)]  # rows of outputs share inputs that one of them may not see
    + [(name, torch.float32) for name in ("aligned", "33 taps", "transposed, larger", "2-D, transposed")],
)
def test_infinity_stays_in_its_windows(name, dtype, device):
    """A position whose window does not hold the infinite input is as it was."""
    tensors, keywords = make(CASES[name], device)
    x = tensors[0]
    last = (0, 0, *(size - 1 for size in x.shape[2:]))
    clean, _ = run("triton", tensors, keywords, dtype)
    eager_x = x.clone()
    eager_x[last] = float("inf")
    got, _ = run("triton", [eager_x, *tensors[1:]], keywords, dtype)
    tensors[1] = torch.ones_like(tensors[1])
    touched = torch.zeros_like(x)
    touched[last] = 1.0
    with backend.use_backend("eager"):
        zeros = torch.zeros_like(tensors[2])
        reach = depthwise_conv_layer_norm(touched, tensors[1], zeros, torch.ones_like(zeros), zeros, **keywords)
    outside = (reach == 0).all(-1)
    assert outside.any()
    assert torch.equal(got[outside], clean[outside])


@pytest.mark.parametrize("name", ["stride beyond the kernel", "2-D, stride", "2-D, transposed, uneven"])
def test_infinite_gradients_stay_in_their_windows(name, device):
    """Where a stride leaves a phase with fewer taps, the missing ones must not be products with zero."""
    tensors, keywords = make(CASES[name], device)
    tensors = [t.double() for t in tensors]
    with backend.use_backend("eager"):
        x = tensors[0].requires_grad_()
        y = depthwise_conv_layer_norm(*tensors, **keywords)
        position = (0, *(size // 2 for size in y.shape[1:-1]))
        one = torch.zeros_like(y)
        one[position] = torch.randn_like(one[position])
        reached = torch.autograd.grad(y, x, one)[0] != 0
    assert reached.any() and not reached.all()
    grads = []
    for value in (0.0, float("inf")):
        inputs = [t.float().detach().requires_grad_() for t in tensors]
        with backend.use_backend("triton"):
            y = depthwise_conv_layer_norm(*inputs, **keywords)
        grad = cotangent(y)
        grad[position] = value
        grads.append(torch.autograd.grad(y, inputs[0], grad)[0])
    assert torch.equal(grads[0][~reached], grads[1][~reached])
    assert not grads[1][reached].isfinite().all()


@pytest.mark.parametrize(
    "case",
    [
        (40, 5, (9,), (7,), (1,), False, None),
        (40, 5, (9,), (3,), (2,), False, None),
        (40, 3, (2, 3), (3, 3), (2, 2), True, None),
    ],
    ids=["1-D", "stride", "2-D, transposed"],
)
def test_many_partial_sums(case, device, poison, monkeypatch):
    """As on a large GPU: more splits than the kernel that adds them up takes at a time."""
    from fastblocks.kernels import runtime

    monkeypatch.setattr(runtime, "sm_count", lambda device: 132)
    check(*make(case, device), torch.float32)


@pytest.mark.parametrize("name", ["stride", "2-D, unaligned", "2-D, transposed", "transposed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_offsets_of_64_bits(name, layout, device, poison, monkeypatch):
    """What samples of 2^31 elements and more take, at sizes that a test can hold."""
    from fastblocks.kernels.convnext import depthwise, depthwise_backward

    for module in (depthwise, depthwise_backward):
        monkeypatch.setattr(module, "span", lambda x: 2**31)
    check(*make(CASES[name], device, layout), torch.float32)


@pytest.mark.parametrize("name", ["aligned", "2-D, unaligned", "transposed"])
def test_gradients_are_the_same_bits_twice(name, device):
    tensors, keywords = make(CASES[name], device)
    _, first = run("triton", tensors, keywords, torch.float32)
    _, second = run("triton", tensors, keywords, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["triton", "eager"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_autocast_gives_its_own_dtype(name, dtype, device):
    tensors, keywords = make(CASES["aligned"], device)
    inputs = [tensors[0].to(dtype), *tensors[1:]]
    inputs = [t.detach().requires_grad_() for t in inputs]
    with backend.use_backend(name), torch.autocast(device.type, torch.bfloat16):
        y = depthwise_conv_layer_norm(*inputs, **keywords)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, inputs, cotangent(y))
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]
    want, want_grads = run_reference(inputs, keywords, torch.float32)
    assert (y - want).norm() / want.norm() < 0.01
    assert all((g - w).norm() / w.norm() < 0.02 for g, w in zip(grads, want_grads, strict=True))


def test_gradients_that_are_not_wanted(device, poison):
    tensors, keywords = make(CASES["aligned"], device)
    for wanted in range(5):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        with backend.use_backend("triton"):
            y = depthwise_conv_layer_norm(*inputs, **keywords)
        (grad,) = torch.autograd.grad(y, inputs[wanted], cotangent(y))
        assert grad.isfinite().all()
    with backend.use_backend("triton"), torch.no_grad():
        assert torch.equal(depthwise_conv_layer_norm(*tensors, **keywords), y)


def test_second_derivatives(device):
    tensors, keywords = make((1, 3, (5,), (3,), (2,), False, None), device)
    gradients = []
    for name, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        inputs = [t.to(dtype).detach().requires_grad_() for t in tensors]
        with backend.use_backend(name):
            y = depthwise_conv_layer_norm(*inputs, **keywords, eps=0.1)
            first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            gradients.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph(device):
    tensors, keywords = make(CASES["2-D"], device)
    want, _ = run("triton", tensors, keywords, torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = depthwise_conv_layer_norm(*tensors, **keywords)
    graph.replay()
    assert torch.equal(y, want)


def test_obstacles_are_named(device):
    with backend.use_backend("triton"):
        x = torch.randn(1, 4, 80, device=device)
        ones = torch.ones(4, device=device)
        said = backend.explain(
            depthwise_conv_layer_norm, x, torch.randn(4, 1, 65, device=device), ones, ones, ones, stride=(1,)
        )
    assert "eager" in said and "65" in said
