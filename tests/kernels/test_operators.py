"""What every operator has by being declared, over all of them."""

import tempfile

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastblocks import functional
from fastblocks.backend import use_backend

pytest.importorskip("triton")

from fastblocks.kernels.operator import all_operators
from tests.compare import relative_error

OPERATORS = all_operators()


def attention(tokens, registers, registers_out, window=(-1, -1), gated=False):
    def make():
        qkv, register_qkv = torch.randn(2, tokens, 48), torch.randn(1, registers, 48) if registers else None
        rope = functional.rope_table(registers + tokens, 8)
        return qkv, rope, 2, window, register_qkv, registers_out, torch.randn(2, tokens, 2) if gated else None

    return "rope_attention", make


def recurrence(gates, inputs, bias, state, keep_gates=None):
    def make():
        sizes = [(2, 3, 2 * inputs), (1, 2, gates * 8, inputs), (1, 2, gates * 8, 8)]
        sizes += [(1, 2, gates * 8)] * 2 if bias else [None, None]
        sizes += [(1, 2, 16) if state else None, (1, 2, 16) if state and gates == 4 else None]
        tensors = [None if size is None else torch.randn(size) / 2 for size in sizes]
        return *tensors, torch.float32, keep_gates

    return "grouped_rnn", make


def depthwise(sizes, kernel, stride, transposed, bias=True, channels_last=False):
    def make():
        x = torch.randn(2, 6, *sizes)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        out = functional.convnext.conv_output_size(sizes, stride, transposed)
        vectors = torch.randn(3, 6)
        weight = torch.randn(6, 1, *kernel)
        bias_and_norm = (vectors[0] if bias else None, vectors[1], vectors[2])
        return x, weight, *bias_and_norm, list(stride), transposed, list(out), 1e-6, torch.float32

    return "depthwise_conv_layer_norm", make


def bias_leaky_relu(*sizes, dtype=torch.float32, channels_last=False):
    def make():
        x = torch.randn(sizes).to(dtype)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
        return x, torch.randn(sizes[1]), 0.2

    return "bias_leaky_relu", make


def mlp(dtype, residual, c_out=6):
    def make():
        sizes = [(2, 5, 3, 7), (28, 7), (28,), (c_out, 28), (c_out,), (2, c_out, 5, 3)]
        *tensors, last = (torch.randn(size).to(dtype) for size in sizes)
        return *tensors, last if residual else None, dtype

    return "convnext_mlp", make


def rows(name, *sizes, dtype=torch.float32):
    """Tensors of these sizes, and what the operator takes beside them."""

    def make():
        tensors = [(torch.randn(size) / (size[-1] ** 0.5 if i else 1)).to(dtype) for i, size in enumerate(sizes)]
        return *tensors, *{"rms_norm": (1e-6,), "swiglu": (), "swiglu_mlp": (dtype,)}[name]

    return name, make


