import math

import pytest
import torch
from torch import Tensor

import fastblocks
from fastblocks import backend, functional
from fastblocks.backend import use_backend
from tests.compare import ROUNDING, assert_as_exact, assert_close, relative_error
from tests.reference import rows as reference

pytest.importorskip("triton")

from fastblocks.kernels import launch as launching
from fastblocks.kernels import runtime
from fastblocks.kernels.rows import rms_norm, swiglu, swiglu_mlp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-2  # not so small that a wrong one would not show
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# N, C
NORMS = {
    "8": (70, 8),
    "one row": (1, 24),
    "24": (37, 24),
    "96": (21, 96),
    "136": (9, 136),
    "341": (5, 341),
    "1000": (3, 1000),
    "several tiles per program": (70, 1000),
    "4097": (2, 4097),
    "16384": (3, 16384),
}
# N, F
GATES = {
    "8": (70, 8),
    "one number": (1, 1),
    "odd": (7, 341),
    "odd, whole lines": (16, 341),  # N · F is a multiple of 16, F is not
    "352": (17, 352),
    "one row": (1, 100),
    "1365": (3, 1365),
}
# sizes of x but for C, C, F, C_out
MLPS = {
    "odd": ((7,), 6, 21, 6),
    "aligned": ((2, 9), 24, 64, 24),
    "341": ((40,), 128, 341, 128),
    "one row": ((), 8, 5, 3),
    "one hidden unit": ((3, 2, 2), 5, 1, 4),
}
FUNCTIONS = {
    "rms_norm": (lambda x, scale: functional.rms_norm(x, scale, EPS), lambda x, s: reference.rms_norm(x, s, EPS)),
    "swiglu": (functional.swiglu, reference.swiglu),
    "swiglu_mlp": (functional.swiglu_mlp, reference.swiglu_mlp),
}


def inputs_of(name: str, case, device) -> list[Tensor]:
    if name == "swiglu_mlp":
        sizes, c, f, out = case
        weights = [torch.randn(size) / size[1] ** 0.5 for size in ((f, c), (f, c), (out, f))]
        tensors = [torch.randn(*sizes, c), *weights]
    else:
        n, c = case
        tensors = [torch.randn(n, c), torch.randn(c) if name == "rms_norm" else torch.randn(n, c)]
    return [t.to(device) for t in tensors]


