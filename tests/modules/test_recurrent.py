"""RNNBlock and GroupedRNN: all kinds of recurrences, independence of groups, streaming, errors."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastblocks
from benchmarks.measure.timing import peak_bytes
from benchmarks.original.generator.RNNBlock import RNNBlock as OriginalRNNBlock
from fastblocks import functional
from fastblocks.generator.RNNBlock import GroupedRNN
from tests.compare import assert_as_exact, assert_close, relative_error
from tests.modules.harness import EXACT, check, randomized, tensors
from tests.reference import blocks

GATES = {"gru": 3, "lstm": 4}
kinds = pytest.mark.parametrize("kind", GATES)


@kinds
@pytest.mark.parametrize("bidirectional", [False, True])
def test_state_dict(kind, bidirectional):
    block = fastblocks.RNNBlock(24, 2, 3, kind, bidirectional)
    hidden = 4 if bidirectional else 8
    want = {"rnn_norm.scale": (24,), "ffn_norm.scale": (24,)}
    want |= {"mlp.c_fc1.weight": (64, 24), "mlp.c_fc2.weight": (64, 24), "mlp.c_proj.weight": (24, 64)}
    for group in range(3):
        for layer in range(2):
            for suffix in ("", "_reverse")[: 1 + bidirectional]:
                want[f"rnn.rnns.{group}.weight_ih_l{layer}{suffix}"] = (GATES[kind] * hidden, 8)
                want[f"rnn.rnns.{group}.weight_hh_l{layer}{suffix}"] = (GATES[kind] * hidden, hidden)
    assert {name: tuple(value.shape) for name, value in block.state_dict().items()} == want
    assert isinstance(block.rnn, GroupedRNN) and GroupedRNN is fastblocks.GroupedRNN


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([2, 4, 6]),
    st.sampled_from(list(GATES)),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_shapes(layers, groups, width, kind, bidirectional, batch, length, dtype):
    module = randomized(fastblocks.RNNBlock(groups * width, layers, groups, kind, bidirectional)).to(dtype)
    reference = partial(blocks.rnn_block, n_groups=groups, n_layer=layers, rnn_type=kind, bidirectional=bidirectional)
    x = torch.randn(batch, length, groups * width, dtype=dtype)
    check(module, reference, x, terms=4 * max(batch * length, 3 * groups * width), jointly=True)


def torch_modules(module, kind):
    """The torch.nn module of each group, with its weights."""
    make = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind]
    hidden = module.rnns[0].weight_hh_l0.shape[1]
    width, layers = module.rnns[0].weight_ih_l0.shape[1], module.n_layer
    for group in module.rnns:
        twin = make(width, hidden, layers, bias=False, batch_first=True, bidirectional=module.bidirectional).double()
        twin.load_state_dict(group.state_dict(), strict=True)
        yield twin


@kinds
@pytest.mark.parametrize("bidirectional", [False, True])
def test_against_torch(kind, bidirectional):
    """Every group is the torch.nn module that holds its weights."""
    module = randomized(GroupedRNN(12, 2, 3, kind, bidirectional)).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    want = torch.cat(
        [rnn(piece)[0] for rnn, piece in zip(torch_modules(module, kind), x.chunk(3, -1), strict=True)], -1
    )
    assert relative_error(module(x), want) < EXACT


@kinds
def test_groups_do_not_mix(kind):
    module = randomized(GroupedRNN(12, 3, 3, kind)).double()
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda item: module(item).sum((0, 1)), x)  # (out, 1, T, in)
    touched = jacobian.abs().sum((1, 2)).unflatten(0, (3, 4)).unflatten(2, (3, 4)).amax((1, 3)) > 0
    assert torch.equal(touched, torch.eye(3, dtype=torch.bool))


@kinds
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 5], [8, 1]])
def test_streaming(kind, pieces):
    """Piece after piece with the state carried gives what the whole does, with all gradients."""
    module = randomized(GroupedRNN(12, 2, 3, kind)).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    whole = module(x)
    state, outputs = None, []
    for piece in x.split(pieces, dim=1):
        y, state = module(piece, state, return_state=True)
        outputs.append(y)
    streamed = torch.cat(outputs, dim=1)
    assert relative_error(streamed, whole) < EXACT
    cotangent = torch.randn_like(whole)
    leaves = [x, *module.parameters()]
    for got, want in zip(
        torch.autograd.grad(streamed, leaves, cotangent), torch.autograd.grad(whole, leaves, cotangent), strict=True
    ):
        assert relative_error(got, want) < EXACT


@kinds
@pytest.mark.parametrize("bidirectional", [False, True])
def test_returned_state_is_that_of_torch(kind, bidirectional):
    """What comes back are the last hidden (and cell) states, and they are accepted again."""
    module = randomized(GroupedRNN(12, 2, 3, kind, bidirectional)).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    y, state = module(x, return_state=True)
    assert relative_error(y, module(x)) < EXACT
    finals = [rnn(piece)[1] for rnn, piece in zip(torch_modules(module, kind), x.chunk(3, -1), strict=True)]
    got = sorted(float(value) for part in tensors(state) for value in part.detach().flatten())
    want = sorted(float(value) for part in tensors(finals) for value in part.detach().flatten())
    assert relative_error(torch.tensor(got), torch.tensor(want)) < EXACT
    assert module(x, state).shape == x.shape


@kinds
def test_state_asks_for_a_gradient(kind):
    module = randomized(GroupedRNN(8, 2, 2, kind)).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    _, state = module(x, return_state=True)
    leaves = [part.detach().requires_grad_() for part in tensors(state)]

    def call(*parts):
        return module(x, parts if kind == "lstm" else parts[0])

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_state_of_another_shape():
    for kind, state in (
        ("gru", torch.zeros(1, 3, 8)),
        ("lstm", (torch.zeros(2, 2, 4),) * 2),
        ("lstm", torch.zeros(2, 2, 8)),
    ):
        with pytest.raises(ValueError, match="state"):
            GroupedRNN(8, 2, 2, kind)(torch.randn(2, 4, 8), state)


def test_large_inputs_saturate():
    """Gates at their ends give neither NaN nor Inf, forward or backward."""
    for kind in GATES:
        module = randomized(GroupedRNN(8, 1, 2, kind))
        x = (1e4 * torch.randn(2, 5, 8)).requires_grad_()
        y = module(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert y.isfinite().all() and gradient.isfinite().all()


def test_capitals_are_accepted():
    torch.manual_seed(0)
    upper = fastblocks.RNNBlock(8, 1, 2, "GRU")
    lower = fastblocks.RNNBlock(8, 1, 2, "gru")
    lower.load_state_dict(upper.state_dict())
    x = torch.randn(1, 4, 8)
    assert torch.equal(upper(x), lower(x))
    assert fastblocks.RNNBlock(8, 1, 2, "LSTM").rnn.rnns[0].weight_hh_l0.shape == (16, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [((10, 1, 3), r"10\b.*\b3\b"), ((15, 1, 3, "gru", True), r"\b5\b"), ((8, 1, 2, "rnn"), "'rnn'")],
)
def test_errors_name_the_numbers(arguments, message):
    for make in (fastblocks.RNNBlock, GroupedRNN):
        with pytest.raises(ValueError, match=message):
            make(*arguments)


@kinds
def test_float32_error_does_not_grow_with_time(kind):
    """A long sequence: gates forget, so rounding does not pile up."""
    module = randomized(GroupedRNN(8, 1, 2, kind))
    x = torch.randn(1, 400, 8)
    want = blocks.grouped_rnn(
        {name: value.double() for name, value in module.state_dict().items()},
        x.double(),
        n_groups=2,
        n_layer=1,
        rnn_type=kind,
    )
    assert_close(module(x)[:, -40:], want[:, -40:], 64)


def test_a_long_sum_of_weight_gradients_is_as_exact_as_the_library_s():
    """4096 steps of one sign: summed in one product they lose a digit."""
    from tests.reference import recurrent as reference

    x, grad = torch.rand(64, 64, 16), torch.rand(64, 64, 16)
    weights = [torch.randn(1, 2, 24, 8) / 3 for _ in range(2)]
    found = []
    for function, dtype in ((functional.grouped_gru, torch.float32), (reference.library, torch.float32),
                            (reference.library, torch.float64)):  # fmt: skip
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *weights)]
        extra = (None,) * 4 if function is reference.library else ()
        y = function(*leaves, *extra)[0]
        found.append(torch.autograd.grad(y, leaves, grad.to(dtype)))
    for what, ours, theirs, exact in zip(("x", "weight_ih", "weight_hh"), *found, strict=True):
        assert_as_exact(ours, theirs, exact, what)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_under_autocast_on_a_cpu_is_the_library_s(bidirectional):
    """oneDNN's bfloat16 LSTM, group by group, as the original runs it; in float32 it took 1.2 times as long."""
    block = fastblocks.RNNBlock(16, 2, 2, "lstm", bidirectional)
    original = OriginalRNNBlock(16, 2, 2, "lstm", bidirectional)
    original.load_state_dict(block.state_dict())
    x = torch.randn(3, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = block.rnn(x), original.rnn(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want)


def test_a_gru_trains_in_little_memory():
    """In outputs: 8.2 before the backward pass's last products, 11 in all; the products of every step would be 20."""
    rnn, x = GroupedRNN(128, 1, 8, "gru"), torch.randn(16, 100, 128, requires_grad=True)
    peak = peak_bytes(lambda: rnn(x).sum().backward(), torch.device("cpu"))
    assert peak < 14 * x.nbytes, f"{peak / x.nbytes:.1f} times the output"
