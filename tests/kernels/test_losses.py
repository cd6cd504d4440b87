"""Feature matching of many maps in few launches: numbers, derivatives, launches, what is left to plain PyTorch."""

import pytest
import torch

import fastblocks
from fastblocks import backend, functional
from fastblocks.backend import use_backend
from tests.compare import assert_as_exact, relative_error
from tests.kernels.test_norms import Library

pytest.importorskip("triton")

from fastblocks.kernels import launch
from fastblocks.kernels.losses import feature_matching

SHAPES = {"aligned": [(2, 8, 1200), (1, 16, 8), (3, 4, 2)], "odd": [(1,), (3, 5, 7), (2, 4111)]}


def sides(shapes, dtype, device):
    return [[torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in range(2)]


def loss_and_gradients(real, fake, **options):
    leaves = [[x.detach().requires_grad_() for x in fake]]
    loss = functional.feature_matching([real], leaves, **options)
    return [loss, *torch.autograd.grad(loss, leaves[0])]


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_as_exact_as_eager_and_the_same_bits_twice(name, dtype, relative, device, poison):
    real, fake = sides(SHAPES[name], dtype, device)
    fake[0].view(-1)[0] = real[0].view(-1)[0]  # a tie
    with use_backend("triton"), backend._watch() as decisions:
        got = loss_and_gradients(real, fake, relative=relative)
        again = loss_and_gradients(real, fake, relative=relative)
    assert [decision.backend for decision in decisions] == ["triton"] * 2
    with use_backend("eager"):
        eager = loss_and_gradients(real, fake, relative=relative)
        exact = loss_and_gradients([y.double() for y in real], [x.double() for x in fake], relative=relative)
    assert got[1].view(-1)[0] == 0
    for one, twice, plain, want in zip(got, again, eager, exact, strict=True):
        assert torch.equal(one, twice)
        assert_as_exact(one, plain, want, independent=1)  # a map's gradients have one absolute value


def test_every_map_has_its_own_numbers(device):
    """Whole numbers, whose sums have no rounding, and a number that is none."""
    sizes = [5, 8192, 8193, 20000, 1]
    fake = [torch.full((n,), float(i + 1), device=device) for i, n in enumerate(sizes)]
    real = [torch.full((n,), -2.0 * i, device=device) for i, n in enumerate(sizes)]
    fake[0][3] = float("nan")
    with use_backend("triton"):
        differences, magnitudes = feature_matching.feature_matching(fake, real)
        _, *grads = loss_and_gradients(real, fake, relative=False)
    assert torch.equal(differences[1:], torch.tensor([4.0, 7.0, 10.0, 13.0], device=device))
    assert torch.equal(magnitudes, torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0], device=device))
    assert differences[0].isnan() and grads[0].isnan().tolist() == [False, False, False, True, False]
    for grad, n in zip(grads[1:], sizes[1:], strict=True):
        assert relative_error(grad, torch.full((n,), 0.2 / n)) < 1e-6


def test_second_derivatives_and_maps_without_a_gradient(device):
    real, fake = sides(SHAPES["odd"], torch.float32, device)

    def derivatives(dtype):
        scale = torch.ones((), dtype=dtype, device=device, requires_grad=True)
        made = [[fake[0].to(dtype), fake[1].to(dtype) * scale**2, fake[2].to(dtype) * scale]]
        loss = functional.feature_matching([[y.to(dtype) for y in real]], made)
        (first,) = torch.autograd.grad(loss, scale, create_graph=True)
        (plain,) = torch.autograd.grad(loss, scale, retain_graph=True)
        return torch.stack([loss.detach(), first.detach(), plain, torch.autograd.grad(first, scale)[0]])

    with use_backend("triton"):
        got = derivatives(torch.float32)
    with use_backend("eager"):
        assert relative_error(got, derivatives(torch.float64)) < 1e-5


def test_launches(monkeypatch, device):
    """As many for a hundred maps as for one, and of PyTorch's as many as of two numbers a map."""
    counts = []
    monkeypatch.setattr(launch, "_listener", lambda *one: launched.append(one))
    for maps in (1, 100):
        launched = []
        real, fake = sides([(3, 4)] * maps, torch.bfloat16, device)
        for x in fake:
            x.requires_grad_()
        with use_backend("triton"), Library() as library:
            loss = functional.feature_matching([real], [fake])
            assert len(launched) == 2
            loss.backward()
        assert len(launched) == 3
        counts.append(len(library.launched))
    assert counts[0] == counts[1] < 20, counts


def test_moved_saved_tensors(device):
    """Hooks that offload saved tensors give them back at another address; those of checkpointing do so once."""
    real, fake = sides(SHAPES["odd"], torch.float32, device)
    with use_backend("triton"):
        want = loss_and_gradients(real, fake)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: [t.clone()], lambda packed: packed.pop().clone()):
            got = loss_and_gradients(real, fake)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda maps: [m.double() for m in maps], "no kernel for float64"),
        (lambda maps: [maps[0].half(), *maps[1:]], "of several dtypes"),
        (lambda maps: [maps[0], maps[1].mT.contiguous().mT, maps[2]], "not contiguous"),
    ],
)
def test_what_the_kernels_leave_alone(change, reason, device):
    real, fake = (change(side) for side in sides(SHAPES["aligned"], torch.float32, device))
    with use_backend("triton"):
        assert reason in fastblocks.explain(functional.feature_matching, [real], [fake])
        got = functional.feature_matching([real], [fake])
    want = functional.feature_matching([[y.double() for y in real]], [[x.double() for x in fake]])
    assert relative_error(got, want) < 1e-3