def differentiate(function, tensors, grad=None) -> list[Tensor]:
    """The result, its gradient if none is given, and all gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    grad = torch.randn_like(y) if grad is None else grad.to(y.dtype)
    return [y, grad, *torch.autograd.grad(y, leaves, grad)]


def check(name: str, tensors, grad=None) -> None:
    """The kernels against eager, both against float64: the result and every gradient."""
    function, exact_function = FUNCTIONS[name]
    with use_backend("triton"), backend._watch() as decisions:
        got = differentiate(function, tensors, grad)
    assert [decision.backend for decision in decisions] == ["triton"], decisions
    with use_backend("eager"):
        eager = differentiate(function, tensors, got[1])
    exact = differentiate(exact_function, [t.double() for t in tensors], got[1])
    assert got[0].is_contiguous()
    for i, (a, b, want) in enumerate(zip(got, eager, exact, strict=True)):
        what = "y" if i == 0 else f"gradient of argument {i - 2}"
        assert a.shape == b.shape and a.dtype == b.dtype, what
        if a.dtype == torch.float32 and not torch.cuda.is_available():
            # NumPy and the CPU's library sum in orders of their own: a few roundings, and those of eager.
            assert_close(a, want, terms=max(1.0, relative_error(b, want) / ROUNDING[a.dtype]), what=what)
        else:
            assert_as_exact(a, b, want, what)


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
@every_dtype
def test_rms_norm(case, dtype, device, poison):
    check("rms_norm", [t.to(dtype) for t in inputs_of("rms_norm", case, device)])


@pytest.mark.parametrize("case", GATES.values(), ids=GATES)
@every_dtype
def test_swiglu(case, dtype, device, poison):
    check("swiglu", [t.to(dtype) for t in inputs_of("swiglu", case, device)])


@pytest.mark.parametrize("case", MLPS.values(), ids=MLPS)
@every_dtype
def test_swiglu_mlp(case, dtype, device, poison):
    check("swiglu_mlp", [t.to(dtype) for t in inputs_of("swiglu_mlp", case, device)])


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("second", DTYPES, ids=str)
def test_arguments_of_two_dtypes(name, first, second, device, poison):
    a, b = inputs_of(name, (19, 24), device)
    check(name, [a.to(first), b.to(second)])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_autocast_gives_eagers_dtype(name, dtype, device, poison):
    case = MLPS["odd"] if name == "swiglu_mlp" else (9, 24)
    x, *others = inputs_of(name, case, device)
    results = []
    for chosen in ("triton", "eager"):
        with use_backend(chosen), backend._watch() as decisions, torch.autocast(device.type, torch.bfloat16):
            grad = results[0][1] if results else None
            results.append(differentiate(FUNCTIONS[name][0], [x.to(dtype), *others], grad))
        assert decisions[0].backend == chosen
    exact = differentiate(FUNCTIONS[name][1], [x.to(dtype).double(), *(t.double() for t in others)], results[0][1])
    for got, eager, want in zip(*results, exact, strict=True):
        assert got.dtype == eager.dtype and relative_error(got, want) < 0.02


def test_a_backward_pass_under_another_autocast(device):
    """The operands' dtypes are those of the forward pass."""
    tensors = inputs_of("swiglu_mlp", MLPS["odd"], device)
    leaves = [t.requires_grad_() for t in tensors]
    with use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
        y = functional.swiglu_mlp(*leaves)
    grad = torch.randn_like(y)
    want = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    with torch.autocast(device.type, torch.float16):
        got = torch.autograd.grad(y, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def large(size: tuple[int, int], device) -> Tensor:
    """More than 2^31 elements; on a CPU most of them are never touched, so there is no memory behind them."""
    return torch.empty(size, dtype=torch.bfloat16, device=device)


@pytest.fixture
def only_the_last_program(monkeypatch):
    """The interpreter would take hours for all of them; a GPU runs them all."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder

    for module in (launching, swiglu):  # prepared launches take the first

        def launch(kernel, grid, *arguments, launch=module.launch, **keywords):
            set_grid_index = InterpreterBuilder.set_grid_idx
            with monkeypatch.context() as patched:
                patched.setattr(
                    InterpreterBuilder,
                    "set_grid_idx",
                    lambda self, x, y, z: set_grid_index(self, x + grid[0] - 1, y, z),
                )
                patched.setattr(InterpreterBuilder, "set_grid_dim", set_grid_dim_of(InterpreterBuilder, grid[0]))
                launch(kernel, (1,), *arguments, **keywords)

        monkeypatch.setattr(module, "launch", launch)


def set_grid_dim_of(builder, programs):
    """As many programs as there really are, where one runs."""
    original = builder.set_grid_dim
    return lambda self, x, y, z: original(self, programs, y, z)


def test_rms_norm_past_2_to_the_31(device, only_the_last_program):
    n, c = 2**28 + 8, 8
    x, out, grad = (large((n, c), device) for _ in range(3))
    rstd = torch.empty(n, device=device)
    end = slice(n - 8, n)
    x[end], grad[end] = torch.randn(8, c), torch.randn(8, c)
    rms_norm.forward(x, None, EPS, out, rstd)
    exact = x[end].double().requires_grad_()
    y = reference.rms_norm(exact, torch.ones(c, device=device, dtype=torch.float64), EPS)
    assert relative_error(out[end], y) < 0.01
    rms_norm.backward(grad, out, rstd, None, x, kept_is_normalized=True)
    assert relative_error(x[end], torch.autograd.grad(y, exact, grad[end].double())[0]) < 0.02


def test_swiglu_past_2_to_the_31(device, only_the_last_program):
    n, f = 2**27 + 8, 8
    both, grad = large((n, 2 * f), device), large((n, f), device)
    end = slice(n - 8, n)
    both[end], grad[end] = torch.randn(8, 2 * f), torch.randn(8, f)
    exact = both[end].double().requires_grad_()
    y = reference.swiglu(*exact.chunk(2, -1))
    swiglu.backward(grad, both, both, None)
    assert relative_error(both[end], torch.autograd.grad(y, exact, grad[end].double())[0]) < 0.01


# ---- the launch functions, as blocks call them -----------------------------------------------------------------------


def normal(*size, dtype=torch.float32, device="cpu"):
    return torch.randn(*size).to(device, dtype)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stream", DTYPES, ids=str)
@pytest.mark.parametrize("has_weight", [False, True])
def test_a_sum_is_written_and_normalized(has_weight, stream, out_dtype, device, poison):
    n, c = 37, 136
    x, addend = normal(n, c, dtype=stream, device=device), normal(n, c, dtype=out_dtype, device=device)
    weight = normal(c, device=device) if has_weight else None
    total, out, rstd = torch.empty_like(x), torch.empty_like(addend), torch.empty(n, device=device)
    rms_norm.forward(x, weight, EPS, out, rstd, addend, total)
    assert torch.equal(total, (x.float() + addend.float()).to(stream))
    wide = total.double()
    ones = torch.ones(c, dtype=torch.float64, device=device)
    want = reference.rms_norm(wide, ones if weight is None else weight.double(), EPS)
    assert relative_error(out, want) < 2 * ROUNDING[out_dtype] + 1e-6
    torch.testing.assert_close(rstd.double(), (wide.square().mean(-1) + EPS).rsqrt(), rtol=1e-6, atol=0)


def test_rows_of_one_number(device, poison):
    """Small ones of one sign: of others the gradients are all rounding."""
    x, scale = torch.rand(70, 1, device=device), torch.rand(1, device=device)
    check("rms_norm", [EPS * (1 + x), 1 + scale], torch.ones_like(x))


def test_without_rstd_the_same_bits(device, poison):
    x = normal(37, 24, device=device)
    outs = torch.empty(2, 37, 24, device=device)
    rms_norm.forward(x, None, EPS, outs[0], torch.empty(37, device=device))
    rms_norm.forward(x, None, EPS, outs[1], None)
    assert torch.equal(*outs)


@pytest.mark.parametrize("kept_dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kept_is_normalized", [False, True])
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("residual", ["none", "given", "in place"])
def test_backward_with_a_residual(residual, has_weight, kept_is_normalized, kept_dtype, device, poison):
    """A float32 stream, products' gradients in 16 bits; what is kept is x or x̂ as it was rounded."""
    n, c = 70, 24
    kept = normal(n, c, dtype=kept_dtype, device=device)
    grad_out = normal(n, c, dtype=torch.bfloat16, device=device)
    grad_residual = None if residual == "none" else normal(n, c, device=device)
    weight = normal(c, device=device) if has_weight else None
    rstd = torch.rand(n, device=device) + 0.5

    normalized = kept.double() * (1 if kept_is_normalized else rstd.double()[:, None])
    g = grad_out.double() * (1 if weight is None else weight.double())
    want = rstd.double()[:, None] * (g - normalized * (g * normalized).mean(-1, keepdim=True))
    want = want if grad_residual is None else want + grad_residual.double()

    grad_x = grad_residual if residual == "in place" else torch.empty(n, c, device=device)
    grad_weight = torch.empty(c, device=device) if has_weight else None
    rms_norm.backward(
        grad_out,
        kept,
        rstd,
        weight,
        grad_x,
        kept_is_normalized=kept_is_normalized,
        grad_residual=grad_residual,
        grad_weight=grad_weight,
    )
    assert_close(grad_x, want, c)
    if has_weight:
        assert_close(grad_weight, (grad_out.double() * normalized).sum(0), n)


@pytest.mark.parametrize("columns", [21, 32])
@every_dtype
def test_gate_and_up_of_one_product(columns, dtype, device, poison):
    n = 19
    both = normal(n, 2 * columns, dtype=dtype, device=device)
    grad, hidden = normal(n, columns, dtype=dtype, device=device), torch.empty(n, columns, dtype=dtype, device=device)
    exact = both.double().requires_grad_()
    want = reference.swiglu(exact[:, :columns], exact[:, columns:])
    (want_grad,) = torch.autograd.grad(want, exact, grad.double())
    swiglu.forward(both, hidden)
    assert_close(hidden, want)
    grad_both = torch.empty_like(both)
    swiglu.backward(grad, both, grad_both, None)
    assert_close(grad_both, want_grad)
    swiglu.backward(grad, both, both, grad)  # all in place
    assert torch.equal(both, grad_both) and torch.equal(grad, hidden)


@every_dtype
def test_padded_columns_stay_zero(dtype, device, poison):
    both, hidden = torch.zeros(5, 64, dtype=dtype, device=device), torch.empty(5, 32, dtype=dtype, device=device)
    both[:, :21], both[:, 32:53] = normal(5, 21, device=device), normal(5, 21, device=device)
    grad = normal(5, 32, dtype=dtype, device=device)
    swiglu.forward(both, hidden)
    swiglu.backward(grad, both, both, grad)
    for result in (hidden, grad, both[:, :32], both[:, 32:]):
        assert not result[:, 21:].any() and result[:, :21].all()


# ---- numbers at their limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["triton", "eager"])
def test_gates_far_from_zero(name, device):
    gate = torch.tensor([-1e4, -200.0, -89.0, -30.0, 0.0, 30.0, 89.0, 200.0, 1e4], device=device)
    with use_backend(name):
        y, _, grad_gate, grad_up = differentiate(functional.swiglu, [gate, torch.ones_like(gate)], torch.ones(9))
    assert_close(y, gate.double() * gate.double().sigmoid())
    assert_close(grad_up, gate.double() * gate.double().sigmoid())
    assert_close(grad_gate, torch.tensor([0.0, 0, 0, 0, 0.5, 1, 1, 1, 1], dtype=torch.float64))


@pytest.mark.parametrize("name", ["triton", "eager"])
def test_squares_that_16_bits_do_not_hold(name, device):
    x = torch.tensor([[60000.0, -30000.0, 1e-5, 0.0], [1e-4, -1e-4, 2e-4, 0.0]], device=device)
    scale = torch.ones(4, device=device, dtype=torch.float16)
    with use_backend(name):
        y, *_ = differentiate(lambda x, s: functional.rms_norm(x, s, 1e-12), [x.half(), scale])
    assert_close(y, reference.rms_norm(x.half().double(), scale.double(), 1e-12))


@pytest.mark.parametrize("name", ["triton", "eager"])
def test_rows_of_zeros(name, device):
    with use_backend(name):
        y, grad, grad_x, grad_scale = differentiate(
            lambda x, s: functional.rms_norm(x, s, 1e-6), [torch.zeros(3, 8, device=device), torch.ones(8).to(device)]
        )
    assert not y.any() and not grad_scale.any()
    assert_close(grad_x, grad.double() * 1000)


def test_an_infinity_stays_in_its_row(device):
    for name, case in (("rms_norm", (21, 24)), ("swiglu", (21, 24)), ("swiglu_mlp", ((21,), 6, 21, 6))):
        x, *others = inputs_of(name, case, device)
        spoilt = x.clone()
        spoilt[4, 2] = math.inf
        with use_backend("triton"):
            clean, got = (FUNCTIONS[name][0](t, *others) for t in (x, spoilt))
        others_rows = torch.arange(21, device=device) != 4
        assert torch.equal(got[others_rows], clean[others_rows]) and not torch.equal(got[4], clean[4]), name


# ---- what is kept, summed, copied and refused ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_many_partial_sums(dtype, device, poison, monkeypatch):
    """As on a large GPU: more programs than the kernel that adds them up takes at a time."""
    monkeypatch.setattr(runtime, "sm_count", lambda device: 132)
    check("rms_norm", [t.to(dtype) for t in inputs_of("rms_norm", (80, 1000), device)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_the_same_bits_twice(name, device):
    tensors = inputs_of(name, MLPS["341"] if name == "swiglu_mlp" else (300, 24), device)
    with use_backend("triton"):
        first = differentiate(FUNCTIONS[name][0], tensors)
        second = differentiate(FUNCTIONS[name][0], tensors, first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_graph_that_is_kept_gives_the_same_gradients_again(device):
    leaves = [t.requires_grad_() for t in inputs_of("swiglu_mlp", MLPS["odd"], device)]
    with use_backend("triton"):
        y = functional.swiglu_mlp(*leaves)
    first = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    second = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_halves_of_a_product_are_read_where_they_are(device, poison, monkeypatch):
    both = normal(2, 9, 42, device=device)
    seen = []
    launch = swiglu.launch
    monkeypatch.setattr(swiglu, "launch", lambda *a, **k: (seen.append(k), launch(*a, **k)))
    with use_backend("triton"):
        differentiate(lambda both: functional.swiglu(*both.chunk(2, -1)), [both])
    storage = both.untyped_storage().data_ptr()
    assert len(seen) == 2 and all(k["up_ptr"].untyped_storage().data_ptr() == storage for k in seen)
    check("swiglu", both.chunk(2, -1))


def test_rows_so_far_apart_that_32_bits_do_not_count_them_are_copied(device):
    far = torch.empty(0, device=device).new_empty(1).as_strided((2, 4), (0, 0))  # no memory behind any stride
    assert swiglu._rows(far).stride() == (4, 1)
    wide = torch.empty(2 * swiglu.MAX_STRIDE + 32, dtype=torch.float16, device=device)
    rows = wide.as_strided((2, 16), (2 * swiglu.MAX_STRIDE, 1))
    assert swiglu._rows(rows).is_contiguous()
    assert swiglu._rows(wide.as_strided((2, 16), (swiglu.MAX_STRIDE, 1))).stride(0) == swiglu.MAX_STRIDE


def test_what_is_kept_for_backward(device):
    """Gate and up, padded, beside the arguments; of the norm one number per row; of the pointwise part nothing."""
    kept = {}
    for name, case in (("rms_norm", (40, 24)), ("swiglu", (40, 24)), ("swiglu_mlp", ((40,), 8, 21, 8))):
        leaves = [t.requires_grad_() for t in inputs_of(name, case, device)]
        storages = {t.untyped_storage().data_ptr() for t in leaves}
        sizes = []

        def pack(tensor, sizes=sizes, storages=storages):
            if tensor.untyped_storage().data_ptr() not in storages:
                sizes.append(tuple(tensor.shape))
            return tensor

        with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            FUNCTIONS[name][0](*leaves)
        kept[name] = sizes
    assert kept == {"rms_norm": [(40,)], "swiglu": [], "swiglu_mlp": [(40, 64)]}


def test_weights_gradients_have_memory_of_their_own(device):
    leaves = [t.requires_grad_() for t in inputs_of("swiglu_mlp", MLPS["aligned"], device)]
    with use_backend("triton"):
        functional.swiglu_mlp(*leaves).sum().backward()
    for leaf in leaves[1:]:
        assert leaf.grad.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_that_are_not_wanted(name, device, poison):
    tensors = inputs_of(name, MLPS["odd"] if name == "swiglu_mlp" else (9, 24), device)
    with use_backend("triton"):
        y, grad, *wants = differentiate(FUNCTIONS[name][0], tensors)
        for i, want in enumerate(wants):
            leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
            (got,) = torch.autograd.grad(FUNCTIONS[name][0](*leaves), leaves[i], grad)
            assert torch.equal(got, want)
        with torch.no_grad():
            assert torch.equal(FUNCTIONS[name][0](*tensors), y)


def test_what_no_kernel_takes_is_named(device):
    x = torch.ones(2, rms_norm.MAX_CHANNELS + 1, device=device)
    ones = torch.ones(3, 3, device=device)
    with use_backend("triton"):
        assert "16385" in backend.explain(functional.rms_norm, x, x[0])
        assert "float64" in backend.explain(functional.rms_norm, ones, ones[0].double())
        assert "float64" in backend.explain(functional.swiglu, ones, ones.double())
        assert rms_norm.unsupported_reason(ones, ones[0].to("meta"), EPS)
        assert swiglu.unsupported_reason(ones, ones.to("meta"))
        assert swiglu_mlp.unsupported_reason(ones, ones, ones.to("meta"), ones)
        assert "dtypes" in swiglu_mlp.unsupported_reason(ones, ones, ones, ones.half())
        assert "float64" in swiglu_mlp.unsupported_reason(ones, ones, ones, ones.double())


def test_blocks_use_them(device):
    x = torch.randn(1, 16, 9, device=device)
    block = fastblocks.ConvNeXt1DBlock(3, 1, 16, 16, variant="msrkit").to(device)
    with use_backend("triton"):
        said = fastblocks.explain(block, x)
    assert "rms_norm: triton" in said and "swiglu: triton" in said and "eager" not in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_cuda_graph(name, device):
    tensors = inputs_of(name, MLPS["341"] if name == "swiglu_mlp" else (300, 128), device)
    with torch.no_grad():
        want = FUNCTIONS[name][0](*tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = FUNCTIONS[name][0](*tensors)
        graph.replay()
    assert torch.equal(y, want)
