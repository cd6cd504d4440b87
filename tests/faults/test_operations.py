"""Every operation's kernels, forward and backward, at small sizes that leave no block full.

`Tensor.device` says "cuda" here, so the package itself takes the way that it takes on a GPU. Results are held against
the float64 references: memory that nobody wrote, or that holds something else, shows there.
"""

import pytest
import torch

from fastblocks import backend, functional
from fastblocks.functional.convnext import conv_output_size
from tests.compare import relative_error
from tests.reference import activations, attention, blocks, convnext, recurrent, rows, spectral

pytestmark = pytest.mark.usefixtures("poison")  # also what an operation allocates below the dispatcher

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Not how exact the kernels are, which tests/kernels holds: a wrong element is off by far more than these.
ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check(operation, reference, leaves, dtype):
    """Results and gradients of the kernels, with everything at the end of its own allocation."""
    leaves = {name: t.to("cuda", dtype).requires_grad_() for name, t in leaves.items()}
    with backend._watch() as decisions:
        results = operation(**leaves)
    assert [decision.backend for decision in decisions] == ["triton"], decisions
    grads = [torch.randn_like(result) for result in results]
    # Not torch.autograd.grad: inside of that call tensors say that they are on the CPU.
    torch.autograd.backward(results, grads)

    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    exact = reference(**wide)
    torch.autograd.backward(exact, [grad.double() for grad in grads])
    for i, (got, want) in enumerate(zip(results, exact, strict=True)):
        assert relative_error(got, want) < ALLOWED[dtype], f"result {i}"
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, wide[name].grad) < ALLOWED[dtype], f"gradient of {name}"


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


# ---- rope_attention --------------------------------------------------------------------------------------------------

# B, T, H, D, window, registers, registers shared, registers out. Up to 64 rows (16 bits: 128) are one program's.
SHORT = {
    "one tile": (2, 13, 2, 16, -1, 0, False, False),
    "two tiles, window": (1, 37, 2, 10, 9, 0, False, False),
    "registers": (2, 29, 2, 8, 8, 3, False, True),
    "shared registers, not asked for": (2, 20, 1, 16, -1, 2, True, False),
}
LONG = {
    "full": (1, 131, 2, 12, -1, 0, False, False),
    "window": (2, 150, 1, 16, 40, 0, False, False),
    "window of one": (1, 131, 1, 16, 1, 0, False, False),
    "registers": (2, 140, 2, 10, 30, 3, False, True),
    "shared registers, not asked for": (2, 140, 1, 16, 70, 5, True, False),
    "registers, full": (1, 133, 1, 16, -1, 2, True, True),
}
LARGER = {
    "rotated in a pass of its own": (1, 1030, 1, 8, -1, 0, False, False),
    "several chunks of keys for the registers": (1, 530, 1, 8, 5, 2, False, True),
    "a head of 128 channels": (1, 70, 1, 128, 20, 2, True, True),
}


def check_attention(case, dtype):
    batch, tokens, heads, dim, window, registers, shared, registers_out = case
    width = 3 * heads * dim
    leaves = {"qkv": torch.randn(batch, tokens, width)}
    if registers:
        leaves["register_qkv"] = torch.randn(1 if shared else batch, registers, width)
    rope = functional.rope_table(registers + tokens, dim).to("cuda")

    def operation(qkv, register_qkv=None):
        keywords = {"window": window, "register_qkv": register_qkv, "return_registers": registers_out}
        results = functional.rope_attention(qkv, rope, heads, **keywords)
        return results if registers_out else (results,)

    def reference(qkv, register_qkv=None):
        return attention.rope_attention(qkv, rope, heads, window, register_qkv)[: 1 + registers_out]

    check(operation, reference, leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=dtype_name)
