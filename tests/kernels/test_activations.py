"""Bias and LeakyReLU in one launch: numbers, layouts, what is kept, what the discriminators make of it."""

import pytest
import torch
from torch import nn

import fastblocks
from fastblocks import backend, functional
from fastblocks.backend import use_backend
from tests.compare import assert_as_exact, relative_error
from tests.kernels.test_norms import Library
from tests.reference import activations as reference

pytest.importorskip("triton")

from fastblocks.kernels import launch

# rows of one element, a few, less than a block, blocks that no row begins with, whole blocks, several blocks
SHAPES = [(3, 5), (2, 70, 1), (3, 5, 3, 3), (2, 3, 45), (2, 7, 3, 100), (1, 3, 256), (1, 2, 2049)]
FORMATS = {
    "first": lambda x: x,
    "last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "neither": lambda x: torch.stack((x, x * float("nan")), -1)[..., 0],
}


def results_and_gradients(function, x, bias, cotangent=None):
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = function(x, bias, 0.2)
    cotangent = torch.randn(y.shape, device=x.device, dtype=y.dtype) if cotangent is None else cotangent.to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, bias), cotangent)], cotangent


@pytest.mark.parametrize(
    "layout, dtype", [("first", torch.float32), ("first", torch.bfloat16), ("last", torch.bfloat16),
                      ("neither", torch.float16)],
)  # fmt: skip
def test_as_exact_as_eager_and_the_same_bits_twice(layout, dtype, device, poison):
    """A bias stays float32 under autocast, which makes eager round it."""
    for shape in SHAPES:
        x, bias = torch.randn(shape, device=device).to(dtype), torch.randn(shape[1], device=device)
        x, cotangent = FORMATS[layout](x), FORMATS["last" if layout == "first" else "first"](torch.randn_like(x))
        with use_backend("triton"), backend._watch() as decisions:
            got, _ = results_and_gradients(functional.bias_leaky_relu, x, bias, cotangent)
            again, _ = results_and_gradients(functional.bias_leaky_relu, x, bias, cotangent)
        assert [decision.backend for decision in decisions] == ["triton"] * 2
        with use_backend("eager"):
            eager, _ = results_and_gradients(functional.bias_leaky_relu, x, bias, cotangent)
        exact, _ = results_and_gradients(reference.bias_leaky_relu, x.double(), bias.double(), cotangent)
        assert got[0].stride() == (x.stride() if layout != "neither" else x.contiguous().stride())
        for what, *values in zip(("y", "grad_x", "grad_bias"), got, again, eager, exact, strict=True):
            one, twice, plain, want = values
            assert torch.equal(one, twice), (shape, what)
            assert_as_exact(one, plain, want, f"{shape}: {what}")


def test_rows_and_their_biases_are_numbered(device):
    """Whole numbers, whose sums have no rounding: a bias or a sum of another row shows at once."""
    for shape in SHAPES:
        bias = torch.arange(1.0, shape[1] + 1, device=device)
        x, cotangent = torch.zeros(shape, device=device), torch.randint(1, 5, shape, device=device).float()
        for layout in ("first", "last"):
            with use_backend("triton"):
                (y, _, grad_bias), _ = results_and_gradients(
                    functional.bias_leaky_relu, FORMATS[layout](x), bias, cotangent
                )
            assert torch.equal(y, x + bias.view(-1, *[1] * (x.dim() - 2)))
            assert torch.equal(grad_bias, cotangent.movedim(1, 0).flatten(1).sum(1))


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_zeros_and_what_is_kept(slope, device):
    """The gradient at zero is PyTorch's; the result is all of x's size that is kept."""
    x, bias = torch.tensor([[-1.0, 0.0, 2.0]] * 2, device=device), torch.zeros(3, device=device, requires_grad=True)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), use_backend("triton"):
        y = functional.bias_leaky_relu(x, bias, slope)
    assert [t.data_ptr() for t in kept] == [y.data_ptr(), bias.data_ptr()]
    y.sum().backward()
    want = torch.nn.functional.leaky_relu(x, slope)
    assert torch.equal(y, want) and torch.equal(x.grad, torch.autograd.grad(want.sum(), x)[0])


def test_a_changed_result_is_seen_by_autograd(device):
    x = torch.randn(2, 3, 4, device=device, requires_grad=True)
    with use_backend("triton"):
        y = functional.bias_leaky_relu(x, torch.ones(3, device=device), 0.2)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_sums_by_row_in_64_bits(monkeypatch, device):
    from fastblocks.kernels.activations import bias_leaky_relu

    found = []
    for limit in (bias_leaky_relu.MAX_INT32, 0):
        monkeypatch.setattr(bias_leaky_relu, "MAX_INT32", limit)
        torch.manual_seed(0)
        with use_backend("triton"):
            found.append(results_and_gradients(functional.bias_leaky_relu, torch.randn(2, 3, 700), torch.randn(3))[0])
    assert all(map(torch.equal, *found))


