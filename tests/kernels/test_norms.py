"""Norms of many weights in few launches: numbers, derivatives, launches, what is left to plain PyTorch."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastblocks
from fastblocks import backend, functional
from fastblocks.backend import use_backend
from fastblocks.discriminator._layers import prepared_weights
from tests.compare import assert_as_exact, relative_error

pytest.importorskip("triton")

from fastblocks.kernels import launch
from fastblocks.kernels.norms import config

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(5, 3, 7), (1, 9, 3, 1), (9, 1, 1), (4, 32, 2), (35, 3, 1)]


@pytest.fixture
def small_tiles(monkeypatch):
    """So that these weights are several tiles, and a tile's rows and columns several blocks, full and not."""
    monkeypatch.setattr(config, "ROWS", config.ROWS.with_(BLOCK_N=32))
    monkeypatch.setattr(config, "COLUMNS", config.COLUMNS.with_(BLOCK_O=16))


def unit(n, dtype):
    return torch.nn.functional.normalize(torch.randn(n), dim=0).to(dtype)


def spectral(iterations, dtype, device):
    """weights and vectors that belong to them, and the function of both."""
    weights = [torch.randn(shape) for shape in SHAPES]
    vectors = []
    for weight in weights:
        left, _, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        vectors.append((left[:, 0] + 0.1 * unit(len(left), None), right[0]))
    us, vs = (
        [torch.nn.functional.normalize(v, dim=0).to(device, dtype) for v in of] for of in zip(*vectors, strict=True)
    )

    def call(*weights, wide=False):
        u, v = ([t.double() if wide else t.clone() for t in of] for of in (us, vs))
        return [*functional.spectral_norms(weights, u, v, n_power_iterations=iterations), *u, *v]

    return [weight.to(device, dtype) for weight in weights], call


def weight(dtype, device):
    vs = [torch.randn(shape).to(device, dtype) for shape in SHAPES]
    gs = [torch.rand(len(v), *[1] * (v.dim() - 1)).to(device, dtype) + 0.5 for v in vs]

    def call(*tensors, wide=False):
        return functional.weight_norms(tensors[: len(SHAPES)], tensors[len(SHAPES) :])

    return [*vs, *gs], call


NORMS = {"spectral": partial(spectral, 1), "spectral, evaluation": partial(spectral, 0), "weight": weight}
every_norm = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)


def results_and_gradients(call, tensors, cotangents=None, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = call(*leaves, **options)
    differentiable = [r for r in results if r.requires_grad]
    cotangents = cotangents or [torch.randn_like(r) for r in differentiable]
    cotangents = [c.to(r.dtype) for c, r in zip(cotangents, differentiable, strict=True)]
    return [r.detach() for r in results], list(torch.autograd.grad(differentiable, leaves, cotangents)), cotangents


@every_norm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_eager_and_the_same_bits_twice(make, dtype, device, poison, small_tiles):
    tensors, call = make(dtype, device)
    with use_backend("triton"), backend._watch() as decisions:
        results, grads, cotangents = results_and_gradients(call, tensors)
        again = results_and_gradients(call, tensors, cotangents)
    assert [decision.backend for decision in decisions] == ["triton"] * 2
    with use_backend("eager"):
        eager = results_and_gradients(call, tensors, cotangents)
        exact = results_and_gradients(call, [t.double() for t in tensors], cotangents, wide=True)
    every = zip([*results, *grads], [*again[0], *again[1]], [*eager[0], *eager[1]], [*exact[0], *exact[1]], strict=True)
    for i, (got, twice, plain, want) in enumerate(every):
        assert torch.equal(got, twice)
        if want.norm() > 1e-6 * want.numel() ** 0.5:  # one output, one number: its gradient cancels
            assert_as_exact(got, plain, want, str(i), independent=min(got.numel(), got.shape[0] if got.dim() else 1))


@every_norm
def test_second_derivatives_of_a_part(make, device):
    """One result is not used, and the weights are made of one tensor."""
    tensors, call = make(torch.float32, device)

    def penalty(dtype, wide=False):
        scale = torch.ones((), dtype=dtype, device=device, requires_grad=True)
        results = call(*(t.to(dtype) * scale**2 for t in tensors), wide=wide)[: len(SHAPES) - 1]
        (first,) = torch.autograd.grad(sum((r**3).sum() + r.sum() for r in results), scale, create_graph=True)
        (second,) = torch.autograd.grad(first + sum((r**2).sum() for r in results), scale, allow_unused=True)
        return torch.stack([sum((r**3).sum() for r in results).detach(), first.detach(), second])

    with use_backend("triton"):
        got = penalty(torch.float32)
    with use_backend("eager"):
        want = penalty(torch.float64, True)
    assert relative_error(got, want) < 1e-4


@every_norm
def test_weights_that_nobody_used_get_no_gradient(make, device):
    """None, as from norms one by one: with zeros an optimizer would decay them."""
    tensors, call = make(torch.float32, device)
    for used in (0, 2):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with use_backend("triton"):
            call(*leaves)[used].sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i % len(SHAPES) == used for i in range(len(leaves))]


class Subclass(torch.Tensor):
    pass


class Library(TorchDispatchMode):
    """What PyTorch itself launches on a GPU."""

    def __init__(self):
        super().__init__()
        self.launched = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name not in (
            "empty",
            "empty_like",
            "new_empty",
            "split_with_sizes",
            "view",
            "_unsafe_view",
            "detach",
        ):
            self.launched.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("norm, forward, backward", [("spectral", 3, 2), ("weight", 1, 1)])