@pytest.mark.parametrize("name", SHORT)
def test_attention_over_short_sequences(name, dtype):
    check_attention(SHORT[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=dtype_name)
@pytest.mark.parametrize("name", LONG)
def test_attention_over_long_sequences(name, dtype):
    check_attention(LONG[name], dtype)


@pytest.mark.parametrize("name", LARGER)
def test_attention_over_more(name):
    check_attention(LARGER[name], torch.float16)


# ---- grouped_gru, grouped_lstm ---------------------------------------------------------------------------------------

# B, T, G, I, H, N, biases, state. Without biases up to 32 units (float32: 16) the projection is fused.
RECURRENT = {
    "fused": (18, 3, 1, 16, 16, 2, False, False),
    "fused, groups packed, state": (3, 3, 4, 4, 4, 2, False, True),
    "fused, odd sizes": (2, 4, 3, 7, 5, 1, False, True),
    "biases, odd sizes": (9, 3, 3, 7, 5, 2, True, True),
    "projection apart": (3, 3, 2, 40, 8, 2, False, False),
    "projection apart, large groups": (2, 2, 2, 12, 33, 2, True, True),
}


@pytest.fixture
def without_inline_assembly(monkeypatch):
    """bfloat16's tanh is an instruction of PTX, which the checker does not model; float16's formula in its place."""
    from fastblocks.kernels.recurrent import forward

    assert forward.precision_of(torch.empty(0, device="cuda"), torch.bfloat16)["ACTIVATION"] == "hardware"
    monkeypatch.setattr(forward, "HARDWARE_TANH", False)
    assert forward.precision_of(torch.empty(0, device="cuda"), torch.bfloat16)["ACTIVATION"] == "fast"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("gates", [3, 4], ids=["gru", "lstm"])
def test_recurrent(gates, name, dtype, without_inline_assembly):
    check_recurrent(gates, RECURRENT[name], dtype)


@pytest.mark.parametrize("keep_gates", [True, False])
@pytest.mark.parametrize("name", ["fused, groups packed, state", "projection apart, large groups"])
@pytest.mark.parametrize("gates", [3, 4], ids=["gru", "lstm"])
def test_recurrent_with_gates_kept_or_made_again(gates, name, keep_gates):
    check_recurrent(gates, RECURRENT[name], torch.float16, keep_gates)


def test_recurrent_with_the_sums_of_weights_in_slices():
    check_recurrent(3, (3, 347, 1, 17, 16, 1, False, True), torch.float32)  # 1041 rows: two slices of 521 and 520


def check_recurrent(gates, case, dtype, keep_gates=None):
    batch, length, groups, inputs, hidden, directions, bias, state = case
    leaves = {
        "x": torch.randn(batch, length, groups * inputs),
        "weight_ih": torch.randn(directions, groups, gates * hidden, inputs) / inputs**0.5,
        "weight_hh": torch.randn(directions, groups, gates * hidden, hidden) / hidden**0.5,
    }
    if bias:
        leaves |= {name: torch.randn(directions, groups, gates * hidden) for name in ("bias_ih", "bias_hh")}
    if state:
        leaves |= {name: torch.randn(directions, batch, groups * hidden) for name in ("h", "c")[: gates - 2]}

    def operation(x, weight_ih, weight_hh, bias_ih=None, bias_hh=None, h=None, c=None):
        weights, keywords = (weight_ih, weight_hh, bias_ih, bias_hh), {"keep_gates": keep_gates}
        if gates == 3:
            return functional.grouped_gru(x, *weights, state=h, **keywords)
        y, last = functional.grouped_lstm(x, *weights, state=None if h is None else (h, c), **keywords)
        return y, *last

    check(operation, lambda **tensors: recurrent.library(**tensors)[: gates - 1], leaves, dtype)


# ---- depthwise_conv_layer_norm ---------------------------------------------------------------------------------------

# B, C, sizes, kernel, stride, transposed, output size
DEPTHWISE = {
    "aligned": (2, 24, (32,), (7,), (1,), False, None),
    "unaligned": (2, 7, (13,), (7,), (1,), False, None),
    "shorter than the kernel": (2, 5, (3,), (9,), (1,), False, None),
    "33 taps": (1, 4, (40,), (33,), (1,), False, None),
    "130 channels": (1, 130, (20,), (7,), (1,), False, None),
    "stride": (2, 7, (16,), (7,), (2,), False, None),
    "stride beyond the kernel": (1, 7, (17,), (3,), (5,), False, None),
    "transposed": (2, 7, (6,), (7,), (2,), True, (12,)),
    "transposed, stride beyond the kernel": (1, 5, (4,), (3,), (5,), True, (18,)),
    "2-D": (1, 24, (5, 16), (7, 7), (1, 1), False, None),
    "2-D, unaligned": (2, 7, (4, 5), (3, 5), (1, 1), False, None),
    "2-D, stride": (1, 7, (5, 8), (7, 7), (2, 2), False, None),
    "2-D, uneven stride": (1, 5, (7, 4), (3, 3), (4, 1), False, None),
    "2-D, transposed": (1, 7, (3, 4), (7, 7), (2, 2), True, (6, 7)),
    "2-D, transposed, uneven": (1, 5, (2, 4), (3, 5), (3, 1), True, (5, 4)),
}


def check_depthwise(case, dtype, bias=True, layout=lambda x: x):
    batch, channels, sizes, kernel, stride, transposed, wanted = case
    leaves = {"x": torch.randn(batch, channels, *sizes), "weight": torch.randn(channels, 1, *kernel)}
    leaves |= {name: torch.randn(channels) for name in ("bias", "norm_weight", "norm_bias")}
    if not bias:
        del leaves["bias"]
    leaves["x"] = layout(leaves["x"])
    results = conv_output_size(sizes, stride, transposed, wanted)
    keywords = {"stride": stride, "transposed": transposed}

    def operation(x, weight, norm_weight, norm_bias, bias=None):
        parameters = (weight, bias, norm_weight, norm_bias)
        return (functional.depthwise_conv_layer_norm(x, *parameters, output_size=wanted, **keywords),)

    def reference(x, weight, norm_weight, norm_bias, bias=None):
        parameters = (weight, bias, norm_weight, norm_bias)
        return (convnext.depthwise_conv_layer_norm(x, *parameters, sizes=results, **keywords),)

    check(operation, reference, leaves, dtype)


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise(name):
    check_depthwise(DEPTHWISE[name], torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("aligned", torch.float16), ("transposed", torch.bfloat16), ("2-D, unaligned", torch.float16)],
    ids=lambda value: value if isinstance(value, str) else dtype_name(value),
)
def test_depthwise_in_16_bits(name, dtype):
    check_depthwise(DEPTHWISE[name], dtype)


