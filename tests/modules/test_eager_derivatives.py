"""The CPU path and the fallback: second derivatives, forward mode, empty sequences, what is kept for backward."""

import gc
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastblocks
from benchmarks.original import functional as original
from fastblocks import functional
from fastblocks.eager import attention, convnext, recurrent, rows
from fastblocks.eager.derivatives import twice_differentiable
from tests.compare import assert_close, relative_error
from tests.modules.cases import BLOCKS
from tests.modules.harness import EXACT, randomized, tensors
from tests.reference import recurrent as reference

KINDS = ("gru", "lstm")
kinds = pytest.mark.parametrize("kind", KINDS)


def recurrence_inputs(kind, dtype=torch.float64, batch=2, length=4, groups=2, width=3, directions=2, bias=True):
    """x, weight_ih, weight_hh, bias_ih, bias_hh and the states, leaves that ask for gradients."""
    gates, states = (3, 1) if kind == "gru" else (4, 2)
    sizes = [(batch, length, groups * width), *[(directions, groups, gates * width, width)] * 2]
    sizes += [(directions, groups, gates * width)] * 2 if bias else []
    leaves = [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]
    leaves += [] if bias else [None, None]
    state = (directions, batch, groups * width)
    return leaves + [torch.randn(state, dtype=dtype, requires_grad=True) for _ in range(states)]


def run_recurrence(kind, x, weight_ih, weight_hh, bias_ih, bias_hh, *state):
    if kind == "gru":
        return functional.grouped_gru(x, weight_ih, weight_hh, bias_ih, bias_hh, state=state[0])
    y, last = functional.grouped_lstm(x, weight_ih, weight_hh, bias_ih, bias_hh, state=state)
    return y, *last


FORMULA = {"gru": recurrent._gru_formula, "lstm": recurrent._lstm_formula}


# --- Second derivatives


def second_derivatives(function, leaves):
    """Gradients, and the gradients of their squares."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    total = sum(out.pow(3).sum() for out in tensors(function(*leaves)))
    first = torch.autograd.grad(total, leaves, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
    return [*first, *second]


def mixed(size, *others):
    """A tensor of `size` that depends on all of the others."""
    numbers = torch.linspace(0.5, 1.5, size.numel(), dtype=torch.float64).view(size)
    return torch.sin(numbers * sum(other.mean() + other.square().mean() for other in others))


def _recurrence_of_itself(kind, run):
    """A recurrence whose weights and states depend on its input, and on each other."""
    _, weight_ih, weight_hh, bias_ih, bias_hh, *state = recurrence_inputs(kind)

    def call(x):
        w = mixed(weight_ih.shape, x)
        u = mixed(weight_hh.shape, x, w)
        states = [mixed(s.shape, x, u) for s in state]
        return run(x, w, u, mixed(bias_ih.shape, w), mixed(bias_hh.shape, x), *states)

    return call, [recurrence_inputs(kind)[0]]


def _swiglu_of_itself(run):
    def call(x):
        return run(x, torch.sin(x) + x.flip(0))

    return call, [torch.randn(5, 4, dtype=torch.float64)]


def _swiglu_mlp_of_itself(run):
    def call(x):
        gate = mixed(torch.Size((16, 4)), x)
        up = mixed(torch.Size((16, 4)), x, gate)
        return run(x, gate, up, mixed(torch.Size((4, 16)), x, up))

    return call, [torch.randn(5, 4, dtype=torch.float64)]


def _rms_norm_of_itself(run):
    def call(x):
        return run(x, mixed(torch.Size((4,)), x), 1e-2)

    return call, [torch.randn(5, 4, dtype=torch.float64)]


def _convnext_mlp_of_itself(run):
    def call(x):
        w1, b1 = mixed(torch.Size((6, 4)), x), mixed(torch.Size((6,)), x)
        w2, b2 = mixed(torch.Size((4, 6)), w1, x), mixed(torch.Size((4,)), b1)
        return run(x, w1, b1, w2, b2, torch.sin(x).movedim(-1, 1))

    return call, [torch.randn(2, 5, 4, dtype=torch.float64)]


def _attention_of_itself(run):
    def call(q):
        k = torch.sin(q) + q.flip(2)
        return run(q, k, q * k, None)

    return call, [torch.randn(1, 2, 5, 4, dtype=torch.float64)]


COMPOSED = {
    "gru": (partial(_recurrence_of_itself, "gru"), partial(run_recurrence, "gru"), FORMULA["gru"]),
    "lstm": (partial(_recurrence_of_itself, "lstm"), partial(run_recurrence, "lstm"), FORMULA["lstm"]),
    "rms_norm": (_rms_norm_of_itself, rows._CPURMSNorm.apply, rows.rms_norm_formula),
    "swiglu": (_swiglu_of_itself, rows._CPUSwiGLU.apply, rows._swiglu_formula),
    "swiglu_mlp": (_swiglu_mlp_of_itself, rows._CPUSwiGLUMLP.apply, rows._swiglu_mlp_formula),
    "convnext_mlp": (_convnext_mlp_of_itself, convnext._CPUConvNeXtMLP.apply, convnext._convnext_mlp_formula),
    "attention": (_attention_of_itself, attention._CPUAttention.apply, attention._attention_formula),
    "library's attention": (_attention_of_itself, attention._library, attention._attention_formula),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_second_derivatives_where_one_input_depends_on_another(name):
    """An input that is an ancestor of another counts once."""
    make, fused, formula = COMPOSED[name]
    function, leaves = make(fused)
    plain, _ = make(formula)
    for got, want in zip(second_derivatives(function, leaves), second_derivatives(plain, leaves), strict=True):
        assert relative_error(got, want) < EXACT


LIBRARY_ATTENTION = [case for case in BLOCKS if case.name in ("roformer", "registers", "window")]


@pytest.mark.parametrize("case", LIBRARY_ATTENTION, ids=lambda case: case.name)
def test_second_derivatives_of_the_library_s_attention(case, monkeypatch):
    """What runs on a GPU where no kernel does: PyTorch's fused attention, whose backward has no derivative."""
    module = case.module()
    used = []

    class Library:
        @staticmethod
        def apply(*inputs):
            used.append(True)
            return attention._library(*inputs)

    monkeypatch.setattr(attention, "_CPUAttention", Library)
    x = case.input()
    results = []
    for dtype in (torch.float32, torch.float64):
        twin = case.make().to(dtype)
        twin.load_state_dict(module.state_dict())
        names = [name for name, _ in twin.named_parameters()]

        def call(x, *values, twin=twin, names=names):
            return torch.func.functional_call(twin, dict(zip(names, values, strict=True)), (x,))

        results.append(second_derivatives(call, [x.to(dtype), *twin.parameters()]))
    assert used
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 256 * case.terms, "second derivative")


