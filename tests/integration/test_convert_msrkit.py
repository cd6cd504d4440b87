"""The adapters of the kit's own blocks: what each tells by itself, and which decisions are asked for."""

import warnings

import pytest
import torch
from torch import nn

import fastblocks
from benchmarks import original
from fastblocks.discriminator._layers import WeightNorm
from tests.integration import kit
from tests.integration.converted import assert_follows, copied


def swapped(block, x, arguments=None, method="forward"):
    """The replacement; it computes what the block did."""
    block.eval()
    before = copied(block)
    new = fastblocks.convert(block, arguments)
    assert type(new) is getattr(fastblocks, type(block).__name__)
    assert_follows(new, before, x, call=lambda module, x: getattr(module, method)(x), gradients=False)
    return new


# --- RoFormerBlock


@pytest.mark.parametrize("base", [10000, 500, 2000, 500000, 1e6, 12345.678, 1.5])
@pytest.mark.parametrize("n_embd, n_head", [(16, 2), (64, 1), (8, 2)])
def test_everything_of_a_roformer_stands_in_it(base, n_embd, n_head):
    block = kit.RoFormerBlock(n_embd, n_head, 300, base)
    new = swapped(block, torch.randn(1, 300, n_embd))
    assert (new.att.n_head, new.max_seq_len) == (n_head, 300)
    assert new.att.rope_cache is block.att.rope_cache
    new.att._apply(lambda tensor: tensor.to("meta"))
    new.att.rope = new.att.rope.to("meta")
    rebuilt = new.att._rope_on(torch.device("cpu"))  # from the base that was read
    torch.testing.assert_close(rebuilt, block.att.rope_cache, rtol=0, atol=300 * 2**-22)