@pytest.mark.parametrize("name", ["unaligned", "2-D, unaligned"])
def test_depthwise_with_channels_last_and_no_bias(name):
    check_depthwise(DEPTHWISE[name], torch.float32, False, lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1))


# ---- convnext_mlp ----------------------------------------------------------------------------------------------------

# B, sizes, C, F, C out, residual. 16 bits are fused: up to 128 channels forward, up to 64 backward.
MLP = {
    "7 channels": (2, (13,), 7, 28, 7, True),
    "2-D": (2, (5, 6), 24, 96, 24, True),
    "more out, no residual": (1, (9,), 7, 28, 24, False),
    "96 channels, several blocks": (1, (67,), 96, 130, 96, True),
    "130 channels": (2, (3,), 130, 150, 130, True),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, dtype) for dtype in DTYPES[::2] for name in MLP), ("2-D", torch.float16)],
    ids=lambda value: value if isinstance(value, str) else dtype_name(value),
)
def test_mlp(name, dtype):
    batch, sizes, channels, hidden, out, residual = MLP[name]
    leaves = {
        "x": torch.randn(batch, *sizes, channels),
        "weight1": torch.randn(hidden, channels) / channels**0.5,
        "bias1": torch.randn(hidden),
        "weight2": torch.randn(out, hidden) / hidden**0.5,
        "bias2": torch.randn(out),
    }
    if residual:
        leaves["residual"] = torch.randn(batch, out, *sizes)
    check(
        lambda residual=None, **tensors: (functional.convnext_mlp(**tensors, residual=residual),),
        lambda **tensors: (convnext.convnext_mlp(**tensors),),
        leaves,
        dtype,
    )


# ---- rms_norm, swiglu, swiglu_mlp ------------------------------------------------------------------------------------

ROWS = {"aligned": (37, 24), "odd": (5, 341), "whole lines of odd rows": (16, 21), "one row": (1, 100)}


def every(cases, dtypes=DTYPES):
    return pytest.mark.parametrize(
        ("name", "dtype"),
        [(name, dtype) for dtype in dtypes for name in cases],
        ids=lambda value: value if isinstance(value, str) else dtype_name(value),
    )


@every(ROWS)
def test_rms_norm(name, dtype):
    n, c = ROWS[name]
    leaves = {"x": torch.randn(n, c), "scale": torch.randn(c)}
    operation = lambda x, scale: (functional.rms_norm(x, scale, 0.1),)  # noqa: E731
    check(operation, lambda x, scale: (rows.rms_norm(x, scale, 0.1),), leaves, dtype)


@every(ROWS)
def test_swiglu(name, dtype):
    leaves = {"gate": torch.randn(ROWS[name]), "up": torch.randn(ROWS[name])}
    check(lambda **tensors: (functional.swiglu(**tensors),), lambda **t: (rows.swiglu(**t),), leaves, dtype)


