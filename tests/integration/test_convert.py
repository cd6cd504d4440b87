"""`convert` swaps blocks in place and keeps weights, optimizers, hooks, modes; what it cannot swap it names."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastblocks
from benchmarks import original
from benchmarks.train import models
from fastblocks import backend
from fastblocks.convert import driver, registry
from tests.integration import kit
from tests.integration.converted import assert_follows

SPECTRUM = {"sample_rate": 8000, "n_fft": 256, "hop_length": 64, "bands": 8}


def blocks():
    return nn.Sequential(
        original.RoFormerBlock(16, 2, 40),
        original.RNNBlock(16, 2, 2, "lstm", True),
        original.AttentionRegisterRoFormerBlock(16, 2, 40, num_register_tokens=2, window_size=4),
        original.ConvNeXt1DBlock(3, 1, 20, 20),
    )


def converted(model, *arguments, **options):
    """The converted model; it computes what the model did."""
    model.eval()
    before = copy.deepcopy(model)
    model = fastblocks.convert(model, *arguments, **options)
    assert_follows(model, before, torch.randn(2, 20, 16), jointly=True)
    return model


def unchanged(model, match, *arguments, **options):
    """convert raises a ValueError and changes nothing; its message."""
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(ValueError, match=match) as caught:
        fastblocks.convert(model, *arguments, **options)
    assert dict(model.named_modules(remove_duplicate=False)) == before
    return str(caught.value)


def ours(module):
    return type(module).__module__.startswith("fastblocks.")


def test_the_signature():
    signature = inspect.signature(fastblocks.convert)
    found = [(p.name, p.default, p.kind is p.KEYWORD_ONLY) for p in signature.parameters.values()]
    assert found[:2] == [("model", inspect.Parameter.empty, False), ("arguments", None, False)]
    assert found[2:] == [("only", None, True), ("skip", None, True), ("check", True, True), ("strict", True, True)]


def test_blocks_are_swapped_and_need_no_arguments():
    model = blocks()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert converted(model) is model
    assert all(map(ours, model))
    assert not any(module.training for module in model.modules())
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


@pytest.mark.parametrize("net", ["roformer", "rnn", "unet", "kit"])
def test_whole_models_need_no_arguments(net):
    model = {
        "roformer": lambda: models.MelRoFormer(original, 8, 1, 2, **SPECTRUM),
        "rnn": lambda: models.MelRNN(original, 8, 1, 2, **SPECTRUM),
        "unet": lambda: models.MelUNet(original, 4, 2, **SPECTRUM),
        "kit": kit.MelRoFormer,
    }[net]().eval()
    before = copy.deepcopy(model)
    fastblocks.convert(model)
    report = fastblocks.conversion_report(model)
    assert not report.left
    assert ours(model.band)
    assert ours(model.fourier)
    assert_follows(model, before, torch.randn(1, 2000), jointly=True)


def test_an_optimizer_goes_on_working():
    model = blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastblocks.convert(model)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 20, 16)).square().mean().backward()
    optimizer.step()
    for name in ("0.att.c_attn.weight", "1.rnn.rnns.0.weight_hh_l0", "2.registers", "3.dwconv.weight"):
        assert not torch.equal(before[name], model.state_dict()[name])


def test_a_shared_block_stays_one():
    block = blocks()[1]
    model = fastblocks.convert(nn.Sequential(block, block))
    assert model[0] is model[1]
    assert isinstance(model[0], fastblocks.RNNBlock)
    assert fastblocks.conversion_report(model).swapped == ["0", "1"]


def test_a_block_itself_is_returned_anew():
    block = fastblocks.convert(blocks()[3])
    assert isinstance(block, fastblocks.ConvNeXt1DBlock)
    assert fastblocks.conversion_report(block).swapped == [""]


def test_a_converted_model_is_left_as_it_is():
    model = fastblocks.convert(blocks())
    before = list(model)
    assert list(fastblocks.convert(model)) == before
    assert str(fastblocks.conversion_report(model)) == "no block of a known name"


def test_neither_random_numbers_nor_modes_nor_gradients_of_the_caller_change():
    torch.manual_seed(1)
    want = torch.rand(1)
    torch.manual_seed(1)
    model = blocks()
    torch.manual_seed(1)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        fastblocks.convert(model)
    assert torch.equal(torch.rand(1), want)
    assert all(parameter.grad is None for parameter in model.parameters())


# --- which blocks


def test_only_and_skip_take_classes_and_paths():
    model = nn.ModuleDict({"a": blocks(), "b": blocks()})
    fastblocks.convert(model, only=["a", "RNNBlock"], skip=["a.3", "AttentionRegisterRoFormerBlock"])
    assert [ours(block) for block in model["a"]] == [True, True, False, False]
    assert [ours(block) for block in model["b"]] == [False, True, False, False]
    report = fastblocks.conversion_report(model)
    assert report.swapped == ["a.0", "a.1", "b.1"]
    assert [row.path for row in report.rows] == [f"{name}.{i}" for name in "ab" for i in range(4)]
    both, neither = "skip names it", "only does not name it"
    assert report.left == {"a.2": both, "a.3": both, "b.0": neither, "b.2": both, "b.3": neither}


@pytest.mark.parametrize("option", ["arguments", "only", "skip"])
def test_names_of_nobody_are_refused(option):
    names = {"Nobody": {}} if option == "arguments" else ["Nobody"]
    unchanged(blocks(), rf"{option} names \['Nobody'\]", **{option: names})


@pytest.mark.parametrize("option", ["only", "skip"])
def test_a_single_name_is_no_collection(option):
    unchanged(blocks(), f"{option} must be a collection", **{option: "RNNBlock"})


# --- arguments


def test_all_missing_arguments_are_asked_for_at_once():
    model = nn.ModuleDict({
        "judge": original.MultiFrequencyDiscriminator(1, [64, 32], 2),
        "other": original.MultiFrequencyDiscriminator(1, [32], 2),
        "bands": original.MultiResolutionDiscriminator(1, 48000, [64], 0.25, [(0, 1)], True, 2),
        "band": original.Band(12345, 64, 4, 1, 2),
        "rnn": blocks()[1],
    })  # fmt: skip
    message = unchanged(model, "cannot tell all arguments")
    assert message.count("pass arguments=") == 1
    for part in (
        "MultiFrequencyDiscriminator at 'judge'", "MultiFrequencyDiscriminator at 'other'", "Band at 'band'",
        "'MultiFrequencyDiscriminator': {'sample_rate': …}", "'Band': {'sr': …, 'scale': …}",
        "'MultiResolutionDiscriminator': {'hop_factor': …, 'bands': …}",
    ):  # fmt: skip
        assert part in message
    fastblocks.convert(model, {
        "MultiFrequencyDiscriminator": {"sample_rate": 48000},
        "MultiResolutionDiscriminator": {"hop_factor": 0.25, "bands": [(0, 1)]},
        "band": {"sr": 12345, "scale": "mel"},
    })  # fmt: skip
    assert all(map(ours, model.values()))


def test_without_strict_blocks_with_missing_arguments_are_left():
    model = nn.Sequential(original.Band(12345, 64, 4, 1, 2), blocks()[1])
    fastblocks.convert(model, strict=False)
    assert fastblocks.conversion_report(model).left == {"0": "it does not tell sr, scale"}
    assert ours(model[1])


def test_unknown_arguments_are_named_with_their_block():
    match = r"RoFormerBlock at '0': unknown arguments \['n_heads'\]; RoFormerBlock takes n_embd, n_head, max_seq_len"
    unchanged(blocks(), match, {"0": {"n_heads": 2}})
    unchanged(blocks(), match, {"0": {"n_heads": 2}}, strict=False)


@pytest.mark.parametrize(
    "path, argument, value, have",
    [
        ("0", "n_head", 4, "2"),
        ("0", "max_seq_len", 39, "40"),
        ("0", "rope_base", 500, "10000"),
        ("1", "rnn_type", "gru", "'lstm'"),
        ("1", "n_groups", 4, "2"),
        ("2", "window_size", 8, "4"),
        ("2", "num_register_tokens", 3, "2"),
        ("3", "kernel_size", 5, r"\(3,\)"),
        ("3", "variant", "msrkit", "'convnext'"),
    ],
)
def test_arguments_that_contradict_the_block_are_refused(path, argument, value, have):
    match = rf"at '{path}': {argument}={value!r} is given, the block has {have}"
    unchanged(blocks(), match, {path: {argument: value}})
    unchanged(blocks(), match, {path: {argument: value}}, strict=False, check=False)


def test_arguments_that_agree_may_be_given():
    converted(blocks(), {"RoFormerBlock": {"n_head": 2, "rope_base": 10000.0}, "3": {"kernel_size": [3], "stride": 1}})


def test_paths_win_over_classes():
    model = nn.Sequential(original.Band(12345, 64, 4, 1, 2), original.Band(12346, 64, 4, 1, 2))
    fastblocks.convert(model, {"Band": {"sr": 12345, "scale": "mel"}, "1": {"sr": 12346}})
    assert [band.sr for band in model] == [12345, 12346]


# --- what every part of a block keeps


def test_modes_and_frozen_parameters_are_kept():
    model = blocks()
    model[0].att.eval()
    model[1].rnn.rnns[1].eval()
    model[3].pwconv1.requires_grad_(False)
    fastblocks.convert(model)
    assert [model[0].training, model[0].att.training, model[0].att.c_attn.training] == [True, False, False]
    assert [rnn.training for rnn in model[1].rnn.rnns] == [True, False]
    assert not model[3].pwconv1.weight.requires_grad
    assert model[3].pwconv2.weight.requires_grad


def test_tied_weights_stay_tied():
    model = nn.Sequential(original.RoFormerBlock(16, 2, 40), original.RoFormerBlock(16, 2, 40))
    model[0].mlp.c_fc2.weight = model[0].mlp.c_fc1.weight  # within a block
    model[1].mlp.c_proj.weight = model[0].mlp.c_proj.weight  # between blocks
    converted(model)
    assert model[0].mlp.c_fc2.weight is model[0].mlp.c_fc1.weight
    assert model[1].mlp.c_proj.weight is model[0].mlp.c_proj.weight


def test_buffers_keep_their_dtype():
    model = nn.ModuleList([original.Fourier(64, 16), original.RoFormerBlock(16, 2, 40)]).to(torch.bfloat16)
    window = model[0].window
    fastblocks.convert(model)
    assert model[0].window is window
    assert model[1].att.rope.dtype == torch.float32


def test_hooks_survive_and_can_be_removed():
    model, seen = blocks(), []

    def note(name):
        return lambda module, *_: seen.append((name, type(module).__module__.split(".")[0]))

    handles = [
        model[0].register_forward_hook(note("block")),
        model[0].att.register_forward_pre_hook(note("att")),
        model[1].rnn.rnns[0].register_forward_hook(note("group")),
        model[3].pwconv1.register_full_backward_hook(note("backward")),
        model[2].register_load_state_dict_pre_hook(note("load")),
        model[2].register_state_dict_post_hook(note("state")),
    ]
    fastblocks.convert(model)
    seen.clear()
    model(torch.randn(2, 20, 16, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert {name for name, _ in seen} == {"block", "att", "group", "backward", "load", "state"}
    assert ("block", "fastblocks") in seen
    assert ("load", "fastblocks") in seen
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.randn(2, 20, 16, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert not seen


def test_hooks_without_a_place_are_named():
    class Doubled(nn.Module):
        def forward(self, x):
            return x

    model = blocks()
    model[0].extra = Doubled()
    model[0].extra.register_forward_hook(lambda *_: None)
    unchanged(model, "RoFormerBlock at '0': 'extra' has hooks, and fastblocks.RoFormerBlock has no such child")


def test_blocks_with_a_forward_of_their_own_or_compiled_in_place_are_named():
    model = blocks()
    model[1].rnn.forward = lambda x: x
    model[3].compile(backend="eager")
    message = unchanged(model, "RNNBlock at '1': 'rnn' has a forward of its own")
    assert "ConvNeXt1DBlock at '3': it was compiled in place" in message
    fastblocks.convert(model, strict=False)
    assert [ours(block) for block in model] == [True, False, True, False]


def test_spectral_norm_after_a_forward():
    judge = original.MultiFrequencyDiscriminator(1, [64, 32], 2)
    x = torch.randn(1, 1, 300)
    judge(x)  # the derived weights are no leaves now
    want = copy.deepcopy(judge.state_dict())
    new = fastblocks.convert(judge, {"MultiFrequencyDiscriminator": {"sample_rate": 48000}})
    assert new.state_dict().keys() == want.keys()
    for key, value in new.state_dict().items():
        assert torch.equal(value, want[key]), key
    new.eval(), judge.eval()
    assert_follows(new, judge, x, gradients=False)
    nn.utils.remove_spectral_norm(new.discriminators[0].layers[0].conv)


def test_a_compiled_parent_runs_the_new_blocks():
    torch._dynamo.reset()  # its caches do not look at hooks
    model = nn.Sequential(original.RNNBlock(8, 1, 2)).eval()
    x = torch.randn(1, 5, 8)
    compiled = torch.compile(model, backend="eager")
    want = compiled(x)
    assert fastblocks.convert(compiled) is compiled
    assert fastblocks.conversion_report(compiled).swapped == ["_orig_mod.0"]
    assert ours(model[0])
    called = []
    model[0].register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(compiled(x), want)
    assert called


def test_a_compiled_block_runs_the_new_one():
    torch._dynamo.reset()  # its caches do not look at hooks
    block = torch.compile(original.RNNBlock(8, 1, 2).eval(), backend="eager")
    x = torch.randn(1, 5, 8)
    want = block(x)
    assert fastblocks.convert(block) is block
    called = []
    block._orig_mod.mlp.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(block(x), want)
    assert called


def test_a_model_on_the_meta_device_is_not_compared():
    with torch.device("meta"):
        model = nn.Sequential(original.RNNBlock(8, 1, 2))
    unchanged(model, "meta device, where nothing can be compared")
    fastblocks.convert(model, check=False)
    assert isinstance(model[0], fastblocks.RNNBlock)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "not compared" in str(fastblocks.conversion_report(model))


# --- the report


def test_the_report_is_a_table():
    class MultiPeriodDiscriminator(nn.Module):
        pass

    model = nn.ModuleDict({"rnn": blocks()[1], "judge": MultiPeriodDiscriminator()})
    fastblocks.convert(model)
    report = fastblocks.conversion_report(model)
    assert report.swapped == ["rnn"]
    assert list(report.left) == ["judge"]
    lines = str(report).splitlines()
    assert lines[0].split() == ["block", "class"]
    assert lines[1].split()[:5] == ["rnn", "RNNBlock", "swapped", "agrees", "to"]
    assert lines[2].split()[:3] == ["judge", "MultiPeriodDiscriminator", "left"]


def test_the_report_says_where_converting_does_not_pay():
    fourier, gru = original.Fourier(64, 16), original.RNNBlock(16, 2, 2, "gru", True)
    model = fastblocks.convert(nn.Sequential(*blocks(), fourier, original.ConvNeXt1DBlock(3, 1, 20, 20), gru))
    rows = fastblocks.conversion_report(model).rows
    assert [row.name for row in rows if row.speed] == ["RNNBlock", "ConvNeXt1DBlock", "Fourier", "ConvNeXt1DBlock"]
    below = [line for line in str(fastblocks.conversion_report(model)).splitlines() if line.startswith("no faster")]
    assert below == [
        "no faster here, RNNBlock: PyTorch's own LSTM layers do most of the work in both",
        "no faster here, ConvNeXt1DBlock: PyTorch's own convolutions and matrix products do most of the work in both",
        "no faster here, Fourier: PyTorch's own Fourier transforms do most of the work in both",
    ]


@pytest.mark.parametrize("kernels, expected", [("", ""), ("this GPU is too old", "no kernel runs on this GPU")])
def test_what_the_report_says_of_a_gpu(kernels, expected, monkeypatch):
    runtime = SimpleNamespace(unsupported_reason=lambda device: kernels)
    monkeypatch.setattr(backend, "_kernel_runtime", lambda: (runtime, ""))
    block = original.ConvNeXt1DBlock(3, 1, 20, 20)
    with FakeTensorMode():
        block.dwconv.weight = nn.Parameter(torch.empty(20, 1, 3, device="cuda"))
    said = driver._no_gain(registry.adapter_of(block), {}, block)
    assert said.startswith(expected) and bool(said) == bool(expected)


def test_no_report_of_a_model_that_was_not_converted():
    with pytest.raises(ValueError, match=r"Sequential is not the result of fastblocks.convert"):
        fastblocks.conversion_report(blocks())