def test_a_single_pair_or_position_has_any_base():
    swapped(kit.RoFormerBlock(4, 2, 20, 777), torch.randn(1, 20, 4))
    swapped(kit.RoFormerBlock(16, 2, 1, 777), torch.randn(1, 1, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_table_that_was_cast_keeps_its_angles(dtype):
    block = kit.RoFormerBlock(16, 2, 300, 500).to(dtype)
    want = block.att.rope_cache.float()
    new = fastblocks.convert(block)
    assert torch.equal(new.att.rope, want)
    assert new.att._table == (300, 8, 500)


@pytest.mark.parametrize("change", [lambda table: 1.01 * table, lambda table: table[:, [0, 1, 3, 2]]])
def test_a_table_of_no_base_is_refused(change):
    block = kit.RoFormerBlock(16, 2, 40)
    block.att.rope_cache = change(block.att.rope_cache)
    model = nn.Sequential(block)
    with pytest.raises(ValueError, match="RoFormerBlock at '0': its rotary table is not that of any base"):
        fastblocks.convert(model)
    fastblocks.convert(model, strict=False)
    assert model[0] is block


def test_without_a_table_the_arguments_are_asked_for():
    class RoFormerBlock(kit.RoFormerBlock):
        """Rotates by a table that it computes at each call."""

        def __init__(self):
            super().__init__(16, 2, 40, 500)
            self.att.tables = [self.att._buffers.pop("rope_cache")]
            type(self.att).rope_cache = property(lambda att: None)

    attention = kit.SelfAttention
    kit.SelfAttention = type("SelfAttention", (attention,), {})
    try:
        block = RoFormerBlock()
    finally:
        kit.SelfAttention = attention
    with pytest.raises(ValueError, match=r"arguments=\{'RoFormerBlock': \{'max_seq_len': …, 'rope_base': …\}\}"):
        fastblocks.convert(block)
    new = fastblocks.convert(block, {"RoFormerBlock": {"max_seq_len": 40, "rope_base": 500}}, check=False)
    assert new.att._table == (40, 8, 500)


# --- the register block


def test_the_kits_register_block_asks_for_a_decision():
    model = nn.ModuleDict({"plain": kit.RoFormerBlock(16, 2, 40), "kit": kit.register_block(16, 2, 40, 500, 2, 4)})
    blocks = dict(model)
    with pytest.raises(
        ValueError, match=r"(?s)RoFormerBlock at 'kit': .*num_register_tokens=2, window_size=4.*inverted"
    ):
        fastblocks.convert(model)
    assert dict(model) == blocks
    fastblocks.convert(model, strict=False)
    assert model["kit"] is blocks["kit"]
    assert "inverted" in fastblocks.conversion_report(model).left["kit"]


@pytest.mark.parametrize("registers", [0, 2])
def test_a_decision_for_what_the_register_block_meant(registers):
    block = kit.register_block(16, 2, 40, 500, 2, 4)
    model = nn.Sequential(block)
    fastblocks.convert(model, {"0": {"num_register_tokens": registers, "window_size": 4}})
    new = model[0]
    assert type(new) is fastblocks.AttentionRegisterRoFormerBlock
    assert (new.num_register_tokens, new.window_size, new.max_seq_len) == (registers, 4, 40)
    assert new.att.c_attn.weight is block.att.c_attn.weight
    assert "not compared: the mask is what was meant" in str(fastblocks.conversion_report(model))
    twin = fastblocks.AttentionRegisterRoFormerBlock(16, 2, 40, 500, registers, 4)
    twin.load_state_dict(new.state_dict())
    x = torch.randn(2, 40, 16)
    torch.testing.assert_close(new(x), twin(x))
    assert new(x).isfinite().all()


def test_a_register_block_with_the_right_mask_is_compared():
    class AttentionRegisterRoFormerBlock(original.AttentionRegisterRoFormerBlock):
        pass

    swapped(AttentionRegisterRoFormerBlock(16, 2, 60, 500, 3, 40), torch.randn(1, 60, 16))

    class AttentionRegisterRoFormerBlock(original.AttentionRegisterRoFormerBlock):
        def forward(self, x, registers=None, return_registers=False):
            window, self.window_size = self.window_size, 2 * self.window_size
            try:
                return super().forward(x, registers, return_registers)
            finally:
                self.window_size = window

    with pytest.raises(ValueError, match="computes something else"):
        fastblocks.convert(AttentionRegisterRoFormerBlock(16, 2, 60, 500, 3, 30))


# --- the others


@pytest.mark.parametrize("variant", ["convnext", "msrkit"])
@pytest.mark.parametrize("mode", ["normal", "transposed"])
@pytest.mark.parametrize("dims", [1, 2])
def test_convnext_arguments_are_read_from_the_block(dims, variant, mode):
    cls, kernel, stride = ((original.ConvNeXt1DBlock, 5, 3), (original.ConvNeXt2DBlock, (3, 5), (2, 1)))[dims - 1]
    new = swapped(cls(kernel, stride, 6, 8, mode, variant=variant), torch.randn(1, 6, *(7, 4)[:dims]))
    assert (new.mode, new.variant) == (mode, variant)


@pytest.mark.parametrize("rnn_type", ["gru", "lstm"])
@pytest.mark.parametrize("layers, groups, both", [(1, 1, False), (2, 4, True), (3, 2, False)])
def test_rnn_arguments_are_read_from_the_block(rnn_type, layers, groups, both):
    swapped(original.RNNBlock(16, layers, groups, rnn_type, both), torch.randn(2, 9, 16))


JUDGED = {"MultiResolutionDiscriminator": "band_discriminators.0.0.conv"}
JUDGES = {
    "MultiPeriodDiscriminator": ((2, 44100, [2, 3]), {}),
    "MultiScaleDiscriminator": ((44100, [1, 3], 2), {}),
    "MultiResolutionDiscriminator": ((2, 48000, [64, 32], 0.25, [(0, 0.5), (0.5, 1)], True, 4), {}),
    "MultiFrequencyDiscriminator": ((2, [64, 32], 4, 44100), {"sample_rate": 44100}),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [True, False, "weight"])
@pytest.mark.parametrize("name", JUDGES)
def test_discriminators(name, norm):
    arguments, _ = JUDGES[name]
    options = {"norm": norm is True, **({"hidden_channels": 4} if "Res" in name else {})}
    judge = getattr(original, name)(*arguments[:5], **options)
    if norm == "weight":
        for layer in [m for m in judge.modules() if hasattr(m, "conv")]:
            nn.utils.weight_norm(layer.conv)
    if name == "MultiResolutionDiscriminator":
        judge.hop_factor, judge.bands, judge.window_lengths = 0.25, [(0, 0.5), (0.5, 1)], [64, 32]
    if name == "MultiFrequencyDiscriminator":
        judge.sample_rate, judge.window_sizes = 44100, [64, 32]
    # in float64: before power iterations have found them, norms are wrong, and values that cancel are large
    new = swapped(judge.double(), torch.randn(1, 2, 500, dtype=torch.float64))
    assert new.norm == norm
    new.train()(torch.randn(1, 2, 500, dtype=torch.float64))[0][0].sum().backward()
    assert all(p.grad is not None for p in new.discriminators[0].parameters())
    if norm == "weight":
        conv = new.discriminators[0].get_submodule(JUDGED.get(name, "layers.0.conv"))
        assert [type(hook) for hook in conv._forward_pre_hooks.values()] == [WeightNorm]
        nn.utils.remove_weight_norm(conv)


@pytest.mark.parametrize("nch, windows, width", [(1, [64, 32], 4), (2, [512], 2), (1, [2048, 1024], 8)])
def test_a_discriminator_that_rounds_its_spectra_agrees(nch, windows, width):
    judge = kit.MultiFrequencyDiscriminator(nch, windows, width, 44100)
    swapped(judge, torch.randn(1, nch, 3000))


@pytest.mark.parametrize("sr, scale", [(48000, "mel"), (44100, "mel"), (22050, "mel"), (12345, "linear")])
@pytest.mark.parametrize("cls", [original.Band, kit.Band])
def test_bands(cls, sr, scale):
    new = swapped(cls(sr, 256, 10, 2, 4, scale), torch.randn(1, 129, 3, 2), method="split")
    assert new.scale == scale
    if scale == "mel":
        assert new.sr == sr


def test_bands_of_unusual_rates_take_it_as_an_argument():
    swapped(original.Band(12345, 256, 10, 2, 4), torch.randn(1, 129, 3, 2), {"Band": {"sr": 12345}}, method="split")
    with pytest.raises(ValueError, match="'filterbanks' has other values"), warnings.catch_warnings():
        fastblocks.convert(original.Band(12345, 256, 10, 2, 4), {"Band": {"sr": 12346, "scale": "mel"}})


def test_fourier():
    swapped(original.Fourier(64, 24), torch.randn(2, 300), method="stft")
