"""Several discriminators as one, and the losses of a GAN's two sides."""

import copy

import pytest
import torch
from torch import nn

import fastblocks
from fastblocks import functional
from fastblocks.discriminator import _layers
from tests.compare import assert_close, relative_error
from tests.modules.harness import EXACT, tensors


def members(norm="spectral"):
    return [
        fastblocks.MultiResolutionDiscriminator(
            window_lengths=[64, 32], hop_factor=0.5, bands=[(0, 0.4), (0.4, 1)], hidden_channels=2, norm=norm
        ),
        fastblocks.MultiResolutionDiscriminator(
            window_lengths=[32], hop_factor=0.5, bands=[(0, 1)], hidden_channels=2, norm=norm
        ),
        fastblocks.MultiFrequencyDiscriminator(1, [64, 32], hidden_channels=2, norm=norm),
    ]


def clips(dtype=torch.float64):
    return torch.randn(2, 1, 200, dtype=dtype), torch.randn(2, 1, 200, dtype=dtype, requires_grad=True)


def plain(parts, clip):
    """The members' lists, one after the other."""
    judged = [part(clip) for part in parts]
    return [s for scores, _ in judged for s in scores], [maps for _, each in judged for maps in each]


@pytest.fixture
def transforms(monkeypatch):
    """Window and hop of every transform that is computed."""
    found, compute = [], _layers.short_time_spectrum

    def spectrum(x, window, hop):
        found.append((len(window), hop))
        return compute(x, window, hop)

    monkeypatch.setattr(_layers, "short_time_spectrum", spectrum)
    return found


def test_the_members_as_one_with_their_transforms_shared(transforms):
    parts = members()
    ensemble = fastblocks.EnsembleDiscriminator(copy.deepcopy(parts))
    assert ensemble.state_dict().keys() == {
        f"discriminators.{i}.{key}" for i, part in enumerate(parts) for key in part.state_dict()
    }
    for clip in clips(torch.float32):
        want, got = plain(parts, clip), ensemble(clip)
        for one, other in zip(tensors(got), tensors(want), strict=True):
            assert torch.equal(one, other)
    assert [len(maps) for maps in got.fmaps] == [10, 10, 5, 6, 6]
    shared = [(64, 32), (32, 16), (64, 32), (32, 16)]  # the last two of a clip of unit energy
    assert transforms[5:9] == shared and len(transforms) == 2 * (5 + 4)
    with torch.no_grad():
        ensemble(clip)
    clip.data.mul_(2)
    again = ensemble(clip)  # nothing is kept from one call to the next
    assert transforms[-4:] == shared and not torch.equal(again.scores[0], got.scores[0])


def test_gradients_through_a_shared_transform():
    parts = [part.double() for part in members()]
    ensemble, (_, clip) = fastblocks.EnsembleDiscriminator(copy.deepcopy(parts)), clips()
    grads = []
    for scores, fmaps in (plain(parts, clip), ensemble(clip)):
        loss = sum(s.square().sum() for s in scores) + sum(m.sin().sum() for maps in fmaps for m in maps)
        grads.append(torch.autograd.grad(loss, clip)[0])
    assert relative_error(*grads) < EXACT


@pytest.mark.parametrize("norm", ["spectral", "weight", False])
def test_a_pair_is_one_batch(norm):
    ensemble = fastblocks.EnsembleDiscriminator(members(norm)).double()
    twin, (real, fake) = copy.deepcopy(ensemble), clips()
    both = twin(torch.cat((real, fake[:1])))
    for side, rows in zip(ensemble.pair(real, fake[:1]), (slice(2), slice(2, 3)), strict=True):
        for got, want in zip(tensors(side), tensors(both), strict=True):
            assert relative_error(got, want[rows]) < EXACT
    for name, buffer in ensemble.named_buffers():  # one power iteration, as of one call
        assert torch.equal(buffer, twin.get_buffer(name))
    with pytest.raises(ValueError, match=r"\(2, 1, 200\) in torch.float64 and \(2, 1, 199\)"):
        ensemble.pair(real, fake[..., 1:])


