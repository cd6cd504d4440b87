"""RMSNorm and SwiGLU on a CPU, with gradients written by hand: beside their formulas, and what they keep."""

import pytest
import torch

from fastblocks import functional
from fastblocks.eager import rows
from tests.compare import assert_as_exact, assert_close, relative_error
from tests.reference import rows as reference_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(8,), (37, 24), (2, 3, 341), (5, 1), (3, 16384)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "a gradient that is one number", "transposed gradient"])
def test_rms_norm_as_its_formula(layout, size, dtype):
    """The same numbers forward; gradients as exact as the formula's."""
    x, scale, grad = (torch.randn(s).to(dtype) for s in (size, size[-1:], size))
    if layout == "transposed" and len(size) > 1:
        x = x.mT.contiguous().mT
    elif layout == "transposed gradient" and len(size) > 1:
        grad = grad.mT.contiguous().mT
    elif layout.startswith("a gradient"):
        grad = grad.flatten()[0].expand(size)

    def results(function, dtype=dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, scale)]
        y = function(*leaves, 1e-2)
        return y, *torch.autograd.grad(y, leaves, grad.to(dtype))

    got, formula = results(functional.rms_norm), results(rows.rms_norm_formula)
    exact = results(reference_rows.rms_norm, torch.float64)
    assert torch.equal(got[0], formula[0])
    with torch.no_grad():
        assert torch.equal(functional.rms_norm(x, scale, 1e-2), formula[0])
    for a, b, c in zip(got, formula, exact, strict=True):
        if dtype == torch.float64:
            assert a.dtype == dtype and relative_error(a, c) < 1e-12
        else:
            assert_as_exact(a, b, c)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "scale"])
def test_rms_norm_where_one_gradient_is_wanted(wanted):
    tensors = torch.randn(7, 24), torch.randn(24)
    grads = []
    for function in (functional.rms_norm, rows.rms_norm_formula):
        leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        y = function(*leaves, 1e-2)
        y.backward(torch.ones_like(y))
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
        grads.append(next(leaf.grad for leaf in leaves if leaf.grad is not None))
    assert relative_error(*grads) < 1e-5


def test_rms_norm_backward_under_autocast():
    x, scale = torch.randn(7, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    y = functional.rms_norm(x, scale)
    want = torch.autograd.grad(y, (x, scale), y.detach(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, (x, scale), y.detach())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rms_norm_keeps_its_input_and_a_number_per_row():
    kept = []
    x, scale = torch.randn(40, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        functional.rms_norm(x, scale)
    assert kept == [(40, 24), (24,), (40, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "halves", "expanded"])
def test_swiglu_is_its_formula_and_keeps_two_tensors(layout, wanted, dtype):
    """The very numbers, and inputs that stay as they were."""
    gate, up = torch.randn(2, 37, 24).to(dtype)
    if layout == "halves":
        gate, up = torch.randn(37, 48).to(dtype).chunk(2, -1)
    elif layout == "expanded":
        gate = gate[:1].expand(37, -1)
    gate, up = gate.requires_grad_(wanted[0]), up.requires_grad_(wanted[1])
    before, kept = gate.clone(), []
    leaves = [leaf for leaf in (gate, up) if leaf.requires_grad]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = functional.swiglu(gate, up)
    want = rows._swiglu_formula(gate, up)
    assert torch.equal(y, want) and torch.equal(gate, before)
    assert len(kept) <= (3 if dtype == torch.bfloat16 else 2)
    if leaves:
        grad = torch.randn_like(y)
        grads = (torch.autograd.grad(result, leaves, grad) for result in (y, want))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("length", [1, 29, 30, 31, 75])
def test_swiglu_mlp_a_few_rows_at_a_time(length, monkeypatch):
    """30 rows of 16 hidden channels at once: one part, a whole number of them, a rest."""
    monkeypatch.setattr(rows, "_CPU_HIDDEN", 30 * 16 + 5)
    leaves = [torch.randn(size, requires_grad=True) for size in ((length, 12), (13, 12), (13, 12), (7, 13))]
    grad = torch.randn(length, 7)

    def results(function, leaves, grad):
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad)

    got = results(functional.swiglu_mlp, leaves, grad)
    with torch.no_grad():
        assert torch.equal(functional.swiglu_mlp(*leaves), got[0])
    exact = results(rows._swiglu_mlp_formula, [t.detach().double().requires_grad_() for t in leaves], grad.double())
    for value, want in zip(got, exact, strict=True):
        assert_close(value, want, max(length, 13))
