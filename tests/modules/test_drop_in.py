"""What a change of import relies on beside the numbers: initial weights, attributes, names, errors."""

import copy
import importlib
from pathlib import Path

import pytest
import torch

import fastblocks
from benchmarks import original

# class, arguments, and the sum of |value| over all parameters and power-iteration vectors after torch.manual_seed(0)
INITIAL = {
    "roformer": ("RoFormerBlock", (32, 4, 20), 1049.9144),
    "registers": ("AttentionRegisterRoFormerBlock", (32, 4, 20, 10000, 3, 4), 1051.6008),
    "gru": ("RNNBlock", (32, 2, 2), 1454.7414),
    "lstm": ("RNNBlock", (32, 2, 2, "lstm", True), 1769.8764),
    "convnext-1d": ("ConvNeXt1DBlock", (5, 2, 8, 12), 123.30330),
    "convnext-2d": ("ConvNeXt2DBlock", ((3, 5), (2, 1), 8, 8, "transposed"), 113.35597),
    "msrkit-1d": ("ConvNeXt1DBlock", (5, 2, 8, 12, "normal", "msrkit"), 171.29964),
    "msrkit-2d": ("ConvNeXt2DBlock", ((3, 5), (2, 1), 8, 8, "transposed", "msrkit"), 140.87452),
    "period": ("MultiPeriodDiscriminator", (1, 48000, [2, 3]), 140391.78),
    "scale": ("MultiScaleDiscriminator", (48000, [1, 2]), 104433.58),
    "resolution": (
        "MultiResolutionDiscriminator",
        (2, 48000, [64, 32], 0.25, [(0, 0.5), (0.5, 1)], True, 4),
        586.64901,
    ),
    "frequency": ("MultiFrequencyDiscriminator", (1, [64, 32], 4), 5421.8255),
    "frequency-plain": ("MultiFrequencyDiscriminator", (2, [64], 4, 44100, False), 2610.3112),
    "band": ("Band", (16000, 256, 10, 2, 4), 14520.473),
    "band-linear": ("Band", (16000, 256, 10, 1, 4, "linear"), 14487.718),
    "fourier": ("Fourier", (64, 16), 31.999999),
}


def build(kit, name):
    cls, arguments, _ = INITIAL[name]
    keywords = {}
    if arguments[-1] == "msrkit":
        arguments, keywords = arguments[:-1], {"variant": "msrkit"}
    torch.manual_seed(0)
    return getattr(kit, cls)(*arguments, **keywords)


