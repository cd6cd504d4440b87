import pytest
import torch

from fastblocks import backend
from fastblocks.functional import convnext_mlp
from tests.compare import ROUNDING, assert_as_exact, assert_close, relative_error
from tests.reference import convnext as reference

pytest.importorskip("triton")

from fastblocks.kernels.convnext import mlp
from fastblocks.kernels.runtime import tl, triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight1", "bias1", "weight2", "bias2", "residual")

# batch, sizes, C, F, C_out
CASES = {
    "one channel": (2, (5,), 1, 4, 1),
    "7 channels": (2, (13,), 7, 28, 7),
    "2-D": (2, (5, 6), 24, 96, 24),
    "more out": (1, (9,), 7, 28, 24),
    "96 channels": (1, (33,), 96, 384, 96),
    "384 channels": (1, (11,), 384, 1536, 384),
    "one position": (3, (1,), 24, 96, 24),
}
GPU_CASES = {
    "cnx-1d": (4, (1000,), 512, 2048, 512),
    "cnx-2d": (4, (70, 64), 32, 128, 32),
    "cnx-2d, 64": (4, (141, 32), 64, 256, 64),
    "cnx-2d, 128": (4, (71, 16), 128, 512, 128),
}


@pytest.fixture(params=["fused", "library"])
def way(request, monkeypatch):
    """Where `convnext_mlp` would choose by size, both ways are tested at any size."""
    from fastblocks.kernels.convnext import convnext_mlp as kernels

    if request.param == "fused":
        monkeypatch.setattr(
            kernels, "_is_fused", lambda x, weight2, dtype, limit: max(x.shape[-1], weight2.shape[0]) <= limit
        )
    else:
        monkeypatch.setattr(kernels, "_is_fused", lambda x, weight2, dtype, limit: False)
    return request.param


def make(case, device, residual=True):
    batch, sizes, channels, hidden, c_out = case
    tensors = [
        torch.randn(batch, *sizes, channels),
        torch.randn(hidden, channels) / channels**0.5,
        torch.randn(hidden),
        torch.randn(c_out, hidden) / hidden**0.5,
        torch.randn(c_out),
        torch.randn(batch, c_out, *sizes) if residual else None,
    ]
    return [None if t is None else t.to(device) for t in tensors]


def cotangent(y):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(y.shape, generator=generator).to(y.device, y.dtype)


def differentiate(y, inputs, grad):
    return y, *torch.autograd.grad(y, [t for t in inputs if t is not None], grad)


def run(name, tensors, dtype, function=convnext_mlp):
    inputs = [None if t is None else t.to(dtype).detach().requires_grad_() for t in tensors]
    with backend.use_backend(name):
        y = function(*inputs[:5], residual=inputs[5])
    return differentiate(y, inputs, cotangent(y))


def run_reference(tensors, dtype):
    inputs = [None if t is None else t.to(dtype).detach().double().requires_grad_() for t in tensors]
    y = reference.convnext_mlp(*inputs)
    return differentiate(y, inputs, cotangent(y.to(dtype)).double())