@every(ROWS, DTYPES[:1])
def test_halves_of_one_product(name, dtype):
    n, f = ROWS[name]
    check(
        lambda both: (functional.swiglu(*both.chunk(2, -1)),),
        lambda both: (rows.swiglu(*both.chunk(2, -1)),),
        {"both": torch.randn(n, 2 * f)},
        dtype,
    )


@every({"odd": (), "aligned": ()})
def test_swiglu_mlp(name, dtype):
    n, c, f, out = (37, 24, 21, 5) if name == "odd" else (17, 16, 32, 16)
    sizes = {"weight_gate": (f, c), "weight_up": (f, c), "weight_down": (out, f)}
    leaves = {"x": torch.randn(n, c)} | {key: torch.randn(size) / size[1] ** 0.5 for key, size in sizes.items()}
    check(lambda **tensors: (functional.swiglu_mlp(**tensors),), lambda **t: (rows.swiglu_mlp(**t),), leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ROWS)
def test_a_sum_normalized_and_its_gradient(name, dtype):
    """What blocks launch: an addend, a residual's gradient, and gradients in place."""
    from fastblocks.kernels.rows import rms_norm

    n, c = ROWS[name]
    x, addend, grad = torch.randn(3, n, c).to("cuda", dtype).unbind()
    x, addend, grad = x.clone(), addend.clone(), grad.clone()  # each at the end of its own allocation
    total, out, grad_x = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    rstd = torch.empty(n, device="cuda")
    rms_norm.forward(x, None, 0.1, out, rstd, addend, total)
    wide = total.double().requires_grad_()
    exact = rows.rms_norm(wide, torch.ones(c, device="cuda", dtype=torch.float64), 0.1)
    torch.autograd.backward([exact], [grad.double()])
    want = wide.grad + grad.double()
    rms_norm.backward(grad, out, rstd, None, grad_x, kept_is_normalized=True, grad_residual=grad)
    rms_norm.backward(grad, total, rstd, None, grad, kept_is_normalized=False, grad_residual=grad)
    for got, right in ((out, exact), (grad_x, want), (grad, want)):
        assert relative_error(got, right) < ALLOWED[dtype]


# ---- bias_leaky_relu -------------------------------------------------------------------------------------------------

MAPS = {"blocks of two rows": (2, 3, 601), "blocks of several": (2, 5, 45), "columns": (3, 5, 2, 3), "one": (1, 1, 40)}


@every(MAPS, DTYPES[::2])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_bias_leaky_relu(name, dtype, layout):
    x = torch.randn(MAPS[name])
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "last" else x
    check(
        lambda x, bias: (functional.bias_leaky_relu(x, bias, 0.2),),
        lambda x, bias: (activations.bias_leaky_relu(x, bias, 0.2),),
        {"x": x, "bias": torch.randn(x.shape[1])},
        dtype,
    )


# ---- feature_matching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(8, 8200, 16), (7, 9001, 3)], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=dtype_name)
def test_feature_matching(sizes, dtype, monkeypatch):
    """All maps lie in one allocation, as the weights below, and their gradients in another."""
    from fastblocks.kernels.losses import feature_matching

    monkeypatch.setattr(feature_matching, "_like", lambda xs: xs[0].new_empty(sum(sizes)).split(sizes))
    real = torch.randn(sum(sizes)).to("cuda", dtype)

    def operation(fake):
        return (functional.feature_matching([real.split(sizes)], [fake.split(sizes)]),)

    def reference(fake):
        pairs = list(zip(fake.split(sizes), real.double().split(sizes), strict=True))
        return (sum((x - y).abs().mean() / (y.abs().mean() + 1e-5) for x, y in pairs) / len(pairs),)

    check(operation, reference, {"fake": torch.randn(sum(sizes))}, dtype)


# ---- band_split, band_unsplit ----------------------------------------------------------------------------------------

# B, T, bins, channels of a bin, channels of a band, ranges
BANDS = {
    "overlapping": (2, 9, 40, 2, 20, [(0, 3), (1, 8), (5, 20), (12, 40)]),
    "one bin each, gaps, none": (1, 70, 7, 2, 8, [(0, 1), (1, 2), (4, 5), (3, 3)]),
    "wide, no order": (1, 3, 70, 3, 130, [(5, 70), (0, 6)]),
}


