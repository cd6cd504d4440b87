"""Derivatives of operations that are put together, as blocks and losses do it: a tensor reaches an operation in two
places, or one input is made from another. A backward pass that counts a path twice is right wherever inputs are
independent leaves, and wrong here."""

import pytest
import torch

from fastblocks import backend
from fastblocks.backend import use_backend
from tests.compare import relative_error
from tests.kernels.operations import OPERATIONS

pytest.importorskip("triton")

# A few roundings of sums; a path that is counted twice or not at all changes them by tens of percent.
ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2}


def twice(f, x, rest):
    return f(x=f(x=x, **rest), **rest)


def residual(f, x, rest):
    return x + f(x=x, **rest)


def others_made_from_x(f, x, rest):
    return f(x=x, **{name: t * (1 + x.mean()) for name, t in rest.items()})


def x_made_from_the_others(f, x, rest):
    return f(x=x * sum(t.mean() for t in rest.values()), **rest)


def a_tensor_in_two_places(f, x, rest):
    """Every input that has another's shape is that other."""
    first = {}
    for t in (x, *rest.values()):
        first.setdefault(t.shape, t)
    return f(x=x, **{name: first[t.shape] for name, t in rest.items()})


def one_made_from_the_next(f, x, rest):
    """Inputs of one shape, each made from the one before."""
    made, latest = {}, {}
    for name, t in {"x": x, **rest}.items():
        made[name] = t * latest[t.shape] if t.shape in latest else t
        latest[t.shape] = made[name]
    return f(**made)


COMPOSITIONS = (twice, residual, others_made_from_x, x_made_from_the_others, a_tensor_in_two_places,
                one_made_from_the_next)  # fmt: skip


def derivatives(function, composition, leaves):
    """y, all first derivatives of Σ y², and all derivatives of the sum of their squares."""
    y = composition(function, leaves["x"], {name: leaf for name, leaf in leaves.items() if name != "x"})
    used = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(y.square().mean(), list(leaves.values()), create_graph=True, **used)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), list(leaves.values()), **used)
    names = [f"{order} derivative by {name}" for order in ("first", "second") for name in leaves]
    return {"y": y} | dict(zip(names, (*first, *second), strict=True))


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives(name, composition, device):
    operation = OPERATIONS[name]
    leaves = {key: leaf.requires_grad_() for key, leaf in operation.leaves(device).items()}
    wide = {key: leaf.detach().double().requires_grad_() for key, leaf in leaves.items()}
    with use_backend("triton"), backend._watch() as decisions:
        got = derivatives(operation.run, composition, leaves)
    assert {decision.backend for decision in decisions} == {"triton"}, decisions
    wrong = {}
    for what, exact in derivatives(operation.exact, composition, wide).items():
        error = relative_error(got[what], exact)
        if not error < ALLOWED[operation.dtype]:
            wrong[what] = f"{error:.1e}"
    assert not wrong, wrong


@pytest.mark.parametrize("composition", COMPOSITIONS[:2], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", OPERATIONS)
def test_first_derivatives(name, composition, device, poison):
    """Without create_graph=True, where the kernels' own backward pass runs; and the same bits twice."""
    operation = OPERATIONS[name]
    leaves = {key: leaf.requires_grad_() for key, leaf in operation.leaves(device).items()}
    wide = {key: leaf.detach().double().requires_grad_() for key, leaf in leaves.items()}
    rest = [key for key in leaves if key != "x"]

    def run(function, leaves):
        y = composition(function, leaves["x"], {key: leaves[key] for key in rest})
        return y, *torch.autograd.grad(y.square().mean(), list(leaves.values()))

    with use_backend("triton"):
        got, again = run(operation.run, leaves), run(operation.run, leaves)
    for what, a, b, exact in zip(("y", *leaves), got, again, run(operation.exact, wide), strict=True):
        assert relative_error(a, exact) < ALLOWED[operation.dtype], what
        assert torch.equal(a, b), what