def check(tensors, dtype, function=convnext_mlp):
    results = run("triton", tensors, dtype, function), run("eager", tensors, dtype), run_reference(tensors, dtype)
    names = ("y", *(f"gradient of {name}" for name, t in zip(NAMES, tensors, strict=True) if t is not None))
    assert results[0][0].is_contiguous()
    for name, got, eager, exact in zip(names, *results, strict=True):
        if dtype == torch.float32 and not torch.cuda.is_available():
            # NumPy and the CPU's library sum in orders of their own: a few roundings, and those of eager.
            limit = max(1.0, relative_error(eager, exact) / ROUNDING[dtype])
            assert_close(got, exact, terms=limit, what=name)
            assert got.dtype == eager.dtype
        else:
            assert_as_exact(got, eager, exact, name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(name, dtype, way, device, poison):
    check(make(CASES[name], device), dtype)


@pytest.mark.parametrize("name", GPU_CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="large: a GPU's")
def test_large_shapes(name, dtype, device, poison):
    check(make(GPU_CASES[name], device), dtype)


def test_without_residual(way, device, poison):
    check(make(CASES["2-D"], device, residual=False), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_many_partial_sums(dtype, way, device, poison, monkeypatch):
    """As on a large GPU: more splits than the kernel that adds them up takes at a time."""
    from fastblocks.kernels import runtime

    monkeypatch.setattr(runtime, "sm_count", lambda device: 132)
    check(make((40, (14,), 7, 28, 7), device), dtype)


def test_layouts_are_read_as_they_are(way, device, poison):
    x, *parameters, residual = make(CASES["2-D"], device)
    x = x.movedim(-1, 1).contiguous().movedim(1, -1)
    residual = residual.movedim(1, -1).contiguous().movedim(-1, 1)
    check([x, *(p.mT.contiguous().mT if p.dim() == 2 else p for p in parameters), residual], torch.bfloat16)


def test_gradients_are_the_same_bits_twice(way, device):
    tensors = make(CASES["96 channels"], device)
    first, second = run("triton", tensors, torch.bfloat16), run("triton", tensors, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["triton", "eager"])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_autocast_promotes_product_and_residual(name, residual_dtype, device, poison):
    tensors = make(CASES["2-D"], device, residual=residual_dtype is not None)
    if residual_dtype is not None:
        tensors[5] = tensors[5].to(residual_dtype)
    inputs = [None if t is None else t.detach().requires_grad_() for t in tensors]
    with backend.use_backend(name), torch.autocast(device.type, torch.bfloat16):
        y = convnext_mlp(*inputs[:5], residual=inputs[5])
    assert y.dtype == (residual_dtype or torch.bfloat16)
    results = differentiate(y, inputs, cotangent(y))
    assert [g.dtype for g in results[1:]] == [t.dtype for t in inputs if t is not None]
    exact_inputs = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    want = reference.convnext_mlp(*exact_inputs)
    for got, exact in zip(results, differentiate(want, exact_inputs, cotangent(y).double()), strict=True):
        assert (got - exact).norm() < 0.02 * exact.norm()


def test_gradients_that_are_not_wanted(way, device, poison):
    tensors = make(CASES["2-D"], device)
    for wanted in range(6):
        inputs = [t.to(torch.bfloat16).detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        with backend.use_backend("triton"):
            y = convnext_mlp(*inputs[:5], residual=inputs[5])
        (grad,) = torch.autograd.grad(y, inputs[wanted], cotangent(y))
        assert grad.isfinite().all() and grad.shape == inputs[wanted].shape


def test_second_derivatives(device):
    tensors = make((1, (3,), 4, 8, 4), device)
    gradients = []
    for name, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        inputs = [t.to(dtype).detach().requires_grad_() for t in tensors]
        with backend.use_backend(name):
            y = convnext_mlp(*inputs[:5], residual=inputs[5])
            first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            gradients.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph(device):
    tensors = [t.to(torch.bfloat16) for t in make(CASES["96 channels"], device)]
    want = convnext_mlp(*tensors[:5], residual=tensors[5])
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = convnext_mlp(*tensors[:5], residual=tensors[5])
    graph.replay()
    assert torch.equal(y, want)


@triton.jit
def both(x_ptr, gelu_ptr, slope_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(gelu_ptr + offs, mlp.activate(x, False))
    tl.store(slope_ptr + offs, mlp.slope(x, False))


def test_the_polynomials_for_16_bits_are_gelu_and_its_derivative_everywhere(device):
    x = torch.linspace(-8, 8, 4096, device=device)
    x[:4] = torch.tensor([-1e4, 1e4, float("nan"), 0.0], device=device)
    gelu, slope = torch.empty_like(x), torch.empty_like(x)
    both[(1,)](x, gelu, slope, BLOCK=x.numel())
    wide = x.double().requires_grad_()
    want = torch.nn.functional.gelu(wide)
    (want_slope,) = torch.autograd.grad(want.sum(), wide)
    assert gelu[2].isnan() and slope[2].isnan()
    number = ~x.isnan()
    phi, want_phi = gelu[number] / x[number], want.detach()[number] / x[number].double()
    assert (phi - want_phi)[x[number] != 0].abs().max() < 7e-5
    assert (slope - want_slope)[number].abs().max() < 8e-5
    tails = (x.abs() > 4.5) & number  # exactly, so that nothing grows with x
    assert torch.equal(gelu[tails], x[tails].clamp_min(0)) and torch.equal(slope[tails], (x[tails] > 0).float())