def assert_same_weights(ours, theirs):
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", INITIAL)
def test_same_seed_same_model(name):
    ours, theirs = build(fastblocks, name), build(original, name)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    assert_same_weights(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("kit", [fastblocks, original], ids=["fastblocks", "original"])
@pytest.mark.parametrize("name", INITIAL)
def test_initial_weights_are_the_recorded_ones(name, kit):
    total = sum(float(value.double().abs().sum()) for value in build(kit, name).state_dict().values())
    assert total == pytest.approx(INITIAL[name][2], rel=1e-6)


ATTRIBUTES = {
    "period": {"nch": 1, "sample_rate": 48000, "periods": [2, 3], "norm": True},
    "scale": {"nch": 1, "sample_rate": 48000, "downsample_rates": [1, 2], "norm": True},
    "resolution": {
        "nch": 2, "sample_rate": 48000, "window_lengths": [64, 32], "hop_factor": 0.25, "bands": [(0, 0.5), (0.5, 1)],
        "norm": True, "hidden_channels": 4, "discriminators.0.bands": [(0, 16), (16, 33)], "discriminators.0.nch": 2,
        "discriminators.0.window_length": 64, "discriminators.0.hop_length": 16,
    },
    "frequency": {"nch": 1, "window_sizes": [64, 32], "sample_rate": 48000, "eps": 2.0**-23},
    "band": {"sr": 16000, "n_fft": 256, "bands_num": 10, "in_channels": 2, "out_channels": 4, "scale": "mel", "F": 129},
    "fourier": {"n_fft": 64, "hop_length": 16},
    "roformer": {"att.n_head": 4, "att.n_embd": 32, "att.head_dim": 8, "att_norm.eps": 1e-6},
    "registers": {"num_register_tokens": 3, "window_size": 4},
    "gru": {"rnn.n_groups": 2, "rnn.group_size": 16, "rnn.rnns.0.hidden_size": 16, "rnn.rnns.0.num_layers": 2},
    "msrkit-2d": {"mode": "transposed", "padding": (1, 2), "n_hidden": 10},
}  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_the_originals(name):
    module = build(fastblocks, name)
    for path, want in ATTRIBUTES[name].items():
        parent, _, attribute = path.rpartition(".")
        assert getattr(module.get_submodule(parent), attribute) == want, path


def test_the_rope_table_under_its_original_name():
    block = build(fastblocks, "roformer")
    assert block.att.rope_cache is block.att.rope
    assert block.att.rope_cache.shape == (20, 4, 2)


def test_the_register_block_under_its_name_in_the_kit():
    module = importlib.import_module("fastblocks.generator.AttentionRegisterRoFormerBlock")
    assert module.RoFormerBlock is fastblocks.AttentionRegisterRoFormerBlock
    block = module.RoFormerBlock(16, 2, 20, 10000, 2, 4)
    assert (block.num_register_tokens, block.window_size) == (2, 4)
    assert not hasattr(fastblocks.RoFormerBlock, "_memory")


@pytest.mark.parametrize("cls", [fastblocks.ConvNeXt1DBlock, fastblocks.ConvNeXt2DBlock])
@pytest.mark.parametrize("mode", ["normal", "transposed"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wanted, built", [("msrkit", "convnext"), ("convnext", "msrkit")])
def test_a_state_dict_of_the_other_variant_is_named(cls, mode, strict, wanted, built):
    block, other = (cls(3, 2, 4, 6, mode, variant=variant) for variant in (built, wanted))
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(RuntimeError, match=f"build it with variant='{wanted}'"):
        block.load_state_dict(other.state_dict(), strict=strict)
    model, checkpoint = torch.nn.Sequential(block), torch.nn.Sequential(other).state_dict()
    with pytest.raises(RuntimeError, match=f"'0' is {cls.__name__}.*variant='{wanted}'"):
        model.load_state_dict(checkpoint)
    block.load_state_dict(before)  # its own still loads
    other.load_state_dict(other.state_dict())


@pytest.mark.parametrize("module", ["ConvNeXt1DBlock", "ConvNeXt2DBlock"])
def test_whoever_is_promised_the_originals_block_is_told_of_the_variant(module):
    assert "variant='msrkit'" in (Path(__file__).parents[2] / "README.md").read_text()
    assert "'msrkit'" in getattr(fastblocks, module).__doc__


def test_bands_without_a_single_bin():
    with pytest.warns(UserWarning, match="24 of 24 bands cover no bin"):
        band = fastblocks.Band(48000, 16, 24, 1, 2, "linear")
    x = torch.randn(1, 9, 3, 1, requires_grad=True)
    y = band.split(x)
    assert torch.equal(y, band.pre_bandnet.bias.T[None, :, None].expand(1, 2, 3, 24))
    joined = band.unsplit(y)
    assert not joined.any()
    joined.sum().backward()
    assert not band.post_bandnet.weight.grad.any()


def test_linear_bands_too_narrow_for_two_sides_have_no_bin():
    with pytest.warns(UserWarning, match="cover no bin"):
        band = fastblocks.Band(48000, 32, 20, 2, 3, "linear")
    edges = [int(edge) for edge in torch.linspace(0, 17, 22, dtype=torch.float64)]
    narrow = [k for k in range(20) if edges[k] == edges[k + 1] or edges[k + 1] == edges[k + 2]]
    assert narrow
    assert not band.filterbanks[narrow].any()
    assert not band.mask.view(20, -1)[narrow].any()
    for name, buffer in original.Band(48000, 32, 20, 2, 3, "linear").named_buffers():
        torch.testing.assert_close(band.get_buffer(name), buffer, rtol=1e-6, atol=1e-7, msg=name)
