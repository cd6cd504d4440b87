"""`convert` compares every block with its replacement, and leaves foreign blocks alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm

import fastblocks
from benchmarks import original
from tests.integration import kit


def refused(block, match, *arguments, **options):
    """The block is named and left alone: with strict by an error, without in the report."""
    model = nn.Sequential(block, original.RNNBlock(8, 1, 2))
    with pytest.raises(ValueError, match=match):
        fastblocks.convert(model, *arguments, **options)
    assert type(model[1]) is original.RNNBlock
    fastblocks.convert(model, *arguments, strict=False, **options)
    assert model[0] is block
    assert type(model[1]) is fastblocks.RNNBlock
    (reason,) = fastblocks.conversion_report(model).left.values()
    return reason


def left_alone(block, *words):
    """The block is foreign: left alone without an error, with a reason; an error where it is asked for by name."""
    model = nn.Sequential(block, original.RNNBlock(8, 1, 2))
    fastblocks.convert(model)
    assert model[0] is block
    assert type(model[1]) is fastblocks.RNNBlock
    reason = fastblocks.conversion_report(model).left["0"]
    for word in words:
        assert word in reason
    with pytest.raises(ValueError, match="at '0': "):
        fastblocks.convert(model, only=[type(block).__name__])


COMPUTES = "computes something else"


# --- settings that are seen, and numbers that are


def conv(*arguments, dims=1, **options):
    block = (original.ConvNeXt1DBlock, original.ConvNeXt2DBlock)[dims - 1](3, 1, 6, 6)
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    block.dwconv = kind(6, 6, 3, *arguments, groups=6, **options)
    return block


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(
    "options, said",
    [
        ({"padding": 2, "dilation": 2}, "dilation"),
        ({"padding": 1, "padding_mode": "reflect"}, "reflect"),
        ({"padding": 2}, "padding"),
    ],
)
def test_another_convolution(dims, options, said):
    assert said in refused(conv(dims=dims, **options), "'dwconv' is Conv")


def test_a_causal_convolution_by_hand():
    class Causal(nn.Conv1d):
        def forward(self, x, output_size=None):
            return F.conv1d(F.pad(x, (2, 0)), self.weight, self.bias, groups=self.groups)

    block = original.ConvNeXt1DBlock(3, 1, 6, 6)
    block.dwconv = Causal(6, 6, 3, padding=1, groups=6)
    refused(block, COMPUTES)


def test_another_eps_of_a_layer_norm():
    block = original.ConvNeXt1DBlock(3, 1, 6, 6)
    block.norm.eps = 1e-5
    refused(block, "'norm' is LayerNorm")


def rms_norm(eps):
    """An RMSNorm that does not say its eps."""

    class RMSNorm(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(dim))

        def forward(self, x):
            return F.rms_norm(x, self.scale.shape, self.scale, eps)

    return RMSNorm


@pytest.mark.parametrize("name", ["att_norm", "ffn_norm"])
@pytest.mark.parametrize("eps", [1e-5, 1e-8, 3e-6])
def test_another_eps_of_an_rms_norm(name, eps):
    block = kit.RoFormerBlock(16, 2, 20)
    getattr(block, name).eps = eps
    refused(block, f"'{name}' has eps={eps}, not 1e-06")
    setattr(block, name, rms_norm(eps)(16))
    refused(block, COMPUTES)
    setattr(block, name, rms_norm(1e-6)(16))
    assert isinstance(fastblocks.convert(block), fastblocks.RoFormerBlock)


@pytest.mark.parametrize("variant", ["convnext", "msrkit"])
def test_another_eps_within_a_convnext_block(variant):
    block = original.ConvNeXt2DBlock(3, 1, 6, 6, variant=variant)
    if variant == "msrkit":
        block.norm = rms_norm(1e-5)(6)
    else:
        block.norm.forward = lambda x: x
    refused(block, COMPUTES if variant == "msrkit" else "'norm' has a forward of its own")


def test_another_activation_is_seen_without_computing():
    class ConvNeXtBlock(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.dwconv, self.norm = nn.Conv1d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8, eps=1e-6)
            self.pwconv1, self.act, self.pwconv2 = nn.Linear(8, 20), act, nn.Linear(20, 8)

        def forward(self, x):
            return x + self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x).mT)))).mT

    refused(
        ConvNeXtBlock(nn.GELU("tanh")),
        r"'act' is GELU\(approximate='tanh'\), not GELU\(approximate='none'\)",
        check=False,
    )
    refused(ConvNeXtBlock(nn.SiLU()), r"'act' is SiLU\(\), not GELU", check=False)


def test_gelu_by_tanh():
    class ConvNeXt1DBlock(original.ConvNeXt1DBlock):
        def forward(self, x, original_shape=None):
            y = self.pwconv1(self.norm(self.dwconv(x).movedim(1, -1)))
            return x + self.pwconv2(F.gelu(y, approximate="tanh")).movedim(-1, 1)

    refused(ConvNeXt1DBlock(3, 1, 6, 6), COMPUTES)


def test_an_overridden_forward():
    class RoFormerBlock(original.RoFormerBlock):
        def forward(self, x):
            return super().forward(x) + 1e-3 * x

    refused(RoFormerBlock(16, 2, 20), COMPUTES)


def test_a_forward_with_an_argument_more():
    class RoFormerBlock(original.RoFormerBlock):
        def forward(self, x, mask=None):
            return super().forward(x)

    refused(RoFormerBlock(16, 2, 20), "its forward also takes mask", check=False)


def test_dropout_in_training():
    class RoFormerBlock(original.RoFormerBlock):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.1, self.training)

    refused(RoFormerBlock(16, 2, 20), "in training its forward computes something else")


def test_something_else_in_evaluation():
    class RoFormerBlock(original.RoFormerBlock):
        def forward(self, x):
            return super().forward(x) if self.training else x

    refused(RoFormerBlock(16, 2, 20), "in evaluation its forward computes something else")


def test_a_gradient_that_stops():
    class RoFormerBlock(original.RoFormerBlock):
        def forward(self, x):
            return x + super().forward(x).detach() - x.detach()

    refused(RoFormerBlock(16, 2, 20), COMPUTES)


def test_recurrences_that_are_not_ours():
    block = original.RNNBlock(8, 2, 2)
    for rnn in block.rnn.rnns:
        rnn.dropout = 0.5
    refused(block, "in training its forward")
    block = original.RNNBlock(8, 1, 2)
    for rnn in block.rnn.rnns:
        rnn.batch_first = False
    refused(block, COMPUTES)


def test_spectra_that_are_not_ours():
    fourier = original.Fourier(64, 16)
    fourier.window.sqrt_()
    refused(fourier, "its buffer 'window' has other values", check=False)

    class Fourier(original.Fourier):
        def stft(self, waveform):
            window, options = self.window, {"center": False, "return_complex": True}
            return torch.view_as_real(torch.stft(waveform, self.n_fft, self.hop_length, window=window, **options))

    refused(Fourier(64, 16), "in training its stft gives other shapes")

    class Fourier(original.Fourier):
        def stft(self, waveform):
            return super().stft(waveform) / 8  # "normalized"

    refused(Fourier(64, 16), "its stft computes something else")


def test_bands_that_are_not_ours():
    band = original.Band(16000, 256, 10, 1, 2)
    band.ola_window.fill_(1)
    refused(band, "'ola_window' has other values")

    class Band(original.Band):
        def split(self, x):
            return super().split(x * 2)

    refused(Band(16000, 256, 10, 1, 2), "its split computes something else")


def test_rotations_that_are_not_ours():
    block = kit.RoFormerBlock(16, 2, 20)
    block.att.rope_cache = original.functional.rope_table(21, 8)[1:]  # positions from 1
    refused(block, "its rotary table is not that of any base")

    class RoFormerBlock(original.RoFormerBlock):
        def forward(self, x):
            rope, self.att.rope = self.att.rope, self.att.rope.flip(-1)
            try:
                return super().forward(x)
            finally:
                self.att.rope = rope

    refused(RoFormerBlock(16, 2, 20), COMPUTES)


def test_a_block_that_does_not_run_is_named():
    class RoFormerBlock(original.RoFormerBlock):
        def forward(self, x):
            raise NotImplementedError("not here")

    refused(
        RoFormerBlock(16, 2, 20), r"the original does not run forward on \(2, 11, 16\): NotImplementedError: not here"
    )


def test_all_that_cannot_be_swapped_is_in_one_message():
    model = nn.Sequential(conv(padding=2), original.RNNBlock(8, 1, 2), kit.RoFormerBlock(16, 2, 20))
    model[2].ffn_norm.eps = 0.0
    with pytest.raises(ValueError, match=r"(?s)ConvNeXt1DBlock at '0'.*RoFormerBlock at '2'.*skip=.*strict=False"):
        fastblocks.convert(model)
    fastblocks.convert(model, skip=["0", "RoFormerBlock"])
    assert type(model[1]) is fastblocks.RNNBlock


@pytest.mark.parametrize("hold", [lambda block: block, lambda block: [block], lambda block: {"a": block}])
def test_a_block_that_is_held_elsewhere_is_named(hold):
    model = nn.Sequential(nn.Identity(), original.RNNBlock(8, 1, 2))
    model[0].__dict__["held"] = hold(model[1])
    with pytest.raises(ValueError, match="RNNBlock at '1': '0' holds it in its attribute held, too"):
        fastblocks.convert(model)
    assert type(model[1]) is original.RNNBlock


def test_without_check_only_what_is_seen_counts():
    class RoFormerBlock(original.RoFormerBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    model = fastblocks.convert(nn.Sequential(RoFormerBlock(16, 2, 20)), check=False)
    assert type(model[0]) is fastblocks.RoFormerBlock
    assert "not compared" in str(fastblocks.conversion_report(model))


def test_blind_weights_hide_nothing():
    """A zero-initialised branch shows nothing of itself: the comparison has weights of its own."""
    block = kit.RoFormerBlock(16, 2, 20)
    nn.init.zeros_(block.att.c_proj.weight)
    block.att_norm = rms_norm(1e-3)(16)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    refused(block, COMPUTES)
    for key, value in block.state_dict().items():
        assert torch.equal(value, before[key])


# --- foreign blocks of a known name


class Judges(nn.Module):
    def __init__(self, judges):
        super().__init__()
        self.discriminators = nn.ModuleList(judges)


class PeriodStack(nn.Module):
    """As HiFi-GAN, Vocos, SpeechBrain build it."""

    def __init__(self, period, norm=weight_norm):
        super().__init__()
        self.period = period
        self.convs = nn.ModuleList([norm(nn.Conv2d(1, 4, (5, 1), (3, 1))), norm(nn.Conv2d(4, 4, (5, 1), (3, 1)))])
        self.conv_post = norm(nn.Conv2d(4, 1, (3, 1)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm, lambda conv: conv])
def test_discriminators_of_other_kits(norm):
    for name in ("MultiPeriodDiscriminator", "MultiScaleDiscriminator", "MultiResolutionDiscriminator"):
        judges = type(name, (Judges,), {})([PeriodStack(2, norm), PeriodStack(3, norm)])
        left_alone(judges, "it is of HiFi-GAN's build", "nothing to gain")
    for name in ("MPD", "MSD", "MRD"):  # DAC's
        left_alone(type(name, (PeriodStack,), {})(2, norm), "it is of HiFi-GAN's build")
    model = nn.Sequential(type("MPD", (nn.Module,), {})())
    assert not fastblocks.conversion_report(fastblocks.convert(model)).rows


def test_other_known_names_with_nothing_known_inside():
    for name in (
        "MultiPeriodDiscriminator", "MultiScaleDiscriminator", "MultiResolutionDiscriminator", "RoFormerBlock",
        "MultiFrequencyDiscriminator", "RNNBlock", "Band", "Fourier", "ConvNeXt1DBlock", "ConvNeXt2DBlock",
        "ConvNeXtBlock", "AttentionRegisterRoFormerBlock",
    ):  # fmt: skip
        left_alone(type(name, (nn.Module,), {})())
        left_alone(type(name, (Judges,), {})([]))
        left_alone(type(name, (nn.Sequential,), {})(nn.Linear(2, 2)))


def test_recurrences_with_biases_or_projections_are_foreign():
    class RNNBlock(original.RNNBlock):
        pass

    block = RNNBlock(8, 1, 2)
    block.rnn.rnns = nn.ModuleList(nn.GRU(4, 4, batch_first=True) for _ in range(2))
    left_alone(block, "'rnn.rnns.0.bias_hh_l0' is only in it")
    block.rnn.rnns = nn.ModuleList(nn.RNN(4, 4, bias=False, batch_first=True) for _ in range(2))
    left_alone(block, "its weight_hh_l0 has 4 rows for 4 channels")
    block.rnn = nn.GRU(8, 8, batch_first=True)
    left_alone(block, "its state_dict has no 'rnn.rnns.0.weight_hh_l0'")


def test_parts_that_were_replaced_make_a_block_foreign():
    class Adapted(nn.Module):
        """A Linear with a low-rank adapter."""

        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, nn.Linear(16, 2, bias=False)

        def forward(self, x):
            return self.base(x)

    block = original.RoFormerBlock(16, 2, 20)
    block.att.c_attn = Adapted(block.att.c_attn)
    left_alone(block, "'att.c_attn.base.weight' is only in it")


def test_blocks_within_foreign_blocks_are_found():
    class Band(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = original.RNNBlock(8, 1, 2)

    model = nn.Sequential(Band())
    fastblocks.convert(model)
    assert type(model[0].inner) is fastblocks.RNNBlock
    assert list(fastblocks.conversion_report(model).left) == ["0"]