def test_what_the_kernels_leave_alone(device):
    x, bias = torch.randn(2, 3, 4, device=device), torch.randn(3, device=device)
    for changed, reason in (((x.double(), bias), "float64"), ((x, bias.double()), "bias in float64")):
        with use_backend("triton"):
            assert reason in fastblocks.explain(functional.bias_leaky_relu, *changed)
    with pytest.raises(ValueError, match=r"bias \(C,\), got \(2, 3, 4\) and \(4,\)"):
        functional.bias_leaky_relu(x, x.new_ones(4))
    with pytest.raises(ValueError, match="slope must not be negative, got -1"):
        functional.bias_leaky_relu(x, bias, -1)


# ---- in the discriminators -------------------------------------------------------------------------------------------

MAKERS = {
    "period": lambda **o: fastblocks.MultiPeriodDiscriminator(periods=[2], **o),
    "scale": lambda **o: fastblocks.MultiScaleDiscriminator(48000, [2], **o),
    "resolution": lambda **o: fastblocks.MultiResolutionDiscriminator(window_lengths=[64], hidden_channels=2, **o),
    "frequency": lambda **o: fastblocks.MultiFrequencyDiscriminator(1, [32], hidden_channels=1, **o),
}
ACTIVATED = {"period": 5, "scale": 6, "resolution": 25, "frequency": 6}


@pytest.mark.parametrize("name, norm", [("resolution", "weight"), ("frequency", True)])
def test_a_discriminator_and_all_its_gradients(name, norm, device):
    module, clip = MAKERS[name](norm=norm).to(device).eval(), torch.randn(2, 1, 200, device=device)
    with torch.no_grad():  # bias-like parameters far from zero
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    leaf, found = clip.requires_grad_(), []
    for selected in ("triton", "eager"):
        with use_backend(selected):
            scores, maps = module(leaf)
            penalty = torch.autograd.grad(scores[0].sum(), leaf, create_graph=True)[0].square().sum()
            loss = scores[0].square().sum() + sum(one.square().mean() for one in maps[0])
            leaves = [leaf, *module.parameters()]
            first = torch.autograd.grad(loss, leaves, retain_graph=True)
            second = torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)
            found.append([*scores, *maps[0], *first, *second])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-3


@pytest.mark.parametrize(
    "name, norm, of_norms",
    [("period", "spectral", (3, 2)), ("scale", "weight", (1, 1)), ("resolution", False, (0, 0)),
     ("frequency", "spectral", (3, 2))],
)  # fmt: skip
def test_launches_of_a_whole_discriminator(monkeypatch, name, norm, of_norms, device):
    """Beside convolutions and spectra: the norms' launches and one a layer forward, two a layer backward; PyTorch adds
    no bias and activates nothing."""
    module, clip, launched = MAKERS[name](norm=norm).to(device), torch.randn(1, 1, 400, device=device), []
    monkeypatch.setattr(launch, "_listener", lambda *one: launched.append(one))
    with use_backend("triton"), Library() as library:
        scores, _ = module(clip)
        assert len(launched) == of_norms[0] + ACTIVATED[name]
        torch.autograd.backward(scores, [torch.ones_like(score) for score in scores])
    assert len(launched) == sum(of_norms) + 3 * ACTIVATED[name]
    assert not {"leaky_relu", "leaky_relu_", "leaky_relu_backward", "where"} & set(library.launched)


CHANGES = {
    "hooked": lambda conv: conv.register_forward_hook(lambda *a: None),
    "pre-hooked": lambda conv: conv.register_forward_pre_hook(lambda *a: None),
    "gradient-hooked": lambda conv: conv.register_full_backward_hook(lambda *a: None),
    "own forward": lambda conv: setattr(conv, "forward", conv.forward),
    "no bias": lambda conv: setattr(conv, "bias", None),
    "parametrized": lambda conv: nn.utils.parametrize.register_parametrization(conv, "bias", nn.Softplus()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_convolution_is_called_as_it_is(change, device):
    module, clip = MAKERS["frequency"](norm=False).to(device), torch.randn(1, 1, 200, device=device)
    CHANGES[change](module.discriminators[0].layers[2].conv)
    with use_backend("triton"):
        said = fastblocks.explain(module, clip)
        got = module(clip)
    assert "bias_leaky_relu: triton × 5" in said and "bias_leaky_relu: eager (the convolution is replaced" in said
    with use_backend("eager"):
        want = module(clip)
    assert relative_error(got[0][0], want[0][0]) < 1e-4


@pytest.mark.parametrize("selected", ["triton", "eager"])
def test_a_hook_keeps_what_it_is_given(selected, device):
    """With its bias, and before the LeakyReLU."""
    module, seen = MAKERS["frequency"](norm=False).to(device), []
    convs = [layer.conv for layer in module.discriminators[0].layers]
    for conv in convs[:3]:
        with torch.no_grad():
            conv.bias.fill_(-100.0)
    convs[0].register_forward_hook(lambda m, i, out: seen.append(out))
    convs[1].register_full_backward_hook(lambda *a: None)
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: seen.append(o) if m is convs[2] else None
    )
    with everywhere, use_backend(selected):
        module(torch.zeros(1, 1, 200, device=device, requires_grad=True))
    assert len(seen) == 2 and (seen[0] == -100).all() and seen[1].max() < -50  # LeakyReLU leaves a fifth
