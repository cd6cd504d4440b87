"""`convert` swaps blocks in place and keeps weights, optimizers, devices and modes."""

import copy

import pytest
import torch
from torch import nn

import fastblocks
from benchmarks import original


def _model():
    from benchmarks.original.generator.AttentionRegisterRoFormerBlock import AttentionRegisterRoFormerBlock
    from benchmarks.original.generator.ConvNeXt1DBlock import ConvNeXt1DBlock
    from benchmarks.original.generator.RNNBlock import RNNBlock
    from benchmarks.original.generator.RoFormerBlock import RoFormerBlock

    return nn.Sequential(
        RoFormerBlock(16, 2, 40),
        RNNBlock(16, 2, 2, "lstm", True),
        AttentionRegisterRoFormerBlock(16, 2, 40, num_register_tokens=2, window_size=4),
        ConvNeXt1DBlock(3, 1, 20, 20),
    )


ARGUMENTS = {
    "RoFormerBlock": {"n_head": 2, "max_seq_len": 40, "rope_base": 10000},
    "AttentionRegisterRoFormerBlock": {"n_head": 2, "max_seq_len": 40, "rope_base": 10000, "window_size": 4},
}


def test_blocks_are_swapped_and_give_the_same_numbers():
    model = _model().eval()
    x = torch.randn(2, 20, 16)
    want = model(x)
    parameters = dict(model.named_parameters())
    converted = fastblocks.convert(model, ARGUMENTS)
    assert converted is model
    assert all(type(block).__module__.startswith("fastblocks.") for block in model)
    assert not any(module.training for module in model.modules())
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_an_optimizer_goes_on_working():
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastblocks.convert(model, ARGUMENTS)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 20, 16)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before["0.att.c_attn.weight"], model[0].att.c_attn.weight)


def test_a_shared_block_stays_one():
    block = _model()[1]
    model = fastblocks.convert(nn.Sequential(block, block))
    assert model[0] is model[1]
    assert isinstance(model[0], fastblocks.RNNBlock)


def test_a_block_itself_is_returned_anew():
    assert isinstance(fastblocks.convert(_model()[3]), fastblocks.ConvNeXt1DBlock)


@pytest.mark.parametrize("variant", ["convnext", "msrkit"])
@pytest.mark.parametrize("mode", ["normal", "transposed"])
def test_convnext_arguments_are_read_from_the_block(variant, mode):
    from benchmarks.original.generator.ConvNeXt2DBlock import ConvNeXt2DBlock

    old = ConvNeXt2DBlock((3, 5), (2, 1), 6, 8, mode, variant=variant)
    x = torch.randn(1, 6, 5, 4)
    want = old(x)
    torch.testing.assert_close(fastblocks.convert(old)(x), want, rtol=1e-5, atol=1e-5)


def test_what_the_model_does_not_tell_has_to_be_given():
    class RoFormerBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.att_norm = fastblocks.RoFormerBlock(16, 2, 40).att_norm

    model = nn.Sequential(RoFormerBlock())
    with pytest.raises(ValueError, match=r"RoFormerBlock at '0': cannot tell 'n_head'"):
        fastblocks.convert(model)
    assert type(model[0]) is RoFormerBlock
    with pytest.raises(ValueError, match=r"state_dict is not that of fastblocks.RoFormerBlock; it differs at \['att"):
        fastblocks.convert(model, {"0": {"n_head": 2, "max_seq_len": 40, "rope_base": 10000}})


def test_arguments_for_nobody_are_refused():
    with pytest.raises(ValueError, match="'Nobody'"):
        fastblocks.convert(_model(), {**ARGUMENTS, "Nobody": {}})


def test_discriminators_and_spectra():
    from benchmarks.original.discriminator.MultiFrequencyDiscriminator import MultiFrequencyDiscriminator
    from benchmarks.original.discriminator.MultiPeriodDiscriminator import MultiPeriodDiscriminator

    x = torch.randn(1, 1, 600)
    for old, arguments in (
        (MultiPeriodDiscriminator(periods=[2, 3]), {"periods": [2, 3]}),
        (MultiFrequencyDiscriminator(1, [64, 32]), {"window_sizes": [64, 32], "sample_rate": 48000}),
    ):
        old.eval()
        want = old(x)
        new = fastblocks.convert(old, {type(old).__name__: arguments})
        torch.testing.assert_close(new(x), want, rtol=1e-4, atol=1e-5)
    band = original.spectral_ops.Band(16000, 256, 10, 2, 4)
    new = fastblocks.convert(band, {"Band": {"sr": 16000, "n_fft": 256, "scale": "mel"}})
    assert isinstance(new, fastblocks.Band)
    x = torch.randn(1, 129, 3, 2)
    torch.testing.assert_close(new.split(x), band.split(x), rtol=1e-5, atol=1e-5)