def test_second_derivatives_of_the_library_s_recurrence():
    """`_library` is what runs on a GPU; oneDNN's LSTM, here, has no second derivative either."""
    inputs = recurrence_inputs("lstm", torch.float32)
    call = lambda *t: twice_differentiable(recurrent._library, recurrent._lstm_formula, t)  # noqa: E731
    exact = second_derivatives(recurrent._lstm_formula, [t.double() for t in inputs])
    for got, want in zip(second_derivatives(call, inputs), exact, strict=True):
        assert_close(got, want, 1024)


def test_the_first_derivative_is_the_library_s():
    """No formula runs before somebody asks for a second derivative."""

    def never(*inputs):
        raise AssertionError

    inputs = recurrence_inputs("lstm")
    y, *_ = twice_differentiable(recurrent._library, never, inputs)
    want, *_ = recurrent._library(*inputs)
    for got, other in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs), strict=True
    ):
        assert torch.equal(got, other)


def test_inputs_without_a_gradient_get_none():
    x, *rest = recurrence_inputs("lstm")
    rest = [t.detach() for t in rest]
    y, *_ = run_recurrence("lstm", x, *rest)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    y, *_ = run_recurrence("lstm", x.detach(), *rest)
    assert not y.requires_grad


# --- The mode of the library's recurrences


@kinds
@pytest.mark.parametrize("who", ["fallback", "baseline", "reference"])
def test_the_library_runs_in_training_mode_where_gradients_are_needed(who, kind, monkeypatch):
    """cuDNN refuses backward in any other."""
    seen = []
    plain = getattr(torch, kind)

    def spy(*arguments):
        seen.append(arguments[-3])
        return plain(*arguments)

    monkeypatch.setattr(torch, kind, spy)
    x, weight_ih, weight_hh, _, _, *state = recurrence_inputs(kind, bias=False)

    def run(x, weight_ih, weight_hh):
        if who == "fallback":
            recurrent._library(x, weight_ih, weight_hh, None, None, *state)
        elif who == "baseline":
            getattr(original, f"grouped_{kind}")(x, weight_ih, weight_hh)
        else:
            reference.library(x, weight_ih, weight_hh)

    run(x.detach(), weight_ih, weight_hh.detach())
    assert seen and all(seen)
    if who != "reference":  # cuDNN's inference is cheaper
        seen.clear()
        with torch.no_grad():
            run(x, weight_ih, weight_hh)
        assert seen and not any(seen)