@every(BANDS, DTYPES[::2])
def test_bands(name, dtype):
    adjacent = dtype != torch.float32  # both layouts of a spectrum, and of bands
    batch, length, bins, channels, features, ranges = BANDS[name]
    width = channels * max(end - start for start, end in ranges)
    filters = torch.zeros(len(ranges), bins, device="cuda")
    for row, (start, end) in zip(filters, ranges, strict=True):
        row[start:end] = 1
    window = filters.sum(0).clamp(min=1)
    leaves = {
        "x": torch.randn(batch, length, bins, channels).transpose(1, 2),
        "weight": torch.randn(len(ranges), width, features) / width**0.5, "bias": torch.randn(len(ranges), features),
        "back": torch.randn(len(ranges), features, width) / features**0.5, "offset": torch.randn(len(ranges), width),
    }  # fmt: skip
    if not adjacent:
        leaves["x"] = leaves["x"].contiguous()

    def split(x, weight, bias):
        return (functional.band_split(x, weight, bias, ranges),)

    def reference_split(x, weight, bias):
        return (
            spectral.band_split({"filterbanks": filters, "pre_bandnet.weight": weight, "pre_bandnet.bias": bias}, x),
        )

    check(split, reference_split, {key: leaves[key] for key in ("x", "weight", "bias")}, dtype)

    def unsplit(y, back, offset):
        return (functional.band_unsplit(y, back, offset, ranges, window.to(y.dtype)),)

    def reference_unsplit(y, back, offset):
        state = {"filterbanks": filters, "ola_window": window, "post_bandnet.weight": back, "post_bandnet.bias": offset}
        return (spectral.band_unsplit(state, y, channels),)

    y = torch.randn(batch, length, len(ranges), features).permute(0, 3, 1, 2)
    y = y if adjacent else y.contiguous()
    check(unsplit, reference_unsplit, {"y": y, "back": leaves["back"], "offset": leaves["offset"]}, dtype)


# ---- roformer_block, rnn_block ---------------------------------------------------------------------------------------


@pytest.fixture
def without_inline_sigmoid(monkeypatch):
    from fastblocks.kernels import runtime
    from fastblocks.kernels.blocks import mlp

    assert mlp.hardware_sigmoid(runtime.architecture(torch.device("cuda")))
    monkeypatch.setattr(mlp, "HARDWARE_SIGMOID", False)


# B, T, C, heads, registers, shared, registers out. 16 bits are fused: up to 128 channels forward, up to 64 backward.
BLOCKS = {
    "8 channels": (2, 9, 8, 1, 0, False, False),
    "24 channels, registers": (2, 35, 24, 1, 3, True, True),
    "64 channels": (1, 67, 64, 2, 0, False, False),
    "96 channels, registers": (1, 35, 96, 3, 2, False, True),
    "136 channels": (1, 5, 136, 4, 0, False, False),
}


def block_leaves(case):
    batch, tokens, channels, _, registers, shared, _ = case
    hidden = int(8 * channels / 3)
    leaves = {
        "x": torch.randn(batch, tokens, channels),
        "weight_qkv": torch.randn(3 * channels, channels) / channels**0.5,
        "weight_out": torch.randn(channels, channels) / channels**0.5,
        **mlp_leaves(channels, hidden),
        "scale_attention": torch.rand(channels) + 0.5,
    }
    if registers:
        leaves["registers"] = torch.randn(1 if shared else batch, registers, channels)
    return leaves


def mlp_leaves(channels, hidden):
    gate, up = (torch.randn(2, hidden, channels) / channels**0.5).unbind()
    down = torch.randn(channels, hidden) / hidden**0.5
    return {"weight_gate": gate, "weight_up": up, "weight_down": down, "scale_mlp": torch.rand(channels) + 0.5}