@pytest.mark.parametrize("name, count", [("period", 12), ("resolution", 26)])
def test_launches_of_a_discriminator(monkeypatch, norm, name, count, forward, backward, device):
    makers = {
        "period": lambda: fastblocks.MultiPeriodDiscriminator(periods=[2, 3], norm=norm),
        "resolution": lambda: fastblocks.MultiResolutionDiscriminator(window_lengths=[64], norm=norm),
    }
    module, launched = makers[name]().to(device), []
    convs = [child for child in module.modules() if isinstance(child, torch.nn.Conv1d | torch.nn.Conv2d)]
    assert len(convs) == count
    monkeypatch.setattr(launch, "_listener", lambda *one: launched.append(one))
    with use_backend("triton"), prepared_weights(module):
        pass  # the table is copied once
    launched.clear()
    with use_backend("triton"), Library() as library:
        with prepared_weights(module):
            weights = [conv.__dict__["_prepared_weight"] for conv in convs]
        assert (len(launched), library.launched) == (forward, [])
        grads = [torch.ones_like(w) for w in weights]
        library.launched.clear()
        torch.autograd.backward(weights, grads)
    assert (len(launched), library.launched) == (forward + backward, ["cat"])


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda w: w.double(), "no kernel for float64"),
        (lambda w: w.mT.contiguous().mT, "not contiguous"),
        (lambda w: w.as_subclass(Subclass), "subclass"),
    ],
)
def test_what_the_kernels_leave_alone(change, reason, device):
    weights = [change(torch.randn(4, 3, 5, device=device))]
    us, vs = ([unit(n, weights[0].dtype).to(device)] for n in (4, 15))
    with use_backend("triton"), backend._watch() as decisions:
        (got,) = functional.spectral_norms(weights, us, vs)
    assert reason in decisions[0].reason
    assert relative_error(got, weights[0] / (us[0] @ weights[0].flatten(1) @ vs[0])) < 1e-6


@pytest.mark.parametrize("norm", ["spectral", "weight"])
def test_in_one_graph_and_with_tensors_that_hold_nothing(norm, device):
    """What compiles sees the plain formulas, all of a discriminator in one graph, vectors that change in place, too;
    fake tensors find shapes alone."""
    module = fastblocks.MultiFrequencyDiscriminator(1, [32], hidden_channels=1, norm=norm).to(device)
    clip, found = torch.randn(1, 1, 100, device=device), []
    state = {name: value.clone() for name, value in module.state_dict().items()}
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for called in (module, compiled):
        module.load_state_dict(state)
        with use_backend("triton"):
            scores, maps = called(clip)
        grads = torch.autograd.grad(scores[0].sum() + sum(m.square().sum() for m in maps[0]), list(module.parameters()))
        found.append([*scores, *maps[0], *grads, *(value.clone() for value in module.buffers())])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-4
    with FakeTensorMode() as mode, use_backend("triton"):
        fake = fastblocks.MultiFrequencyDiscriminator(1, [32], hidden_channels=1, norm=norm)
        (score,), _ = fake(torch.empty(1, 1, 100))
        score.sum().backward()
    assert score.fake_mode is mode and score.shape == found[0][0].shape
    assert all(p.grad.shape == p.shape for p in fake.parameters())


@every_norm
def test_gradients_one_after_the_other(make, device):
    """As from norms one by one, whose graphs have nothing to do with each other."""
    tensors, call = make(torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with use_backend("triton"):
        _, want, cotangents = results_and_gradients(call, tensors)
        results = call(*leaves)
        for result, cotangent in zip(results, cotangents, strict=False):
            result.backward(cotangent)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, want, strict=True))


@every_norm
def test_a_weight_that_was_changed_gives_no_gradient(make, device):
    tensors, call = make(torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with use_backend("triton"):
        results = call(*leaves)
    with torch.no_grad():
        leaves[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results[1].sum().backward()


def test_a_buffer_that_kernels_changed_is_seen_by_autograd(device):
    weights, us, vs = [torch.randn(4, 6, device=device)], [unit(4, None).to(device)], [unit(6, None).to(device)]
    leaf = torch.ones(4, device=device, requires_grad=True)
    product = (leaf * us[0]).sum()
    with use_backend("triton"):
        functional.spectral_norms(weights, us, vs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("norm", ["spectral", "weight"])
def test_a_discriminator_and_its_gradients(norm, device):
    """One convolution is called twice: its second call makes an iteration of its own, as without the kernels."""
    module = fastblocks.MultiFrequencyDiscriminator(1, [32], hidden_channels=1, norm=norm).to(device)
    first = module.discriminators[0].layers[0].conv
    first.running = False
    clip, found = torch.randn(1, 1, 100, device=device), []
    state = {name: value.clone() for name, value in module.state_dict().items()}

    def once(conv, inputs, out):
        if conv.running:
            return out
        conv.running = True
        again = conv(*inputs)
        conv.running = False
        return again

    first.register_forward_hook(once)
    for name in ("triton", "eager"):
        module.load_state_dict(state)
        with use_backend(name), backend._watch() as decisions:
            scores, maps = module(clip)
        # all weights in one call, and the second call of one convolution
        norms = [decision.backend for decision in decisions if decision.operation.endswith("_norm")]
        assert norms == [name] * 2
        grads = torch.autograd.grad(scores[0].sum() + sum(m.square().sum() for m in maps[0]), list(module.parameters()))
        found.append([*scores, *maps[0], *grads, *(value.clone() for value in module.buffers())])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-4
    assert not any("_prepared_weight" in child.__dict__ for child in module.modules())
