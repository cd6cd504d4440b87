"""Inputs that lie in memory otherwise than their shape says: every operation, every input, values and gradients."""

import pytest
import torch

from fastblocks import backend
from fastblocks.backend import use_backend
from tests.compare import FACTOR, relative_error
from tests.kernels.operations import OPERATIONS

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")

ALLOWED = {torch.float32: 1e-5, torch.float16: 1e-2}


def between(t):
    """Something larger of t's shape along the last dimension, with NaN where nobody may look."""
    base = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype, device=t.device)
    base[..., 2:-1] = t
    return base


# How a leaf is stored, and the view of it that an operation is given.
LAYOUTS = {
    "sliced channels": (between, lambda base: base[..., 2:-1]),
    "every other": (lambda t: torch.stack((t, t * float("nan")), -1), lambda base: base[..., 0]),
    "transposed": (lambda t: t.mT.contiguous() if t.dim() > 1 else t, lambda base: base.mT if base.dim() > 1 else base),
    "expanded": (lambda t: t[:1], None),  # every sample, channel or row is the first
    "offset": (lambda t: torch.cat((t.flatten()[:1], t.flatten())), None),
}


def stored(t, layout):
    """(base, a function from base to what has t's shape)."""
    store, view = LAYOUTS[layout]
    if layout == "expanded":
        dim = next((i for i, size in enumerate(t.shape) if size > 1), 0)
        return t.narrow(dim, 0, 1).clone(), lambda base, shape=t.shape: base.expand(shape)
    if layout == "offset":
        return store(t), lambda base, shape=t.shape: base[1:].view(shape)
    return store(t), view


def results(function, bases, views, grad):
    y = function(**{name: views[name](base) for name, base in bases.items()})
    return y, *torch.autograd.grad(y, list(bases.values()), grad.to(y.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_layouts(name, layout, device):
    operation = OPERATIONS[name]
    pairs = {key: stored(leaf, layout) for key, leaf in operation.leaves(device).items()}
    if layout == "expanded" and name.startswith("depthwise"):  # LayerNorm takes a shift of all channels out again
        pairs["bias"] = stored(operation.leaves(device)["bias"], "offset")
    if layout == "expanded" and "scale_attention" in pairs:  # a sum over its channels may cancel, in eager or here
        pairs["scale_attention"] = stored(operation.leaves(device)["scale_attention"], "offset")
    views = {key: view for key, (_, view) in pairs.items()}
    bases = {key: base.requires_grad_() for key, (base, _) in pairs.items()}
    wide = {key: base.detach().double().requires_grad_() for key, base in bases.items()}
    # gradients of what is expanded are sums over its copies: of one sign, or of 16 bits nothing may be left of them
    grad = (torch.rand if layout == "expanded" else torch.randn)(operation.sizes["x"], device=device)
    with use_backend("triton"), backend._watch() as decisions:
        got = results(operation.run, bases, views, grad)
    assert {decision.backend for decision in decisions} == {"triton"}, decisions
    wrong = {}
    with use_backend("eager"):  # whole blocks in 16 bits may cancel in either
        eager = results(operation.run, bases, views, grad)
    exact = results(operation.exact, wide, views, grad)
    for what, a, b, want in zip(("y", *bases), got, eager, exact, strict=True):
        error, allowed = relative_error(a, want), max(ALLOWED[operation.dtype], FACTOR * relative_error(b, want))
        if not error < allowed:
            wrong[what] = f"{error:.1e}, allowed {allowed:.1e}"
    assert not wrong, wrong
