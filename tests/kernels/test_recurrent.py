"""Grouped GRU and LSTM, both backends, against float64 loops over time and against torch's own recurrences."""

import pytest
import torch

from fastblocks import functional
from fastblocks.backend import explain, use_backend
from tests.compare import assert_as_exact, assert_close, relative_error
from tests.reference import recurrent as reference

GPU = torch.cuda.is_available()
KINDS = ("gru", "lstm")
BACKENDS = ("eager", "triton")
NAMES = ("x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "h", "c")

# B, T, G, I, H, N, bias, state
SHAPES = {
    "one group, both directions": (2, 3, 1, 16, 16, 2, False, False),
    "small groups packed": (3, 3, 4, 4, 4, 2, False, True),
    "packed, with biases": (3, 4, 4, 4, 4, 2, True, True),
    "six groups in pairs": (2, 2, 6, 4, 4, 2, False, True),  # four would fill a tile, but six are no multiple
    "odd sizes": (2, 4, 3, 7, 5, 1, True, True),
    "rnn-freq": (17, 3, 2, 16, 8, 2, False, False),
    "not a power of two": (2, 3, 1, 24, 24, 2, True, True),
    "projection apart": (3, 3, 2, 40, 8, 2, True, True),
    "large groups": (2, 3, 2, 12, 33, 2, True, True),
    "one step": (2, 1, 2, 8, 16, 2, True, True),
    "batch of one": (1, 3, 2, 16, 16, 1, False, False),
}
if GPU:
    SHAPES |= {
        "gpu rnn-freq": (1128, 64, 8, 16, 8, 2, False, False),
        "gpu rnn-time": (256, 282, 8, 16, 16, 1, False, False),
        "gpu rnn-wide": (16, 100, 4, 128, 128, 1, True, True),
        "gpu 64": (33, 50, 2, 64, 64, 2, True, True),
        "gpu 100": (5, 20, 1, 30, 100, 2, True, True),
    }


def make(kind, shape, dtype, device):
    """Leaves in `dtype`, and what the outputs are to be multiplied with."""
    batch, length, groups, inputs, hidden, directions, bias, state = shape
    rows = (3 if kind == "gru" else 4) * hidden
    sizes = {
        "x": (batch, length, groups * inputs),
        "weight_ih": (directions, groups, rows, inputs),
        "weight_hh": (directions, groups, rows, hidden),
    }
    scales = {"x": 1, "weight_ih": inputs**-0.5, "weight_hh": hidden**-0.5}
    if bias:
        sizes |= dict.fromkeys(("bias_ih", "bias_hh"), (directions, groups, rows))
    if state:
        sizes |= dict.fromkeys(("h", "c") if kind == "lstm" else ("h",), (directions, batch, groups * hidden))
    leaves = {
        name: (torch.randn(size, device=device) * scales.get(name, 0.5)).to(dtype).requires_grad_()
        for name, size in sizes.items()
    }
    outputs = (batch, length, groups * directions * hidden), *[(directions, batch, groups * hidden)] * 2
    return leaves, [torch.randn(size, device=device).to(dtype) for size in outputs]


def layer(kind, leaves, **keywords):
    """The public function, flattened: y, h, and for an LSTM c."""
    arguments = [leaves.get(name) for name in NAMES[:5]]
    if kind == "gru":
        return functional.grouped_gru(*arguments, state=leaves.get("h"), **keywords)
    state = (leaves["h"], leaves["c"]) if "h" in leaves else None
    y, (h, c) = functional.grouped_lstm(*arguments, state=state, **keywords)
    return y, h, c


def gradients(outputs, cotangents, leaves):
    total = sum((out * grad).sum() for out, grad in zip(outputs, cotangents, strict=False))
    return torch.autograd.grad(total, list(leaves.values()))


def run(function, kind, leaves, cotangents, dtype=None):
    """All outputs and gradients by name, of fresh leaves in `dtype`."""
    leaves = {name: leaf.detach().to(dtype or leaf.dtype).requires_grad_() for name, leaf in leaves.items()}
    outputs = function(kind, leaves)[: 2 if kind == "gru" else 3]
    grads = gradients(outputs, [grad.to(outputs[0].dtype) for grad in cotangents], leaves)
    named = dict(zip(("y", "h_last", "c_last"), outputs, strict=False))
    return named | {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def by_reference(kind, leaves):
    return reference.grouped_rnn(*(leaves.get(name) for name in NAMES))


def by_library(kind, leaves):
    return reference.library(*(leaves.get(name) for name in NAMES))


def check(kind, shape, dtype, device, backend, **keywords):
    leaves, cotangents = make(kind, shape, dtype, device)
    exact = run(by_library if GPU else by_reference, kind, leaves, cotangents, torch.float64)
    with use_backend(backend):
        got = run(lambda *a: layer(*a, **keywords), kind, leaves, cotangents)
    if backend == "eager":
        for name, value in got.items():
            assert_close(value, exact[name], shape[3] + shape[4], name)
        return
    with use_backend("eager"):
        as_exact_as_plain(got, [run(function, kind, leaves, cotangents) for function in (layer, by_library)], exact)


def as_exact_as_plain(got, plain, exact):
    """Errors of a few dozen numbers scatter: each is held against the worse of two plain ways to compute it."""
    for name, value in got.items():
        worse = max((results[name] for results in plain), key=lambda result: relative_error(result, exact[name]))
        assert_as_exact(value, worse, exact[name], name)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_torch(kind):
    leaves, cotangents = make(kind, (2, 5, 3, 4, 5, 2, True, True), torch.float64, "cpu")
    ours, theirs = (run(function, kind, leaves, cotangents) for function in (by_reference, by_library))
    for name, value in ours.items():
        assert relative_error(value, theirs[name]) < 1e-13, name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind, shape, device, backend):
    check(kind, shape, torch.float32, device, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in SHAPES if n.startswith(("small", "projection", "large", "gpu"))])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits(kind, name, dtype, device, backend):
    check(kind, SHAPES[name], dtype, device, backend)


