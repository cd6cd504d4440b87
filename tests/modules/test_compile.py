"""torch.compile and torch.export of modules in plain PyTorch: small graphs, one for many lengths, eager's numbers."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import fastblocks
from fastblocks import functional
from tests.compare import assert_close
from tests.modules.harness import randomized, tensors

kinds = pytest.mark.parametrize("kind", ["gru", "lstm"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def training_step(module, x):
    outputs = list(tensors(module(x)))
    loss = sum(out.float().square().mean() for out in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]


def assert_same_step(compiled, module, x, terms):
    for got, want in zip(training_step(compiled, x), training_step(module, x), strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want, terms)


# --- Recurrences


@kinds
def test_the_graph_of_a_recurrent_block_does_not_grow_with_time(kind):
    sizes = []

    def record(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=record, bw_compiler=record)
    seen = {}
    for length in (3, 24):
        torch.compiler.reset()
        sizes.clear()
        module = randomized(fastblocks.RNNBlock(16, 2, 2, kind, True))
        x = torch.randn(2, length, 16, requires_grad=True)
        assert_same_step(torch.compile(module, fullgraph=True, backend=compiler), module, x, 256)
        seen[length] = tuple(sizes)
    assert seen[3] == seen[24] and len(seen[3]) == 2, seen
    assert max(seen[3]) < 200, seen


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_graph_serves_all_lengths_of_a_recurrent_block(kind, dtype):
    """The first length, then any."""
    module = randomized(fastblocks.RNNBlock(8, 2, 2, kind, True)).to(dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (5, 6, 9, 2, 17, 30, 11, 12, 13, 14):
        assert_same_step(compiled, module, torch.randn(2, length, 8, dtype=dtype, requires_grad=True), 256)
    assert counter.frame_count <= 2


@kinds
def test_a_compiled_recurrence_has_eager_s_dtype_under_autocast(kind):
    rnn = randomized(fastblocks.GroupedRNN(8, 1, 2, kind))
    x = torch.randn(2, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
        for got, want in zip(training_step(compiled, x), training_step(rnn, x), strict=True):
            assert got.dtype == want.dtype
            assert_close(got.bfloat16(), want, 64)  # gradients went through bfloat16
        assert rnn(x).dtype == torch.bfloat16
        assert rnn.double()(x.double()).dtype == torch.float64  # as torch.autocast has it


@kinds
@pytest.mark.parametrize("state", [True, False])
def test_compiled_recurrence_with_biases(kind, state):
    rows, states = (3, 1) if kind == "gru" else (4, 2)
    leaves = [torch.randn(size) for size in ((2, 5, 6), (2, 2, rows * 4, 3), (2, 2, rows * 4, 4))]
    leaves += [torch.randn(2, 2, rows * 4) for _ in range(2)]
    leaves += [torch.randn(2, 2, 8) for _ in range(states)] if state else []
    for leaf in leaves:
        leaf.requires_grad_()

    def call(*leaves):
        given = leaves[5:] or None
        if kind == "gru":
            return functional.grouped_gru(*leaves[:5], state=given and given[0])
        y, last = functional.grouped_lstm(*leaves[:5], state=given)
        return y, *last

    results = []
    for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        outputs = function(*leaves)
        loss = sum((i + 1) * out.square().sum() for i, out in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 64)


@kinds
def test_the_operator_is_well_formed(kind):
    """Also without a compiler: gradients, and gradients of gradients."""
    from fastblocks.eager import recurrent

    rows = 3 if kind == "gru" else 4
    inputs = [torch.randn(size, dtype=torch.float64) for size in ((2, 3, 4), (1, 2, rows * 2, 2), (1, 2, rows * 2, 2))]
    inputs += [torch.randn(1, 2, rows * 2, dtype=torch.float64) for _ in range(2)]
    inputs += [torch.randn(1, 2, 4, dtype=torch.float64)] * 1
    inputs += [torch.randn(1, 2, 4, dtype=torch.float64) if kind == "lstm" else None]
    inputs = [None if t is None else t.requires_grad_() for t in inputs]
    torch.library.opcheck(recurrent._operator, tuple(inputs))
    given = [t for t in inputs if t is not None]

    def call(*leaves):
        return recurrent._operator(*leaves, *(None,) * (7 - len(leaves)))[: 2 if kind == "gru" else 3]

    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


@kinds
def test_export_of_a_recurrent_block(kind):
    module = randomized(fastblocks.RNNBlock(8, 1, 2, kind, True))
    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(module, (torch.randn(2, 5, 8),), dynamic_shapes=({1: length},)).module()
    for steps in (5, 2, 37):
        x = torch.randn(2, steps, 8)
        assert_close(program(x), module(x), 64)


# --- Attention


def attention_block(window=6, registers=3):
    return randomized(
        fastblocks.AttentionRegisterRoFormerBlock(16, 2, 300, num_register_tokens=registers, window_size=window)
    )


@pytest.mark.parametrize("window, registers", [(6, 3), (9, 0), (150, 2)])
def test_one_graph_serves_all_lengths_of_windowed_attention(window, registers):
    module = attention_block(window, registers)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (100, 101, 128, 129, 140, 163, 192, 200, 256, 300, *((45, 20, 64, 7) if window < 100 else ())):
        assert_same_step(compiled, module, torch.randn(2, length, 16, requires_grad=True), 1024)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_windowed_attention(strict):
    module = attention_block()
    dynamic = {1: torch.export.Dim.DYNAMIC(min=5, max=300)}
    program = torch.export.export(module, (torch.randn(2, 45, 16),), dynamic_shapes=(dynamic,), strict=strict).module()
    for length in (5, 45, 63, 64, 65, 128, 300):
        x = torch.randn(2, length, 16)
        assert_close(program(x), module(x), 256)


# --- Discriminators

DISCRIMINATORS = {
    "period": lambda: fastblocks.MultiPeriodDiscriminator(periods=[2, 3]),
    "scale": lambda: fastblocks.MultiScaleDiscriminator(48000),
}


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_one_graph_serves_all_lengths_of_a_discriminator(name):
    module = DISCRIMINATORS[name]()
    module(torch.randn(1, 1, 4000))
    module.eval()  # no power iteration between two calls
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (4000, 4001, 4002, 4003, 4004, 4005, 4007, 4155, 4310, 4620):
        x = torch.randn(1, 1, length)
        for got, want in zip(tensors(compiled(x)), tensors(module(x)), strict=True):
            assert_close(got, want, 1024)
    assert counter.frame_count <= 3  # PyTorch's choice of a convolution's implementation may ask for a size


@pytest.mark.parametrize("length", [7, 8, 9, 10, 11, 21, 22, 23])
def test_compiled_reflection(length):
    """Clips around the length of a period, which is 11."""
    module = fastblocks.MultiPeriodDiscriminator(periods=[11]).eval()
    twin = copy.deepcopy(module)
    x = torch.randn(1, 1, length, requires_grad=True)
    compiled = torch.compile(lambda x: module(x)[1][0][0], fullgraph=True, backend="aot_eager")
    got, want = compiled(x), twin(x)[1][0][0]
    assert_close(got, want, 64)
    assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)), 64)