@every(BLOCKS)
def test_roformer_block(name, dtype, without_inline_sigmoid):
    _, tokens, channels, heads, registers, _, registers_out = BLOCKS[name]
    rope = functional.rope_table(registers + tokens, channels // heads).to("cuda")

    def operation(**tensors):
        results = functional.roformer_block(rope=rope, n_head=heads, return_registers=registers_out, **tensors)
        return results if registers_out else (results,)

    def reference(**tensors):
        return blocks.roformer_block_of(rope=rope, n_head=heads, **tensors)[: 1 + registers_out]

    check(operation, reference, block_leaves(BLOCKS[name]), dtype)


def test_a_float32_stream_around_products_in_16_bits(without_inline_sigmoid):
    """As under autocast, which the checker's device does not have."""
    from fastblocks.kernels.blocks.roformer_block import OPERATOR

    _, tokens, channels, heads, *_ = BLOCKS["24 channels, registers"]
    rope = functional.rope_table(3 + tokens, channels // heads).to("cuda")
    leaves = {key: t.to("cuda").requires_grad_() for key, t in block_leaves(BLOCKS["24 channels, registers"]).items()}
    order = ("x", "weight_qkv", "weight_out", "weight_gate", "weight_up", "weight_down", "scale_attention", "scale_mlp")
    tensors = [leaves[key] for key in order]
    results = OPERATOR(*tensors, rope, heads, -1, leaves["registers"], True, 1e-6, 1e-6, torch.bfloat16)[:2]
    grads = [torch.randn_like(result) for result in results]
    torch.autograd.backward(results, grads)
    wide = {key: t.detach().double().requires_grad_() for key, t in leaves.items()}
    exact = blocks.roformer_block_of(rope=rope, n_head=heads, **wide)
    torch.autograd.backward(exact, [grad.double() for grad in grads])
    for got, want in zip(results, exact, strict=True):
        assert got.dtype == torch.float32 and relative_error(got, want) < ALLOWED[torch.bfloat16]
    for key, leaf in leaves.items():
        assert relative_error(leaf.grad, wide[key].grad) < ALLOWED[torch.bfloat16], key


# B, T, C, G, layers, gates
RNN_BLOCKS = {"24 channels": (3, 4, 24, 2, 2, 3), "80 channels, projection apart": (2, 3, 80, 2, 1, 4)}


@every(RNN_BLOCKS)
def test_rnn_block(name, dtype, without_inline_assembly, without_inline_sigmoid):
    batch, length, channels, groups, layers, gates = RNN_BLOCKS[name]
    units = channels // groups
    weights = torch.randn(2, layers, 1, groups, gates * units, units) / units**0.5
    leaves = {"x": torch.randn(batch, length, channels), "weight_ih": weights[0], "weight_hh": weights[1]}
    leaves |= mlp_leaves(channels, int(8 * channels / 3)) | {"scale_rnn": torch.rand(channels) + 0.5}
    check(lambda **t: (functional.rnn_block(**t),), lambda **t: (blocks.rnn_block_of(**t),), leaves, dtype)


# ---- spectral_norm, weight_norm --------------------------------------------------------------------------------------

WEIGHTS = [(5, 3, 7), (1, 9), (9, 1), (35, 40, 5)]  # one weight and one output; several tiles of rows and of columns


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=dtype_name)
@pytest.mark.parametrize("kind", ["spectral", "spectral, evaluation", "weight"])
def test_norms_of_weights(kind, dtype):
    """The checker knows an allocation by the pointer that a kernel gets, so all weights lie in one, and their vectors:
    who reads a neighbour gets wrong numbers, who reads beyond the last a fault."""
    outputs, inputs = [size[0] for size in WEIGHTS], [size[1:].numel() for size in map(torch.Size, WEIGHTS)]
    sizes = [o * n for o, n in zip(outputs, inputs, strict=True)]

    def parts(w):
        return [part.view(size) for part, size in zip(w.split(sizes), WEIGHTS, strict=True)]

    leaves = {"w": torch.cat([torch.randn(size).flatten() for size in WEIGHTS])}
    if kind == "weight":
        leaves["g"] = torch.rand(sum(outputs)) + 0.5

        def lengths(g):
            return [part.view(-1, *[1] * (len(w) - 1)) for part, w in zip(g.split(outputs), WEIGHTS, strict=True)]

        check(
            lambda w, g: tuple(functional.weight_norms(parts(w), lengths(g))),
            lambda w, g: tuple(
                v * length / v.flatten(1).norm(dim=1).view_as(length)
                for v, length in zip(parts(w), lengths(g), strict=True)
            ),
            leaves,
            dtype,
        )
        return
    singular = [torch.linalg.svd(part.flatten(1), full_matrices=False) for part in parts(leaves["w"])]
    us = torch.cat([left[:, 0] for left, _, _ in singular]).to("cuda", dtype).split(outputs)
    vs = torch.cat([right[0] for _, _, right in singular]).to("cuda", dtype).split(inputs)
    check(
        lambda w: tuple(functional.spectral_norms(parts(w), us, vs, n_power_iterations=int(kind == "spectral"))),
        lambda w: tuple(  # us and vs as they are after the iteration
            part / (u.double() @ part.flatten(1) @ v.double()) for part, u, v in zip(parts(w), us, vs, strict=True)
        ),
        leaves,
        dtype,
    )