def roformer(dtype, registers=0, registers_out=False, stream=None, window=-1):
    def make():
        tokens, channels, hidden = 5, 16, 21
        sizes = [(2, tokens, channels), (3 * channels, channels), (channels, channels), (hidden, channels)]
        sizes += [(hidden, channels), (channels, hidden), (channels,), (channels,)]
        tensors = [(torch.randn(size) / (size[-1] ** 0.5 if len(size) == 2 else 1)).to(dtype) for size in sizes]
        rope = functional.rope_table(registers + tokens, channels // 2)
        memory = torch.randn(1, registers, channels).to(stream or dtype) if registers else None
        tensors[0] = tensors[0].to(stream or dtype)
        return *tensors, rope, 2, window, memory, registers_out, 1e-6, 0.1, dtype

    return "roformer_block", make


def rnn(dtype, gates, layers, stream=None):
    def make():
        directions, groups, units, hidden = 1, 2, 8, 21
        width = directions * groups * units
        sizes = [(2, 3, width), (layers, directions, groups, gates * units, directions * units)]
        sizes += [(layers, directions, groups, gates * units, units), (hidden, width), (hidden, width)]
        sizes += [(width, hidden), (width,), (width,)]
        tensors = [(torch.randn(size) / (size[-1] ** 0.5 if i else 1)).to(dtype) for i, size in enumerate(sizes)]
        tensors[0] = tensors[0].to(stream or dtype)
        return *tensors, 1e-6, 0.1, dtype

    return "rnn_block", make


def bands(name, dtype, stored=None):
    def make():
        ranges, features = [0, 3, 2, 9, 5, 5, 4, 8], 6
        weight, bias, x = (4, 14, features), (4, features), (2, 9, 5, 2)
        if name == "band_unsplit":
            weight, bias, x = (4, features, 14), (4, 14), (2, features, 5, 4)
        x, weight, bias = (torch.randn(size).to(stored or dtype) for size in (x, weight, bias))
        if name == "band_split":
            return x, weight, bias, ranges, dtype
        return x, weight, bias, torch.linspace(1, 2, 9).to(stored or dtype), ranges, 2, dtype

    return name, make


# by operator: tensors that take no gradient
CONSTANTS = {"rope_attention": (1,), "roformer_block": (8,), "band_unsplit": (3,)}
WITH_X = {"rope_attention": (4, 6), "roformer_block": (11,)}  # by operator: what has the dtype of x

CASES = {
    "attention, short": attention(18, 0, False),
    "attention, short, registers": attention(18, 2, True, (4, 4), gated=True),
    "attention, long": attention(150, 0, False, (-1, 0), gated=True),
    "attention, long, registers": attention(150, 3, True, (10, 10)),
    "attention, registers that nobody asks": attention(150, 3, False),
    "GRU, fused": recurrence(3, 8, False, True),
    "GRU, projection apart": recurrence(3, 40, True, True),
    "LSTM, fused": recurrence(4, 8, False, False),
    "LSTM, projection apart": recurrence(4, 40, True, True),
    "LSTM, gates kept": recurrence(4, 8, False, True, True),
    "GRU, gates dropped": recurrence(3, 40, False, False, False),
    "depthwise, 1-D": depthwise((19,), (7,), (1,), False),
    "depthwise, 2-D strided": depthwise((7, 9), (3, 5), (2, 3), False, bias=False),
    "depthwise, transposed": depthwise((4, 3), (5, 3), (2, 2), True),
    "depthwise, channels last": depthwise((7, 9), (3, 5), (1, 1), False, channels_last=True),
    "bias, LeakyReLU": bias_leaky_relu(2, 3, 300),
    "bias, LeakyReLU, channels last": bias_leaky_relu(2, 6, 4, 3, dtype=torch.bfloat16, channels_last=True),
    "bias, LeakyReLU, few positions": bias_leaky_relu(3, 6, 4, dtype=torch.float16),
    "MLP, float32": mlp(torch.float32, True),
    "MLP, fused": mlp(torch.bfloat16, True),
    "MLP without a residual": mlp(torch.float16, False, 9),
    "RMSNorm": rows("rms_norm", (2, 5, 7), (7,)),
    "RMSNorm of one row": rows("rms_norm", (7,), (7,)),
    "RMSNorm, bfloat16": rows("rms_norm", (70, 24), (24,), dtype=torch.bfloat16),
    "SwiGLU": rows("swiglu", (2, 5, 7), (2, 5, 7)),
    "SwiGLU of one row": rows("swiglu", (32,), (32,)),
    "SwiGLU MLP": rows("swiglu_mlp", (2, 5, 6), (21, 6), (21, 6), (9, 21)),
    "RNN block, float32": rnn(torch.float32, 3, 2),
    "RNN block, fused": rnn(torch.float16, 4, 1, stream=torch.float32),
    "RoFormer block, float32": roformer(torch.float32),
    "RoFormer block, fused": roformer(torch.bfloat16, 2, True, stream=torch.float32, window=3),
    "split": bands("band_split", torch.float32),
    "split, autocast": bands("band_split", torch.bfloat16, stored=torch.float32),
    "unsplit": bands("band_unsplit", torch.float32),
    "unsplit, float16": bands("band_unsplit", torch.float16),
    "SwiGLU MLP, bfloat16": rows("swiglu_mlp", (11, 8), (32, 8), (32, 8), (8, 32), dtype=torch.bfloat16),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def leaves_of(name, make, device):
    """The operator, its arguments on the device, and the ones among them that take gradients."""
    operator, arguments = OPERATORS[name], list(make())
    differentiable = []
    for i, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            arguments[i] = value.to(device)
            if i not in CONSTANTS.get(name, ()):
                arguments[i].requires_grad_()
                differentiable.append(arguments[i])
    return operator, arguments, differentiable


def results_and_gradients(operator, arguments, differentiable, cotangents=None):
    results = [r for r in operator(*arguments)[: operator.results] if r is not None and r.numel()]
    cotangents = cotangents or [torch.randn_like(r) for r in results]
    return results, list(torch.autograd.grad(results, differentiable, cotangents)), cotangents


def test_every_operator_has_a_case():
    assert set(OPERATORS) == {name for name, _ in CASES.values()}


@every_case
def test_opcheck(case, device):
    operator, arguments, _ = leaves_of(*case, device)
    torch.library.opcheck(operator._forward_op, (*arguments, False))


@every_case
def test_compiles_as_one_graph_with_the_same_bits(case, device):
    operator, arguments, differentiable = leaves_of(*case, device)
    results, grads, cotangents = results_and_gradients(operator, arguments, differentiable)
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: operator(*a), fullgraph=True, backend="aot_eager")
    compiled.results = operator.results
    again = results_and_gradients(compiled, arguments, differentiable, cotangents)
    for got, want in zip([*again[0], *again[1]], [*results, *grads], strict=True):
        assert torch.equal(got, want)


class Watching(TorchDispatchMode):
    """Somebody who sees every operator."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen.add(str(function))
        return function(*arguments, **(keywords or {}))


@every_case
def test_who_watches_sees_one_operator_and_the_same_bits(case, device, poison):
    operator, arguments, differentiable = leaves_of(*case, device)
    results, grads, cotangents = results_and_gradients(operator, arguments, differentiable)
    with Watching() as mode:
        again = results_and_gradients(operator, arguments, differentiable, cotangents)
    assert {f"fastblocks.{operator.name}.default", f"fastblocks.{operator.name}_backward.default"} <= mode.seen
    for got, want in zip([*again[0], *again[1]], [*results, *grads], strict=True):
        assert torch.equal(got, want) and got.isfinite().all()


def strided(tensor):
    """The same values with other strides: every second element of a larger tensor, along the last dimension."""
    wide = torch.stack((tensor, torch.full_like(tensor, float("nan"))), -1)
    return wide[..., 0]


def expanded_where_it_is_constant(tensor):
    """The first entry of the first dimension for all of them, without a copy."""
    return tensor[:1].expand_as(tensor)


def far_apart(tensor):
    """The same values, 2^31 elements apart along a dimension after the first: most of the memory is a file's hole."""
    dim = next((d for d in range(1, tensor.dim()) if tensor.size(d) > 1), None)
    if dim is None or tensor.device.type != "cpu":
        return tensor
    sizes = list(tensor.shape)
    strides = torch.empty([1 if d == dim else size for d, size in enumerate(sizes)], device="meta").stride()
    stride = 2**31 // (sizes[dim] - 1) + 1
    with tempfile.NamedTemporaryFile() as file:
        elements = stride * (sizes[dim] - 1) + tensor.numel()
        memory = torch.from_file(file.name, shared=True, size=elements, dtype=tensor.dtype)
    apart = memory.as_strided(sizes, [stride if d == dim else strides[d] for d in range(len(sizes))])
    return apart.copy_(tensor)


LAYOUTS = {"strided": strided, "expanded": expanded_where_it_is_constant, "far apart": far_apart}


@every_case
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_arguments_of_any_strides(case, layout, device):
    """All of them at once: an argument that is read as if it were contiguous shows in what follows from it."""
    operator, arguments, _ = leaves_of(*case, device)
    unusual = [layout(a.detach()) if i in operator.tensors and a is not None else a for i, a in enumerate(arguments)]
    plain = [a.clone(memory_format=torch.contiguous_format) if isinstance(a, torch.Tensor) else a for a in unusual]
    takes = [i for i in operator.tensors if i not in CONSTANTS.get(operator.name, ()) and arguments[i] is not None]
    found, cotangents = [], None
    for given in (plain, unusual):
        results, grads, cotangents = results_and_gradients(
            operator, given, [given[i].requires_grad_() for i in takes], cotangents
        )
        found.append([*results, *grads])
    for got, want in zip(*found, strict=True):  # of other layouts sums may have another order
        bound = 1e-5 if got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps
        assert relative_error(got, want) < bound


@every_case
def test_only_what_is_needed_gets_a_gradient(case, device):
    """One argument at a time wants a gradient; it is the one that it gets among all."""
    operator, arguments, differentiable = leaves_of(*case, device)
    _, grads, cotangents = results_and_gradients(operator, arguments, differentiable)
    for leaf, want in zip(differentiable, grads, strict=True):
        given = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        index = next(i for i, a in enumerate(arguments) if a is leaf)
        given[index].requires_grad_()
        _, (got,), _ = results_and_gradients(operator, given, [given[index]], cotangents)
        assert torch.equal(got, want)


@every_case
def test_second_derivatives_under_autocast(case, device):
    """The formula runs under the autocast of the forward pass, not under that of the backward pass."""
    operator, arguments, _ = leaves_of(*case, device)
    given = [a.detach().float().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    for i in CONSTANTS.get(operator.name, ()):
        given[i].requires_grad_(False)
    dtype_at = [i for i, a in enumerate(given) if isinstance(a, torch.dtype)]
    for x_dtype in (torch.float32, torch.bfloat16):
        given[0] = given[0].detach().to(x_dtype).requires_grad_()
        for i in WITH_X.get(operator.name, ()):
            if given[i] is not None:
                given[i] = given[i].detach().to(x_dtype).requires_grad_()
        for i in dtype_at:
            given[i] = torch.bfloat16
        leaves = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
        with torch.autocast(device.type, torch.bfloat16):
            results = [r for r in operator(*given)[: operator.results] if r is not None]
        first = torch.autograd.grad(sum(r.float().square().sum() for r in results), leaves, create_graph=True)
        assert [g.dtype for g in first] == [leaf.dtype for leaf in leaves]
        second = torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in second)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_case
def test_on_the_second_device(case):
    operator, arguments, differentiable = leaves_of(*case, torch.device("cuda:1"))
    with torch.cuda.device(0):
        results, grads, cotangents = results_and_gradients(operator, arguments, differentiable)
    with torch.cuda.device(1):
        again = results_and_gradients(operator, arguments, differentiable, cotangents)
    for got, want in zip([*again[0], *again[1]], [*results, *grads], strict=True):
        assert torch.equal(got, want)


def test_the_public_functions_run_on_operators(device):
    """`explain` says triton, and autograd's graph names the operator."""
    qkv = torch.randn(1, 6, 48, device=device, requires_grad=True)
    with use_backend("triton"):
        y = functional.rope_attention(qkv, functional.rope_table(6, 8).to(device), 2)
    assert "rope_attention" in y.grad_fn.name()


def large(name):
    """Arguments on the meta device with a batch that no second or third dimension of a grid takes."""
    batch, sizes = 70000, {
        "rope_attention": lambda b: (empty(b, 40, 48), empty(40, 4, 2), 2, (-1, -1), None, False, None),
        "grouped_rnn": lambda b: (
            empty(b, 3, 80), empty(1, 2, 24, 40), empty(1, 2, 24, 8), *[None] * 4, torch.float32, None,
        ),
        "depthwise_conv_layer_norm": lambda b: (
            empty(b, 8, 9), empty(8, 1, 3), empty(8), empty(8), empty(8), [1], False, [9], 1e-6, torch.float32,
        ),
        "convnext_mlp": lambda b: (
            empty(b, 5, 8), empty(32, 8), empty(32), empty(8, 32), empty(8), empty(b, 8, 5), torch.float32,
        ),
        "bias_leaky_relu": lambda b: (empty(b, 8, 40), empty(8), 0.2),
        "rms_norm": lambda b: (empty(1000 * b, 8), empty(8), 1e-6),
        "band_split": lambda b: (empty(b, 9, 70, 2), empty(2, 14, 8), empty(2, 8), [0, 3, 2, 9], torch.float32),
        "band_unsplit": lambda b: (
            empty(b, 8, 70, 2), empty(2, 8, 14), empty(2, 14), empty(9), [0, 3, 2, 9], 2, torch.float32,
        ),
        "swiglu": lambda b: (empty(1000 * b, 8), empty(1000 * b, 8)),
        "rnn_block": lambda b: (
            empty(b, 40, 16), empty(1, 1, 2, 24, 8), empty(1, 1, 2, 24, 8), empty(21, 16), empty(21, 16),
            empty(16, 21), empty(16), empty(16), 1e-6, 1e-6, torch.bfloat16,
        ),
        "roformer_block": lambda b: (
            empty(b, 40, 16), empty(48, 16), empty(16, 16), empty(21, 16), empty(21, 16), empty(16, 21), empty(16),
            empty(16), empty(40, 4, 2), 2, -1, None, False, 1e-6, 1e-6, torch.bfloat16,
        ),
        "swiglu_mlp": lambda b: (empty(1000 * b, 8), empty(21, 8), empty(21, 8), empty(8, 21), torch.float32),
    }  # fmt: skip
    return sizes[name](batch)


def empty(*sizes):
    return torch.empty(sizes, device="meta")


@pytest.mark.parametrize("name", OPERATORS)
def test_no_batch_is_too_large_for_a_grid(name, monkeypatch):
    """CUDA takes 2^31 - 1 programs in the first dimension of a grid, 65535 in the others."""
    from fastblocks.kernels import launch

    grids = []
    monkeypatch.setattr(launch, "_listener", lambda kernel, grid, config, arguments: grids.append(grid))
    OPERATORS[name].rehearse(*large(name))
    assert len(grids) > 1 and all(grid[0] < 2**31 and max((0, *grid[1:])) < 65536 for grid in grids), grids