@pytest.mark.parametrize("kind", ["least_squares", "hinge"])
def test_generator_step_gives_the_plain_gradients(kind):
    ensemble = fastblocks.EnsembleDiscriminator(members()).double()
    still = next(ensemble.parameters()).requires_grad_(False)
    twin, (real, fake) = copy.deepcopy(ensemble), clips()
    scores, fmaps, real_fmaps = ensemble.generator_step(fake, real)
    assert not any(m.requires_grad for m in tensors(real_fmaps))
    assert [p.requires_grad for p in ensemble.parameters()] == [p is not still for p in ensemble.parameters()]
    loss = functional.adversarial_loss(scores, kind) + functional.feature_matching(real_fmaps, fmaps)
    loss.backward()
    assert all(p.grad is None for p in ensemble.parameters())

    maps = plain(twin.discriminators, real)[1]
    scores, fmaps = plain(twin.discriminators, fake)
    pairs = [(r.detach(), f) for rs, fs in zip(maps, fmaps, strict=True) for r, f in zip(rs, fs, strict=True)]
    adversarial = [-s.mean() if kind == "hinge" else (1 - s).square().mean() for s in scores]
    want = sum(adversarial) / 5 + sum((r - f).abs().mean() / (r.abs().mean() + 1e-5) for r, f in pairs) / len(pairs)
    (grad,) = torch.autograd.grad(want, fake)
    assert relative_error(loss, want) < EXACT and relative_error(fake.grad, grad) < EXACT
    for name, buffer in ensemble.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name))


def test_parameters_ask_again_after_an_error():
    ensemble = fastblocks.EnsembleDiscriminator(members())
    with pytest.raises(ValueError, match="too short"):
        ensemble.generator_step(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5))
    assert all(p.requires_grad for p in ensemble.parameters())
    assert not any("_prepared_weight" in child.__dict__ for child in ensemble.modules())
    with pytest.raises(ValueError, match="at least one discriminator"):
        fastblocks.EnsembleDiscriminator([])


def test_somebody_elses_discriminator_is_a_member():
    class Mean(nn.Module):
        def forward(self, x):
            return [x.mean((1, 2))], [[x]]

    ensemble = fastblocks.EnsembleDiscriminator([Mean(), members()[1]])
    scores, fmaps = ensemble(clips(torch.float32)[0])
    assert len(scores) == len(fmaps) == 2


def test_discriminator_losses():
    real, fake = ([torch.randn(2, 1, 3, 4, dtype=torch.float64) for _ in range(3)] for _ in range(2))
    want = sum(((1 - r) ** 2).mean() + (f**2).mean() for r, f in zip(real, fake, strict=True)) / 3
    assert relative_error(functional.discriminator_loss(real, fake), want) < EXACT
    hinge = sum((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean() for r, f in zip(real, fake, strict=True)) / 3
    assert relative_error(functional.discriminator_loss(real, fake, "hinge"), hinge) < EXACT


@pytest.mark.parametrize("relative", [True, False])
def test_feature_matching(relative):
    """All derivatives, second ones too; ties; one bit-equal result each time; 16 bits are summed in float32."""
    shapes = [[(2, 3, 5), (1, 4)], [(7,)]]
    real, fake = ([[torch.randn(shape, dtype=torch.float64) for shape in maps] for maps in shapes] for _ in range(2))
    fake[0][1][0, 2] = real[0][1][0, 2]
    leaves = [m.requires_grad_() for m in tensors(fake)]
    scale = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def formula(real, fake):
        pairs = [(r, f) for rs, fs in zip(real, fake, strict=True) for r, f in zip(rs, fs, strict=True)]
        return sum((r - f).abs().mean() / (r.abs().mean() + 1e-5 if relative else 1) for r, f in pairs) / len(pairs)

    def derivatives(function):
        made = [[s.sin() * m for s, m in zip(scale, maps, strict=False)] for maps in fake]
        loss = function(real, made)
        first = torch.autograd.grad(loss, [scale, *leaves], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [scale, *leaves])
        return [loss, *first, *second, *torch.autograd.grad(function(real, fake), leaves)]

    def ours(real, fake):
        return functional.feature_matching(real, fake, relative=relative)

    for got, want in zip(derivatives(ours), derivatives(formula), strict=True):
        assert relative_error(got, want) < EXACT
    with torch.autograd.graph.saved_tensors_hooks(lambda t: [t], lambda packed: packed.pop()):  # given back once
        loss = ours(real, fake)
    torch.autograd.grad(loss, leaves)
    narrow = [[[m.detach().bfloat16() for m in maps] for maps in side] for side in (real, fake)]
    loss = ours(*narrow)
    assert loss.dtype == torch.float32 and torch.equal(loss, ours(*narrow))
    differences = [(f - r).double() for r, f in zip(tensors(narrow[0]), tensors(narrow[1]), strict=True)]
    levels = [r.double().abs().mean() + 1e-5 if relative else 1 for r in tensors(narrow[0])]
    want = sum(d.abs().mean() / level for d, level in zip(differences, levels, strict=True)) / 3
    assert_close(loss, want, 30)