# --- Forward mode


def directional_by_double_backward(function, inputs, tangents):
    """J v as the derivative of Jᵀ u by u."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = list(tensors(function(*inputs)))
    weights = [torch.zeros_like(out, requires_grad=True) for out in outputs]
    pulled = torch.autograd.grad(outputs, inputs, weights, create_graph=True, materialize_grads=True)
    total = sum((grad * tangent).sum() for grad, tangent in zip(pulled, tangents, strict=True))
    return torch.autograd.grad(total, weights, materialize_grads=True)


def directional_by_dual_numbers(function, inputs, tangents):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), tangent) for x, tangent in zip(inputs, tangents, strict=True)]
        parts = [forward_ad.unpack_dual(out) for out in tensors(function(*duals))]
    return [torch.zeros_like(part.primal) if part.tangent is None else part.tangent for part in parts]


def check_forward_mode(function, inputs):
    inputs = [x.detach().double() for x in inputs]
    tangents = [torch.randn_like(x) for x in inputs]
    want = directional_by_double_backward(function, inputs, tangents)
    dual = directional_by_dual_numbers(function, inputs, tangents)
    _, jvp = torch.func.jvp(lambda *x: tuple(tensors(function(*x))), tuple(inputs), tuple(tangents))
    for expected, *found in zip(want, dual, jvp, strict=True):
        for got in found:
            assert relative_error(got, expected) < EXACT


MODULES = {case.name: (case.make, case.shape, case.keywords) for case in BLOCKS} | {
    "multi-period": (lambda: fastblocks.MultiPeriodDiscriminator(periods=[2, 3]), (1, 1, 100), {}),
    "multi-scale": (lambda: fastblocks.MultiScaleDiscriminator(48000), (1, 1, 128), {}),
    "multi-resolution": (
        lambda: fastblocks.MultiResolutionDiscriminator(window_lengths=[64], hidden_channels=2),
        (1, 1, 100),
        {},
    ),
    "multi-frequency": (lambda: fastblocks.MultiFrequencyDiscriminator(1, [32], hidden_channels=2), (1, 1, 100), {}),
}


@pytest.mark.parametrize("name", MODULES)
def test_forward_mode_of_modules(name):
    make, shape, keywords = MODULES[name]
    module = randomized(make()).double().eval()
    names = [n for n, _ in module.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,), keywords)

    check_forward_mode(call, [torch.randn(shape), *module.parameters()])


def operations():
    rope = functional.rope_table(12, 4).double()
    conv = [torch.randn(size) for size in ((1, 4, 9), (4, 1, 3), (4,), (4,), (4,))]
    band = fastblocks.Band(16000, 64, 4, 2, 3).double()
    return {
        "rms_norm": (functional.rms_norm, [torch.randn(3, 4), torch.randn(4)]),
        "swiglu": (functional.swiglu, [torch.randn(3, 4), torch.randn(3, 4)]),
        "swiglu_mlp": (functional.swiglu_mlp, [torch.randn(s) for s in ((3, 4), (5, 4), (5, 4), (6, 5))]),
        "rope_attention": (
            lambda qkv, r, gate: functional.rope_attention(
                qkv, rope, 2, window=4, register_qkv=r, return_registers=True, gate=gate
            ),
            [torch.randn(2, 9, 24), torch.randn(1, 3, 24), torch.randn(2, 9, 2)],
        ),
        "depthwise_conv_layer_norm": (partial(functional.depthwise_conv_layer_norm, stride=(2,)), conv),
        "convnext_mlp": (functional.convnext_mlp, [torch.randn(s) for s in ((2, 5, 4), (6, 4), (6,), (3, 6), (3,))]),
        "grouped_gru": (partial(run_recurrence, "gru"), recurrence_inputs("gru")),
        "grouped_lstm": (partial(run_recurrence, "lstm"), recurrence_inputs("lstm")),
        "band": (lambda x: band.unsplit(band.split(x)[:, :3]), [torch.randn(1, 33, 4, 2)]),
    }


@pytest.mark.parametrize("name", operations())
def test_forward_mode_of_operations(name):
    check_forward_mode(*operations()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_forward_mode_does_not_change_the_dtype(kind, dtype):
    inputs = [t.detach() for t in recurrence_inputs(kind, dtype)]
    with forward_ad.dual_level():
        out = run_recurrence(kind, forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0])), *inputs[1:])[0]
        value, tangent = forward_ad.unpack_dual(out)
        assert value.dtype == tangent.dtype == dtype
    assert_close(value, run_recurrence(kind, *[t.double() for t in inputs])[0], 64)


# --- Sequences without a token


@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrence_over_no_steps(kind, bias, dtype):
    """No output, the state as it was, gradients of zero."""
    inputs = recurrence_inputs(kind, dtype, length=0, bias=bias)
    y, *last = run_recurrence(kind, *inputs)
    assert y.shape == (2, 0, 12) and y.dtype == dtype
    for got, want in zip(last, inputs[5:], strict=True):
        assert torch.equal(got, want)
    given = [t for t in inputs if t is not None]
    for leaf, grad in zip(given, torch.autograd.grad(y.sum() + sum(s.sum() for s in last), given), strict=True):
        wanted = torch.ones_like(leaf) if any(leaf is s for s in inputs[5:]) else torch.zeros_like(leaf)
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize("window", [-1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_without_tokens(window, dtype):
    module = randomized(
        fastblocks.AttentionRegisterRoFormerBlock(16, 2, 10, num_register_tokens=2, window_size=window)
    ).to(dtype)
    x = torch.randn(2, 0, 16, dtype=dtype, requires_grad=True)
    y, registers = module(x, return_registers=True)
    assert y.shape == (2, 0, 16) and registers.isfinite().all()
    registers.sum().backward()
    assert x.grad.shape == x.shape and module.registers.grad.isfinite().all()
    assert module(x).shape == (2, 0, 16)


@kinds
def test_block_without_tokens(kind):
    module = fastblocks.RNNBlock(8, 2, 2, kind, True)
    x = torch.randn(2, 0, 8, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == x.shape


# --- What is kept for backward


class Allocations(TorchDispatchMode):
    """Every storage that is made in here, held weakly; not those of the inputs."""

    def __init__(self, inputs):
        super().__init__()
        self.storages = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.storages.values() if not reference.expired())


OPERATIONS = {
    "grouped_gru": (partial(run_recurrence, "gru"), lambda: recurrence_inputs("gru", torch.float32, 4, 50)),
    "grouped_lstm": (partial(run_recurrence, "lstm"), lambda: recurrence_inputs("lstm", torch.float32, 4, 50)),
    "rms_norm": (functional.rms_norm, lambda: [torch.randn(s, requires_grad=True) for s in ((200, 12), (12,))]),
    "swiglu_mlp": (
        functional.swiglu_mlp,
        lambda: [torch.randn(s, requires_grad=True) for s in ((200, 12), (32, 12), (32, 12), (12, 32))],
    ),
    "attention": (
        lambda qkv: functional.rope_attention(qkv, functional.rope_table(50, 4), 3, window=8),
        lambda: [torch.randn(4, 50, 36, requires_grad=True)],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_checkpoint_keeps_nothing(name):
    """All that backward needs goes through hooks on saved tensors, so that a checkpoint frees it."""
    function, make = OPERATIONS[name]
    inputs = make()

    def layer(*inputs):
        """The operation between others, as in a block: nobody else holds its inputs and outputs."""
        return next(tensors(function(*(1.5 * tensor for tensor in inputs)))).sin()

    allocations = Allocations(inputs)
    with allocations:
        y = checkpoint(layer, *inputs, use_reentrant=False)
    kept = allocations.alive()
    assert kept <= y.nbytes + 2**13, f"{kept} bytes for an output of {y.nbytes}"  # a random generator's state: 5 KB
    want = torch.autograd.grad(layer(*inputs).square().sum(), inputs, allow_unused=True)
    got = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@kinds
def test_saved_tensors_can_be_moved_away(kind):
    inputs = recurrence_inputs(kind, torch.float32)
    want = torch.autograd.grad(run_recurrence(kind, *inputs)[0].square().sum(), inputs)
    packed = []

    def pack(tensor):
        packed.append(tensor.nbytes)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run_recurrence(kind, *inputs)[0]
    assert sum(packed) > 4 * y.nbytes  # gates or a workspace among them
    for got, other in zip(torch.autograd.grad(y.square().sum(), inputs), want, strict=True):
        assert torch.equal(got, other)


@kinds
def test_backward_twice(kind):
    inputs = recurrence_inputs(kind)
    y = run_recurrence(kind, *inputs)[0].square().sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, inputs), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs)