@pytest.mark.parametrize("name", ["small groups packed", "large groups"])
@pytest.mark.parametrize("keep_gates", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gates_kept_or_made_again(kind, keep_gates, name, device):
    check(kind, SHAPES[name], torch.float32, device, "triton", keep_gates=keep_gates)


@pytest.mark.parametrize("kind", KINDS)
def test_deep(kind, device, backend):
    """Three layers, both directions: gradients of all of them."""
    leaves, _ = make(kind, (2, 3, 2, 8, 4, 2, False, False), torch.float32, device)

    def stack(function):
        def call(kind, leaves):
            y = leaves["x"]
            for _ in range(3):
                y, *last = function(kind, {**leaves, "x": y})
            return y, *last

        return call

    cotangents = [torch.randn(2, 3, 16, device=device), *torch.randn(2, 2, 2, 8, device=device)]
    exact = run(stack(by_reference), kind, leaves, cotangents, torch.float64)
    got = run(stack(layer), kind, leaves, cotangents)
    with use_backend("eager"):
        as_exact_as_plain(got, [run(stack(f), kind, leaves, cotangents) for f in (layer, by_library)], exact)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_carried(kind, device, backend):
    """Two halves with the state between them are the whole, gradients included."""
    leaves, cotangents = make(kind, (2, 6, 2, 8, 8, 1, True, True), torch.float32, device)

    def halves(kind, leaves):
        x = leaves["x"]
        first, *state = layer(kind, {**leaves, "x": x[:, :2]})
        second, *state = layer(kind, {**leaves, "x": x[:, 2:], **dict(zip(("h", "c"), state, strict=False))})
        return torch.cat([first, second], 1), *state

    whole, parts = run(layer, kind, leaves, cotangents), run(halves, kind, leaves, cotangents)
    for name, value in parts.items():
        assert relative_error(value, whole[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["rnn-freq", "projection apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_large_inputs(kind, name, dtype, device, backend):
    leaves, cotangents = make(kind, SHAPES[name], dtype, device)
    leaves["x"] = torch.empty_like(leaves["x"]).uniform_(-1e4, 1e4).detach()
    for name, value in run(layer, kind, leaves, cotangents).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
@pytest.mark.parametrize("kind", KINDS)
def test_small_inputs(kind, scale, device, backend):
    """Where tanh is nearly the identity nothing may cancel."""
    leaves, cotangents = make(kind, (2, 3, 1, 16, 16, 1, False, False), torch.float32, device)
    leaves["x"] = (leaves["x"] * scale).detach()
    exact = run(by_reference, kind, leaves, cotangents, torch.float64)
    eager = run(by_library, kind, leaves, cotangents)
    for name, value in run(layer, kind, leaves, cotangents).items():
        assert_as_exact(value, eager[name], exact[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequence(kind, device, backend):
    shape = (4, 20000, 2, 16, 16, 2, False, False) if GPU else (1, 300, 1, 4, 4, 1, False, False)
    leaves, _ = make(kind, shape, torch.float32, device)
    exact = by_library(kind, {name: leaf.detach().double() for name, leaf in leaves.items()})
    with torch.no_grad():
        eager, got = by_library(kind, leaves), layer(kind, leaves)
    for name, *values in zip(("y", "h", "c"), got, eager, exact, strict=False):
        assert_as_exact(*values, name)


@pytest.mark.parametrize("name", ["small groups packed", "large groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_and_no_uninitialised_memory(kind, name, device, poison):
    leaves, cotangents = make(kind, SHAPES[name], torch.float32, device)
    with use_backend("triton"):
        first, second = run(layer, kind, leaves, cotangents), run(layer, kind, leaves, cotangents)
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_slices_do_not_divide(kind, device):
    """1035 rows of B·T are two slices of the weights' gradients, of 518 and 517."""
    leaves, cotangents = make(kind, (345, 3, 1, 17, 4, 1, False, True), torch.float32, device)
    exact = run(by_library, kind, leaves, cotangents, torch.float64)
    with use_backend("triton"):
        got = run(layer, kind, leaves, cotangents)
    for name, value in got.items():
        assert relative_error(value, exact[name]) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_unused_outputs(kind, device, backend):
    """Only the final state is used, or only y: the other gradient is absent, not zero."""
    leaves, cotangents = make(kind, (2, 3, 2, 8, 8, 2, False, True), torch.float32, device)
    for part in (0, 1):
        exact, got = (
            gradients([function(kind, leaves)[part]], [cotangents[part]], leaves) for function in (by_library, layer)
        )
        for name, a, b in zip(leaves, got, exact, strict=True):
            assert relative_error(a, b) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind, device, backend):
    leaves, cotangents = make(kind, (2, 3, 2, 4, 4, 2, True, True), torch.float32, device)

    def second(function, leaves):
        outputs = function(kind, leaves)[: 2 if kind == "gru" else 3]
        total = sum((out.square() * grad.to(out.dtype)).sum() for out, grad in zip(outputs, cotangents, strict=False))
        grads = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), list(leaves.values()))

    doubled = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    for name, got, exact in zip(leaves, second(layer, leaves), second(by_reference, doubled), strict=True):
        assert relative_error(got, exact) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, device, backend):
    """x and weights in float32, the result in autocast's dtype, the weights' gradients in theirs."""
    leaves, cotangents = make(kind, (3, 3, 2, 8, 8, 2, True, False), torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        outputs = layer(kind, leaves)
    assert {out.dtype for out in outputs} == {torch.bfloat16}
    exact = run(by_reference, kind, leaves, cotangents, torch.float64)
    eager = run(by_library, kind, leaves, cotangents, torch.bfloat16)
    assert_as_exact(outputs[0], eager["y"], exact["y"])
    grads = gradients(outputs, [grad.bfloat16() for grad in cotangents], leaves)
    for name, grad in zip(leaves, grads, strict=True):
        assert grad.dtype == torch.float32
        assert_as_exact(grad.bfloat16(), eager[f"grad {name}"], exact[f"grad {name}"], name)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind, device, backend):
    """x as a slice of a larger tensor, and channels first."""
    leaves, cotangents = make(kind, (3, 4, 2, 8, 8, 1, False, False), torch.float32, device)
    wanted = run(layer, kind, leaves, cotangents)["y"]
    for x in (
        torch.stack([leaves["x"]] * 2, 3).detach()[..., 0],
        torch.cat([leaves["x"]] * 2, 1).detach()[:, :4],
        leaves["x"].detach().transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert relative_error(layer(kind, {**leaves, "x": x})[0], wanted) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind, device, backend):
    leaves, cotangents = make(kind, (2, 3, 2, 8, 8, 1, True, False), torch.float32, device)
    compiled = torch.compile(lambda kind, leaves: layer(kind, leaves), fullgraph=True, backend="aot_eager")
    wanted, got = run(layer, kind, leaves, cotangents), run(compiled, kind, leaves, cotangents)
    for name, value in got.items():
        assert relative_error(value, wanted[name]) < 1e-6, name


def test_what_goes_to_the_library(device):
    def said(hidden, dtype=torch.float32):
        leaves, _ = make("gru", (1, 2, 1, 4, hidden, 1, False, False), dtype, device)
        with use_backend("triton"):
            return explain(layer, "gru", leaves)

    assert said(16) == "grouped_gru: triton"
    assert "hidden size 300 is above 64, whose weights fit on the chip: PyTorch's own RNN" in said(300)
    assert "float64" in said(16, torch.float64)


def test_mixed_dtypes_go_to_the_library(device):
    leaves, _ = make("gru", (1, 2, 1, 4, 16, 1, False, False), torch.float32, device)
    leaves["x"] = leaves["x"].detach().bfloat16()
    from fastblocks.kernels.recurrent import operator as recurrent

    assert "differ in dtype" in recurrent.unsupported_reason(*(leaves.get(name) for name in NAMES[:5]), None, None)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graph(kind, device):
    leaves, _ = make(kind, (32, 20, 8, 16, 16, 1, False, False), torch.bfloat16, device)
    with use_backend("triton"), torch.no_grad():
        layer(kind, leaves)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = layer(kind, leaves)
        leaves["x"].copy_(torch.randn_like(leaves["x"]))
        graph.replay()
        assert torch.equal(outputs[0], layer(kind, leaves)[0])
