"""Whole blocks: each kernel by itself, then the block, against float64 and PyTorch's own result in the same dtype."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F

import fastblocks
from benchmarks import original
from benchmarks.measure.kept import kept_bytes
from fastblocks import backend, functional, use_backend
from tests.compare import ROUNDING, assert_as_exact, assert_close, relative_error
from tests.reference.blocks import rnn_block_of as rnn_reference
from tests.reference.blocks import roformer_block_of as reference

pytest.importorskip("triton")

from fastblocks.kernels import launch, runtime
from fastblocks.kernels.blocks import grad_weight, mlp, mlp_backward, norm_linear, pack

HALF = [torch.bfloat16, torch.float16]
EPS = 1e-6


def randn(*size, device, dtype=torch.float32):
    return torch.randn(size, device=device).to(dtype)


def empty(*size, device, dtype=torch.float32):
    return torch.empty(size, device=device, dtype=dtype)


def widen(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def leaves_of(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def check(got, eager, exact, names, independent=None):
    for name, g, e, x in zip(names, got, eager, exact, strict=True):
        error = relative_error(e, x)
        if error < 1e-5 and not torch.cuda.is_available():
            # Float32 throughout. NumPy and the CPU's library sum in orders of their own: a few roundings, and eager's.
            assert_close(g, x, terms=max(1.0, error / ROUNDING[g.dtype]), what=name)
            assert g.dtype == e.dtype, name
        else:
            assert_as_exact(g, e, x, name, independent)


# ---- the parts: operands in 16 bits, results of every kernel in their own dtype --------------------------------------


def parts_of(packed, channels, with_attention):
    """Of packed weights, or of slabs of their gradients: qkv, out and MLP (…, 3, F', C), or the last alone."""
    size = 4 * channels * channels if with_attention else 0
    of_mlp = packed[..., size:].unflatten(-1, (3, -1, channels))
    if not with_attention:
        return [of_mlp]
    return [*packed[..., :size].unflatten(-1, (-1, channels)).split((3 * channels, channels), -2), of_mlp]


@pytest.mark.parametrize("with_attention", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("channels", "hidden"), [(8, 21), (24, 64), (136, 362)])
def test_packed_weights(channels, hidden, dtype, with_attention, device, poison):
    sizes = [(3 * channels, channels), (channels, channels), (hidden, channels), (hidden, channels)]
    sizes += [(channels, hidden), (channels,), (channels,)]
    qkv, out, gate, up, down, scale_attention, scale = (randn(*size, device=device) for size in sizes)
    packed = empty(pack.numbers(channels, hidden, with_attention), device=device, dtype=dtype)
    of_attention = (qkv, out, scale_attention) if with_attention else (None,) * 3
    pack.pack(*of_attention[:2], gate, up, down, of_attention[2], scale, packed)
    *parts, mlp_weight = parts_of(packed, channels, with_attention)
    if with_attention:
        assert torch.equal(parts[0], (qkv * scale_attention).to(dtype)) and torch.equal(parts[1], out.to(dtype))
        flat = pack.parts(packed, channels)
        assert all(torch.equal(a, b.flatten()) for a, b in zip(flat, (*parts, mlp_weight), strict=True))
    assert mlp_weight.shape[1] % pack.PAD == 0 and mlp_weight[:, hidden:].count_nonzero() == 0
    want = torch.stack((gate * scale, up * scale, down.T)).to(dtype)
    assert torch.equal(mlp_weight[:, :hidden], want)


@pytest.mark.parametrize("with_attention", [True, False])
@pytest.mark.parametrize(("slabs_qkv", "slabs_rest"), [(1, 1), (3, 2), (19, 18)])
def test_gradients_of_packed_weights(slabs_qkv, slabs_rest, with_attention, device, poison):
    """Slabs that hold no gradient of a part are NaN there, and are not read; nor is what belongs to padding."""
    channels, hidden = 24, 37
    sizes = [(3 * channels, channels), (channels, channels), (hidden, channels), (hidden, channels)]
    sizes += [(channels, hidden), (channels,), (channels,)]
    weights = [randn(*size, device=device) for size in sizes]
    if not with_attention:
        weights[0] = weights[1] = weights[5] = None
    partial = randn(slabs_qkv, pack.numbers(channels, hidden, with_attention), device=device)
    *of_attention, of_mlp = parts_of(partial, channels, with_attention)
    of_mlp[slabs_rest:], of_mlp[:, :, hidden:] = float("nan"), float("nan")
    if with_attention:
        of_attention[1][slabs_rest:] = float("nan")

    def gradients():
        return pack.unpack(partial, slabs_qkv, slabs_rest, *weights)

    exact = [None if w is None else w.double().requires_grad_() for w in weights]
    qkv, out, gate, up, down, scale_attention, scale = exact
    forms = [gate * scale, up * scale, down.T]
    grads = list(of_mlp[:slabs_rest, :, :hidden].double().sum(0))
    if with_attention:
        forms += [qkv * scale_attention, out]
        grads += [of_attention[0].double().sum(0), of_attention[1][:slabs_rest].double().sum(0)]
    present = [w for w in exact if w is not None]
    want = torch.autograd.grad(forms, present, grads)
    got, again = gradients(), gradients()
    assert [g is None for g in got] == [w is None for w in weights]
    for a, b, right in zip(*([g for g in found if g is not None] for found in (got, again)), want, strict=True):
        assert_close(a, right, terms=max(slabs_qkv, 3 * channels))
        assert torch.equal(a, b)


# rows, C: no multiple of a tile, and one row
ROWS = {"C 8": (37, 8), "C 24": (150, 24), "C 64": (70, 64), "C 96": (33, 96), "C 128, one row": (1, 128)}
every_rows = pytest.mark.parametrize("name", ROWS)
every_half = pytest.mark.parametrize("dtype", HALF, ids=str)
every_stream = pytest.mark.parametrize("stream", [torch.float32, None], ids=["float32 stream", "16-bit stream"])


def normalize(x, dtype):
    """What the baseline multiplies: the norm in float32 or wider, rounded to the products' dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(dtype)


@every_rows
@every_half
@every_stream
def test_norm_linear(name, dtype, stream, device, poison):
    n, channels = ROWS[name]
    stream = stream or dtype
    x, residual = randn(n, channels, device=device, dtype=stream), randn(n, channels, device=device, dtype=stream)
    weight = (randn(3 * channels, channels, device=device) / channels**0.5).to(dtype)
    grad = randn(n, 3 * channels, device=device, dtype=dtype)
    out, normalized = (empty(n, m, device=device, dtype=dtype) for m in (3 * channels, channels))
    rstd, grad_x, alone = empty(n, device=device), torch.empty_like(x), torch.empty_like(x)
    norm_linear.forward(x, weight, out, normalized, rstd, EPS)
    norm_linear.grad_x(grad, normalized, rstd, weight, residual, grad_x)
    norm_linear.grad_x(grad, normalized, rstd, weight, None, alone)
    found = []
    for leaf, w, to in ((*leaves_of(x), weight, dtype), (*widen(x), weight.double(), torch.float64)):
        rows = normalize(leaf, to)
        y = rows @ w.T
        (by_x,) = torch.autograd.grad(y, leaf, grad.to(y.dtype))
        found.append((rows, y, by_x + residual, by_x))
    check((normalized, out, grad_x, alone), *found, ("x̂", "out", "grad_x", "grad_x without a residual"))
    assert_close(rstd, torch.rsqrt(x.double().square().mean(-1) + EPS), terms=channels)


@pytest.mark.parametrize(("n", "out", "channels", "slabs"), [(150, 24, 8, 3), (1, 72, 24, 2), (129, 64, 64, 2)])
@every_half
@pytest.mark.parametrize("grad_dtype", [torch.float32, None], ids=["float32 gradient", "16-bit gradient"])
def test_grad_weight(n, out, channels, slabs, dtype, grad_dtype, device, poison):
    x, grad = randn(n, channels, device=device, dtype=dtype), randn(n, out, device=device, dtype=grad_dtype or dtype)
    partial = empty(slabs, out * channels + 5, device=device)[:, 5:]
    grad_weight.grad_weight(grad, x, partial)
    got = partial.sum(0).view(out, channels)
    assert_close(got, grad.to(dtype).double().T @ x.double(), terms=n)


@pytest.mark.parametrize(("n", "channels", "padded", "slabs"), [(150, 8, 32, 3), (70, 128, 352, 1)])
@every_half
@every_stream
@pytest.mark.parametrize("with_product", [True, False], ids=["product", "none"])
def test_weight_gradients_side_by_side(n, channels, padded, slabs, dtype, stream, with_product, device, poison):
    """The same bits as of one product after the other."""
    sizes = (2 * padded, channels, padded, channels, channels, channels)
    grad_gate_up, normalized, hidden, grad_y, grad_m, addend = (randn(n, s, device=device, dtype=dtype) for s in sizes)
    grad_m = grad_m.to(stream or dtype)
    of_product = (grad_m, addend) if with_product else (None, None)
    rows = 3 * padded + (channels if with_product else 0)
    partial = empty(slabs, rows * channels + 5, device=device)[:, 5:]
    grad_weight.grad_weights(grad_gate_up, normalized, hidden, grad_y, *of_product, partial)
    alone = []
    for grad, x in ((grad_m, addend), (grad_gate_up, normalized), (hidden, grad_y))[0 if with_product else 1 :]:
        alone.append(empty(slabs, grad.shape[1] * channels, device=device))
        grad_weight.grad_weight(grad, x, alone[-1])
    assert torch.equal(partial, torch.cat(alone, 1))


def mlp_inputs(name, dtype, stream, device):
    n, channels = ROWS[name]
    hidden = int(8 * channels / 3)
    x, grad = (randn(n, channels, device=device, dtype=stream) for _ in range(2))
    addend = randn(n, channels, device=device, dtype=dtype)
    weight_out = (randn(channels, channels, device=device) / channels**0.5).to(dtype)
    weight = randn(3, pack.padded(hidden), channels, device=device) / channels**0.5
    weight[:, hidden:] = 0
    return x, grad, addend, weight_out, weight.to(dtype)


def mlp_formula(x, addend, weight_out, weight, dtype):
    """m, x̂ and y: in dtype with x's for the residual, as autocast does, or all in float64."""
    m = x + (addend if weight_out is None else addend @ weight_out.T)
    rows = normalize(m, dtype)
    return m, rows, m + (F.silu(rows @ weight[0].T) * (rows @ weight[1].T)) @ weight[2]


@every_rows
@every_half
@every_stream
@pytest.mark.parametrize("with_product", [True, False], ids=["product", "sum"])
def test_mlp(name, dtype, stream, with_product, device, poison):
    x, _, addend, weight_out, weight = mlp_inputs(name, dtype, stream or dtype, device)
    weight_out = weight_out if with_product else None
    y, normalized, rstd = torch.empty_like(x), torch.empty_like(addend), empty(len(x), device=device)
    mlp.forward(addend, weight_out, x, weight, y, normalized, rstd, EPS)
    wide = [None if t is None else t.double() for t in (x, addend, weight_out, weight)]
    found = [mlp_formula(x, addend, weight_out, weight, dtype), mlp_formula(*wide, torch.float64)]
    check((normalized, y), found[0][1:], found[1][1:], ("x̂", "y"))
    assert_close(rstd, torch.rsqrt(found[1][0].square().mean(-1) + EPS), terms=len(weight_out) if with_product else 1)
    if with_product:
        again = torch.empty_like(x)
        mlp.forward(addend, weight_out, x, weight, again, None, None, EPS)
        assert torch.equal(again, y)


@pytest.mark.parametrize("name", ["C 8", "C 24", "C 64"])
@every_half
@every_stream
@pytest.mark.parametrize("with_product", [True, False], ids=["product", "sum"])
def test_mlp_backward(name, dtype, stream, with_product, device, poison):
    """From what the forward pass keeps, exact here, so that the errors are those of backward alone."""
    x, grad, addend, weight_out, weight = mlp_inputs(name, dtype, stream or dtype, device)
    weight_out = weight_out if with_product else None
    found = []
    for to, make in ((dtype, leaves_of), (torch.float64, widen)):
        leaves = make(*(t for t in (x, addend, weight_out, weight) if t is not None))
        m, _, y = mlp_formula(*leaves[:2], leaves[2] if with_product else None, leaves[-1], to)
        found.append(torch.autograd.grad(y, leaves, grad.to(y.dtype)))
    m = m.detach()
    rstd = torch.rsqrt(m.square().mean(-1) + EPS)
    normalized = (m * rstd[:, None]).to(dtype)
    narrow = None if grad.dtype == dtype else torch.empty_like(normalized)
    grad_x = torch.empty_like(x)
    grad_addend = torch.empty_like(addend) if with_product or narrow is not None else None
    partial = empty(2, weight.numel() + 3, device=device)[:, 3:]
    mlp_backward.grad_x(grad, normalized, rstd.float(), weight, weight_out, grad_x, grad_addend, narrow)
    mlp_backward.grad_weight(grad if narrow is None else narrow, normalized, weight, partial)
    grad_w = partial.sum(0).view(weight.shape).to(dtype)
    hidden = int(8 * x.shape[1] / 3)
    assert grad_w[:, hidden:].count_nonzero() == 0
    got = (grad_x, grad_addend, grad_w) if with_product else (grad_x, grad_w)
    names = ("x", "addend", "weight") if with_product else ("x", "weight")
    pick = (0, 1, 3) if with_product else (0, 2)
    check(got, *([grads[i] for i in pick] for grads in found), names)
    if narrow is not None:
        assert torch.equal(narrow, grad.to(dtype))
        assert with_product or torch.equal(grad_addend, grad_x.to(dtype))


# ---- the block -------------------------------------------------------------------------------------------------------

# B, T, C, heads, registers, shared by the batch, registers out, window
BLOCKS = {
    "C 8, one row": (1, 1, 8, 1, 0, False, False, -1),
    "C 24": (2, 35, 24, 3, 0, False, False, -1),
    "C 24, registers": (2, 9, 24, 1, 3, False, True, 4),
    "C 24, shared registers": (2, 9, 24, 2, 3, True, True, -1),
    "C 24, registers not asked for": (2, 9, 24, 2, 2, True, False, -1),
    "C 64": (1, 70, 64, 4, 0, False, False, -1),
    "C 96, registers": (2, 17, 96, 3, 2, True, True, -1),
    "C 128": (1, 33, 128, 4, 0, False, False, -1),
    "C 136": (1, 9, 136, 4, 0, False, False, -1),
}
MODES = {  # dtype of the parameters, of x, of autocast
    "float32": (torch.float32, torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "float16": (torch.float16, torch.float16, None),
    "autocast": (torch.float32, torch.float32, torch.bfloat16),
    "autocast to float16": (torch.float32, torch.float32, torch.float16),
    "autocast of a 16-bit stream": (torch.float32, torch.bfloat16, torch.bfloat16),
}
NAMES = ("x", "weight_qkv", "weight_out", "weight_gate", "weight_up", "weight_down", "scale_attention", "scale_mlp")


def block_inputs(case, mode, device):
    batch, tokens, channels, _, registers, shared, _, _ = case
    parameters, stream, _ = MODES[mode]
    hidden = int(8 * channels / 3)
    sizes = [(3 * channels, channels), (channels, channels), (hidden, channels), (hidden, channels)]
    sizes += [(channels, hidden), (channels,), (channels,)]
    weights = [
        randn(*s, device=device) / s[1] ** 0.5 if len(s) == 2 else 1 + randn(*s, device=device) / 5 for s in sizes
    ]
    leaves = [randn(batch, tokens, channels, device=device, dtype=stream), *(w.to(parameters) for w in weights)]
    if registers:
        leaves.append(randn(1 if shared else batch, registers, channels, device=device, dtype=stream))
    return leaves


def run(name, case, leaves, mode):
    """Results of one backend, or of the reference."""
    _, tokens, channels, heads, registers, _, registers_out, window = case
    autocast = MODES[mode][2]
    rope = functional.rope_table(registers + tokens, channels // heads).to(leaves[0].device)
    memory = leaves[8] if registers else None
    if name == "reference":
        return reference(*leaves[:8], rope, heads, window=window, registers=memory)[: 1 + registers_out]
    scope = torch.autocast(leaves[0].device.type, autocast) if autocast else contextlib.nullcontext()
    with backend.use_backend(name), scope, backend._watch() as decisions:
        results = functional.roformer_block(
            *leaves[:8], rope, heads, window=window, registers=memory, return_registers=registers_out
        )
    assert decisions[0].operation == "roformer_block" and decisions[0].backend == name, decisions
    return results if registers_out else (results,)


def results_and_gradients(name, case, leaves, mode, grads):
    leaves = widen(*leaves) if name == "reference" else leaves_of(*leaves)
    results = run(name, case, leaves, mode)
    return [
        *results,
        *torch.autograd.grad(results, leaves, [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]),
    ]


def check_block(case, mode, device):
    leaves = block_inputs(case, mode, device)
    count = 1 + case[6]
    batch, tokens, channels, _, registers, *_ = case
    grads = [randn(batch, rows, channels, device=device) for rows in (tokens, registers)[:count]]
    found = [results_and_gradients(name, case, leaves, mode, grads) for name in ("triton", "eager", "reference")]
    names = ["y", "registers out"][:count] + [f"gradient of {name}" for name in (*NAMES, "registers")[: len(leaves)]]
    check(*found, names, independent=batch * (tokens + registers) * channels)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_shape(name, mode, device, poison):
    check_block(BLOCKS[name], mode, device)


@pytest.mark.parametrize("mode", ["autocast to float16", "autocast of a 16-bit stream"])
def test_autocast(mode, device, poison):
    check_block(BLOCKS["C 24, shared registers"], mode, device)


def test_many_partial_sums(device, poison, monkeypatch):
    """As on a large GPU: more slabs than there are tiles of rows of registers."""
    monkeypatch.setattr(runtime, "sm_count", lambda device: 132)
    check_block((5, 60, 8, 1, 2, False, True, -1), "autocast", device)


def test_gradients_are_the_same_bits_twice(device):
    case, mode = BLOCKS["C 24, shared registers"], "autocast"
    leaves = block_inputs(case, mode, device)
    grads = [randn(*size, device=device) for size in ((2, 9, 24), (2, 3, 24))]
    first, second = (results_and_gradients("triton", case, leaves, mode, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", ["autocast", "float32"])
def test_only_one_result_is_used(mode, device, poison):
    """Gradients through the registers' output alone, and through the tokens' alone."""
    case = BLOCKS["C 24, registers"]
    inputs = block_inputs(case, mode, device)
    for used in range(2):
        found = []
        for name in ("triton", "reference"):
            leaves = widen(*inputs) if name == "reference" else leaves_of(*inputs)
            result = run(name, case, leaves, mode)[used]
            weights = torch.linspace(-1, 1, result.numel(), device=device).view_as(result).to(result.dtype)
            found.append(torch.autograd.grad((result * weights).sum(), leaves))
        for got, want in zip(*found, strict=True):
            assert relative_error(got, want) < (0.03 if mode == "autocast" else 1e-5)


# B, T, C, G, layers, gates, directions
RNNS = {
    "GRU": (2, 5, 16, 2, 2, 3, 1),
    "GRU, both directions, one row": (1, 1, 24, 3, 2, 3, 2),
    "LSTM": (3, 4, 24, 2, 1, 4, 1),
    "GRU, projection apart": (2, 3, 80, 2, 2, 3, 1),
    "LSTM, projection apart": (2, 3, 136, 2, 1, 4, 2),
}


def rnn_inputs(case, mode, device):
    batch, length, channels, groups, layers, gates, directions = case
    parameters, stream, _ = MODES[mode]
    units, hidden = channels // groups // directions, int(8 * channels / 3)
    sizes = [(layers, directions, groups, gates * units, n) for n in (directions * units, units)]
    sizes += [(hidden, channels), (hidden, channels), (channels, hidden)]
    weights = [randn(*size, device=device) / size[-1] ** 0.5 for size in sizes]
    weights += [1 + randn(channels, device=device) / 5 for _ in range(2)]
    return [randn(batch, length, channels, device=device, dtype=stream), *(w.to(parameters) for w in weights)]


def run_rnn(name, leaves, mode):
    if name == "reference":
        return rnn_reference(*leaves)
    autocast = MODES[mode][2]
    scope = torch.autocast(leaves[0].device.type, autocast) if autocast else contextlib.nullcontext()
    with backend.use_backend(name), scope, backend._watch() as decisions:
        y = functional.rnn_block(*leaves)
    assert decisions[0].operation == "rnn_block" and decisions[0].backend == name, decisions
    return y


def rnn_results(name, inputs, mode, grad):
    leaves = widen(*inputs) if name == "reference" else leaves_of(*inputs)
    y = run_rnn(name, leaves, mode)
    return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize("mode", ["float32", "float16", "bfloat16", "autocast", "autocast to float16"])
@pytest.mark.parametrize("name", RNNS)
def test_every_rnn(name, mode, device, poison):
    """Two draws are one sample of errors: at these sizes those of one scatter too much."""
    names = ("y", "x", "weight_ih", "weight_hh", "weight_gate", "weight_up", "weight_down", "scale_rnn", "scale_mlp")
    draws = []
    for _ in range(2):
        inputs = rnn_inputs(RNNS[name], mode, device)
        grad = randn(*inputs[0].shape, device=device)
        draws.append([rnn_results(backend, inputs, mode, grad) for backend in ("triton", "eager", "reference")])
    found = [[torch.stack(pair) for pair in zip(*of_one, strict=True)] for of_one in zip(*draws, strict=True)]
    check(*found, names, independent=found[0][0].numel())


def names_of_launches(monkeypatch, function):
    names = []
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_listener", lambda kernel, *rest: names.append(kernel.fn.__name__.strip("_")))
        function()
    return names


@pytest.mark.parametrize("channels", [64, 128])
def test_launches(channels, monkeypatch):
    """One kernel for each step of the walk; nothing else is launched where all of it is fused."""
    c, hidden, meta = channels, int(8 * channels / 3), {"device": "meta", "dtype": torch.float32}
    sizes = [(2, 40, c), (3 * c, c), (c, c), (hidden, c), (hidden, c), (c, hidden), (c,), (c,)]
    arguments = (*(torch.empty(size, **meta) for size in sizes), torch.empty(40, c // 8, 2, **meta), 4, -1, None, False)
    from fastblocks.kernels.blocks.roformer_block import OPERATOR

    arguments = (*arguments, EPS, EPS, torch.bfloat16)
    results = []
    forward = names_of_launches(monkeypatch, lambda: results.extend(OPERATOR._run(*arguments, True)))
    assert forward == [
        "pack_kernel", "norm_linear_forward_kernel", "short_forward_kernel", "block_mlp_forward_kernel",
    ]  # fmt: skip
    saved = [results[i] for i in OPERATOR.saved]
    backward = names_of_launches(
        monkeypatch, lambda: OPERATOR.backward((results[0], None), [True] * 10, *arguments, *saved)
    )
    of_weights = {64: ["block_mlp_grad_weight_kernel", "linear_grad_weight_kernel"], 128: ["block_grad_weight_kernel"]}
    assert len(backward) <= 8 and backward == [
        "block_mlp_grad_x_kernel", *of_weights[channels], "short_backward_kernel", "linear_grad_weight_kernel",
        "norm_linear_grad_x_kernel", "unpack_kernel", "sum_rows_kernel",
    ]  # fmt: skip


# ---- the modules -----------------------------------------------------------------------------------------------------


def of_every_kind(device):
    registers = {"num_register_tokens": 2, "window_size": 4}
    yield fastblocks.RoFormerBlock(16, 2, 9).to(device)
    yield fastblocks.AttentionRegisterRoFormerBlock(16, 2, 9, **registers).to(device)
    for kind in ("gru", "lstm"):
        yield fastblocks.RNNBlock(16, 2, 2, kind, kind == "lstm").to(device)


def test_modules_run_as_one_operation(device):
    x = randn(2, 9, 16, device=device)
    for block in of_every_kind(device):
        with backend.use_backend("triton"):
            assert fastblocks.explain(block, x) in ("roformer_block: triton", "rnn_block: triton")
            y = block(x)
        with backend.use_backend("eager"):
            assert_close(y, block.double()(x.double()), terms=64)


@pytest.mark.parametrize("child", ["att.c_attn", "rnn.rnns.1", "rnn.rnns", "mlp.c_fc2", "ffn_norm"])
def test_a_child_that_is_not_plain_is_called(child, device):
    """It is heard of, and the others still run in kernels."""
    x = randn(2, 9, 16, device=device)
    for block in of_every_kind(device):
        if not hasattr(block, child.split(".")[0]):
            continue
        called = []
        block.get_submodule(child).register_forward_hook(lambda *_, called=called: called.append(1))
        with backend.use_backend("triton"):
            said = fastblocks.explain(block, x).splitlines()
        assert called or child == "rnn.rnns"  # a list has no call
        operation, inner = ("rnn_block", "grouped_") if hasattr(block, "rnn") else ("roformer_block", "rope_attention")
        assert said[0].startswith(f"{operation}: eager (replaced, hooked") and child.split(".")[-1] in said[0]
        assert any(line.startswith(inner) and ": triton" in line for line in said)


def change_data(weight):
    weight.data.mul_(1.5)


def swap_data(weight):
    weight.data = weight.data * 1.5


def in_place(weight):
    with torch.no_grad():
        weight.mul_(1.5)


@pytest.mark.parametrize("change", [change_data, swap_data, in_place], ids=lambda f: f.__name__)
def test_weights_are_read_at_every_call(change, device):
    """Moving averages write through `.data`, which leaves a parameter's address and version as they were."""
    x = randn(1, 5, 16, device=device, dtype=torch.bfloat16)
    block, other = (fastblocks.RoFormerBlock(16, 2, 9).to(device, torch.bfloat16) for _ in range(2))
    with backend.use_backend("triton"), torch.no_grad():
        after = block(x)
        for weight in block.parameters():
            before = after
            change(weight)
            after = block(x)
            assert not torch.equal(after, before)
        assert torch.equal(copy.deepcopy(block)(x), after)
        other(x)
        other.load_state_dict(block.state_dict())
        assert torch.equal(other(x), after)


def test_what_the_kernels_do_not_take(device):
    """`explain` says why, and the block is put together from its parts."""

    def said(block, x):
        with backend.use_backend("triton"):
            return fastblocks.explain(block, x).splitlines()

    x = randn(1, 5, 16, device=device)
    mixed = fastblocks.RoFormerBlock(16, 2, 9).to(device)
    mixed.ffn_norm.half()
    assert said(mixed, x)[0] == "roformer_block: eager (the input is torch.float32, a parameter torch.float16)"
    narrow = fastblocks.RoFormerBlock(16, 4, 9).to(device)
    assert "the head size is 4" in said(narrow, x)[0]
    double = fastblocks.RoFormerBlock(16, 2, 9).to(device).double()
    assert said(double, x.double())[0] == "roformer_block: eager (no kernel for float64)"


@pytest.mark.parametrize("name", ["RoFormerBlock", "RNNBlock"])
def test_training_keeps_less_than_half_of_what_the_original_keeps(name, device):
    arguments = {"RoFormerBlock": (64, 2, 40), "RNNBlock": (64, 1, 4)}[name]
    x = randn(2, 40, 64, device=device).float()
    theirs = kept_bytes(getattr(original, name)(*arguments).to(device), x)
    with use_backend("triton"):
        ours = kept_bytes(getattr(fastblocks, name)(*arguments).to(device), x)
    assert ours < theirs / 2
