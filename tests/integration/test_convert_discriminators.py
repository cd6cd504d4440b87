"""Discriminators of other kits: the blocks stay, convolutions under PyTorch's spectral norm are swapped one by one."""

import copy
import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import remove_spectral_norm, spectral_norm, weight_norm

import fastblocks
from fastblocks.convert import spectral_norm as ours
from fastblocks.discriminator._layers import SpectralNorm
from tests.integration.converted import assert_follows

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class DiscriminatorS(nn.Module):
    """HiFi-GAN's discriminator of a scale, narrower."""

    def __init__(self, norm=spectral_norm):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                norm(nn.Conv1d(1, 8, 15, padding=7)),
                norm(nn.Conv1d(8, 16, 41, 2, groups=4, padding=20)),
                norm(nn.Conv1d(16, 32, 5, padding=2, bias=False)),
            ]
        )
        self.conv_post = norm(nn.Conv1d(32, 1, 3, padding=1))

    def forward(self, x):
        fmap = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            fmap.append(x)
        return [self.conv_post(x), *fmap]


class MultiScaleDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.discriminators = nn.ModuleList([DiscriminatorS(), DiscriminatorS(weight_norm)])

    def forward(self, x):
        return [out for judge in self.discriminators for out in judge(x)]


def settled(model, x):
    """The model after some power iterations, without which a norm is wrong, and values that cancel are large."""
    with torch.no_grad():
        for _ in range(5):
            model(x)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_under_spectral_norm_are_swapped(training):
    x = torch.randn(2, 1, 300)
    original = settled(MultiScaleDiscriminator(), x).train(training)
    model = copy.deepcopy(original)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fastblocks.convert(model)
    report = fastblocks.conversion_report(model)
    convs = [f"discriminators.0.convs.{i}" for i in range(3)] + ["discriminators.0.conv_post"]
    assert report.swapped == convs and list(report.left) == [""]
    assert all(type(model.get_submodule(path)) is ours.Conv1d for path in convs)
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert_follows(model, original, x)
    for name, vector in original.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), vector, msg=name)
    model(x)[0].sum().backward()
    before = model.discriminators[0].conv_post.weight_orig.clone()
    optimizer.step()
    assert not torch.equal(model.discriminators[0].conv_post.weight_orig, before)
    remove_spectral_norm(model.discriminators[0].conv_post)
    assert not fastblocks.conversion_report(fastblocks.convert(model.discriminators[0])).rows


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 6, (5, 3), (3, 1), (2, 1), (1, 2)),
        nn.Conv2d(4, 6, 3, padding="same", groups=2, padding_mode="reflect"),
        nn.Conv1d(2, 6, 3, padding=2, padding_mode="circular", bias=False),
    ],
)
def test_settings_are_kept(conv):
    x = torch.randn(2, conv.in_channels, *(20, 17)[: conv.weight.dim() - 2])
    original = settled(nn.Sequential(spectral_norm(conv, n_power_iterations=2, eps=1e-3)), x)
    model = fastblocks.convert(copy.deepcopy(original))
    (hook,) = model[0]._forward_pre_hooks.values()
    assert (type(hook), hook.n_power_iterations, hook.eps) == (SpectralNorm, 2, 1e-3)
    assert fastblocks.conversion_report(model).swapped == ["0"]
    assert_follows(model, original, x)


def test_other_convolutions_are_none_of_ours():
    class Causal(nn.Conv1d):
        pass

    model = nn.Sequential(
        nn.Conv1d(2, 2, 3),
        weight_norm(nn.Conv1d(2, 2, 3)),
        spectral_norm(nn.Conv1d(2, 2, 3), dim=1),
        spectral_norm(nn.Conv1d(2, 2, 3), "bias"),
        spectral_norm(Causal(2, 2, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv1d(2, 2, 3)),
    )
    blocks = list(model)
    assert not fastblocks.conversion_report(fastblocks.convert(model)).rows and list(model) == blocks


def test_what_computes_something_else_is_named():
    model = nn.Sequential(spectral_norm(nn.Conv1d(2, 2, 3)))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="Conv1d at '0': it has a forward of its own"):
        fastblocks.convert(model)


@pytest.mark.parametrize("name", ["MultiScaleDiscriminator", "judge"])
def test_what_is_skipped_is_skipped_with_all_that_is_in_it(name):
    model = nn.ModuleDict({"judge": MultiScaleDiscriminator()})
    modules = dict(model.named_modules())
    fastblocks.convert(model, skip=[name])
    assert dict(model.named_modules()) == modules
    assert fastblocks.conversion_report(model).left == {"judge": "skip names it"}


# --- the packages, of which the extra `adapters` has Vocos alone: the others bring much along

PACKAGES = "vocos==0.1.0, speechbrain==1.0.3, descript-audio-codec==1.0.0"


def of_speechbrain(monkeypatch):
    return importlib.import_module("speechbrain.lobes.models.HifiGAN").HifiganDiscriminator()


def of_vocos(monkeypatch):
    module = importlib.import_module("vocos.discriminators")
    return nn.ModuleList([module.MultiPeriodDiscriminator(), module.MultiResolutionDiscriminator()])


def of_dac(monkeypatch):
    """descript-audio-codec without its audiotools, which needs much and of which this needs two names."""
    if (found := importlib.util.find_spec("dac")) is None:
        raise ImportError("No module named 'dac'")
    audiotools = SimpleNamespace(AudioSignal=None, STFTParams=dict, ml=SimpleNamespace(BaseModel=nn.Module))
    monkeypatch.setitem(sys.modules, "audiotools", audiotools)
    path = Path(found.submodule_search_locations[0]) / "model" / "discriminator.py"
    specification = importlib.util.spec_from_file_location("dac_discriminator", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.Discriminator(rates=[1])


@pytest.mark.parametrize(
    "package, convolutions, left",
    [
        (of_speechbrain, 8, {"msd": "nothing to gain", "mpd": "nothing to gain"}),
        (of_vocos, 0, dict.fromkeys("01", "nothing to gain")),
        (of_dac, 0, {f"discriminators.{i}": "nothing to gain" for i in range(9)}),
    ],
)
def test_discriminators_of_the_packages(package, convolutions, left, monkeypatch):
    try:
        model = package(monkeypatch)
    except ImportError as missing:
        pytest.skip(f"not installed, {package.__name__[3:]} of {PACKAGES}: {missing}")
    modules = dict(model.named_modules())
    fastblocks.convert(model)
    report = fastblocks.conversion_report(model)
    assert len(report.swapped) == convolutions and report.left.keys() == left.keys()
    assert all(left[path] in reason for path, reason in report.left.items())
    assert all(module is modules[path] for path, module in model.named_modules() if path not in report.swapped)
