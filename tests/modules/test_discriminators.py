"""The four discriminators: numbers, feature maps, spectral norm, short clips, dtypes, copies."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

import fastblocks
from fastblocks.eager import convolution
from tests.compare import assert_close, relative_error
from tests.modules.harness import EXACT, check, check_low_precision, randomized, state_of, tensors
from tests.reference import discriminators as reference

MultiPeriod, MultiScale = fastblocks.MultiPeriodDiscriminator, fastblocks.MultiScaleDiscriminator
MultiResolution, MultiFrequency = fastblocks.MultiResolutionDiscriminator, fastblocks.MultiFrequencyDiscriminator


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable
    shape: tuple[int, int, int]
    reference: Callable
    fmaps: tuple[int, ...]  # how many a sub-discriminator
    terms: int

    def module(self, **options):
        return settled(randomized(self.make(**options)))

    def clip(self):
        return torch.randn(self.shape)


CASES = [
    Case(
        "period",
        partial(MultiPeriod, periods=[3]),
        (1, 1, 200),
        partial(reference.multi_period, periods=[3]),
        (5,),
        5120,
    ),
    Case(
        "scale",
        partial(MultiScale, 44100, [1, 4], nch=2),
        (1, 2, 600),
        partial(reference.multi_scale, downsample_rates=[1, 4]),
        (6, 6),
        5120,
    ),
    Case(
        "resolution",
        partial(MultiResolution, 2, window_lengths=[64, 50], hidden_channels=4),
        (2, 2, 200),
        partial(reference.multi_resolution, window_lengths=[64, 50]),
        (25, 25),
        2000,
    ),
    Case(
        "resolution-bands",
        partial(MultiResolution, window_lengths=[64], hop_factor=0.3, bands=[(0, 0.3), (0.2, 1)], hidden_channels=4),
        (2, 1, 200),
        partial(reference.multi_resolution, window_lengths=[64], hop_factor=0.3, bands=[(0, 0.3), (0.2, 1)]),
        (10,),
        2000,
    ),
    Case(
        "frequency",
        partial(MultiFrequency, 2, [64, 32], hidden_channels=2, sample_rate=44100),
        (2, 2, 300),
        partial(reference.multi_frequency, window_sizes=[64, 32], sample_rate=44100),
        (6, 6),
        2000,
    ),
]


def normed_convolutions(module):
    return [child for child in module.modules() if "weight_orig" in dict(child.named_parameters(recurse=False))]


def settled(module):
    """With singular vectors that belong to the weights: a norm of random ones is a sum that cancels."""
    for conv in normed_convolutions(module):
        for _ in range(3):
            u, v = reference.power_iteration(conv.weight_orig, conv.weight_u)
            conv.weight_u.copy_(u)
            conv.weight_v.copy_(v)
    return module


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
small_cases = pytest.mark.parametrize("case", CASES[2:], ids=lambda case: case.name)


@every_case
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_every_gradient(case, norm, training):
    """Spectral norm takes the component along the weight out of its gradient. Of a convolution with one channel of
    output that may be nearly all of it, so with the norm gradients are held jointly; `test_in_float64` holds each."""
    module = case.module(norm=norm).train(training)
    check(module, partial(case.reference, training=training), case.clip(), terms=case.terms, jointly=norm)


@small_cases
@pytest.mark.parametrize("training", [True, False])
def test_in_float64(case, training):
    module = case.module().double().train(training)
    check(module, partial(case.reference, training=training), case.clip().double(), terms=1)


# function of eager.convolution, x, weight, stride, padding, bias
PRODUCTS = [
    ("_AlongTime", (1, 3, 13, 2), (4, 3, 5, 1), (3, 1), (2, 0), True),
    ("_AlongTime", (2, 3, 11, 2), (4, 3, 5, 1), (3, 1), (2, 0), False),
    ("_AlongTime", (2, 3, 6), (4, 3, 3), (1,), (1,), True),
    ("_AlongTime", (1, 3, 2, 1), (4, 3, 5, 1), (3, 1), (2, 0), True),  # one position
    ("_AlongTime", (1, 3, 10, 2), (4, 3, 2, 1), (4, 1), (0, 0), True),
    ("_ToOneChannel", (2, 4, 5, 6), (1, 4, 3, 3), (1, 1), (1, 1), True),
    ("_ToOneChannel", (1, 4, 5, 6), (1, 4, 3, 2), (1, 1), (0, 1), False),
    ("_ToOneChannel", (2, 4, 7), (1, 4, 3), (1,), (1,), True),
    ("_ToOneChannel", (2, 4, 7), (1, 4, 1), (1,), (0,), False),
    ("_OfFewChannels", (3, 2, 5, 9), (4, 2, 3, 5), (1, 2), (1, 2), True),
    ("_OfFewChannels", (2, 1, 11, 2), (4, 1, 5, 1), (3, 1), (2, 0), False),
    ("_OfFewChannels", (2, 1, 12), (4, 1, 5), (3,), (0,), True),
]


@pytest.mark.parametrize("function, size, kernel, stride, padding, bias", PRODUCTS)
def test_convolution_as_a_product(function, size, kernel, stride, padding, bias, monkeypatch):
    """The library's numbers and gradients, twice differentiable; what is frozen gets none, and others stay the same."""
    monkeypatch.setattr(convolution, "MAX_COLUMNS", 1)  # clip by clip
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (size, kernel, kernel[:1])]
    leaves = leaves if bias else leaves[:2]

    def ours(x, weight, bias=None):
        return getattr(convolution, function).apply(x, weight, bias, stride, padding)

    def library(x, weight, bias=None):
        conv = torch.nn.functional.conv1d if x.dim() == 3 else torch.nn.functional.conv2d
        return conv(x, weight, bias, stride, padding)

    got, want = ours(*leaves), library(*leaves)
    grad = torch.randn_like(want)
    grads = torch.autograd.grad(want, leaves, grad)
    assert got.is_contiguous() and got.stride() == want.stride()
    for one, other in [(got, want), *zip(torch.autograd.grad(got, leaves, grad), grads, strict=True)]:
        assert relative_error(one, other) < EXACT
    assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True)
    for kept in range(len(leaves)):
        (alone,) = torch.autograd.grad(
            ours(*(leaf if i == kept else leaf.detach() for i, leaf in enumerate(leaves))).mul_(2), leaves[kept], grad
        )
        assert relative_error(alone, 2 * grads[kept]) < EXACT


def test_which_convolutions_are_products(monkeypatch):
    """The wide ones of a few positions, along time alone; those to one channel; the gradient of a few channels, where
    oneDNN would make it. Not what is traced, nor under autocast."""
    taken = []

    def spied(name, apply, *arguments):
        taken.append((name, tuple(arguments[1].shape)))
        return apply(*arguments)

    for name in ("_AlongTime", "_ToOneChannel", "_OfFewChannels"):
        monkeypatch.setattr(getattr(convolution, name), "apply", partial(spied, name, getattr(convolution, name).apply))
    module, clip = MultiPeriod(periods=[2, 11], norm=False).eval(), torch.randn(1, 1, 16384)
    wide = [("_AlongTime", (1024, 512, 5, 1)), ("_AlongTime", (1024, 1024, 5, 1))]
    first, last = ("_OfFewChannels", (32, 1, 5, 1)), ("_ToOneChannel", (1, 1024, 3, 1))
    got = module(clip)
    assert taken == [*wide, last, wide[1], last]  # of period 11 the last but one has 209 positions
    taken.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(clip[..., :2000])
    torch.func.vmap(lambda one: module(one[None])[0][0])(clip[..., :2000])
    assert not taken
    module(clip.expand(64, -1, -1)[..., :9000])
    assert taken == [last, last]
    taken.clear()
    module(clip[..., :40].expand(2, -1, -1).requires_grad_())
    assert taken == [first, *wide, last] * 2
    taken.clear()
    module(clip[..., :40].clone().requires_grad_())
    assert taken == [*wide, last] * 2  # one short clip
    monkeypatch.setattr(convolution, "quicker", lambda *_: None)
    for one, other in zip(tensors(got), tensors(module(clip)), strict=True):
        assert_close(one, other, 5120)


def test_periods_that_need_padding():
    """Of 7 samples a period of 7 needs none, of 5 three, and reflection takes them from before the last sample."""
    periods = [7, 5]
    module = randomized(MultiPeriod(periods=periods, norm=False))
    terms = 5 * (1 + 32 + 128 + 512 + 1024) + 3 * 1024  # of six layers, whose roundings follow one another
    check(module, partial(reference.multi_period, periods=periods), torch.randn(1, 1, 7), terms=terms)


@every_case
def test_order_of_feature_maps(case):
    module, clip = case.module().eval(), case.clip()
    scores, fmaps = module(clip)
    assert isinstance(scores, list) and isinstance(fmaps, list)
    assert tuple(map(len, fmaps)) == case.fmaps and len(scores) == len(case.fmaps)
    want_scores, want_fmaps = case.reference(state_of(module), clip.double())
    for got, want in zip(tensors((scores, fmaps)), tensors((want_scores, want_fmaps)), strict=True):
        assert got.shape == want.shape
        assert_close(got, want, case.terms)


@every_case
def test_keys(case):
    """Spectral norm's three entries a normed convolution, one weight otherwise, and a bias always."""
    normed, plain = case.make(), case.make(norm=False)
    convolutions = {name.removesuffix(".bias") for name in plain.state_dict() if name.endswith(".bias")}
    assert set(plain.state_dict()) == {f"{name}.{leaf}" for name in convolutions for leaf in ("weight", "bias")}
    free = {name for name in convolutions if name.endswith("output_conv")}  # not behind a `.conv`: never normed
    assert bool(free) == case.name.startswith("frequency")
    want = {f"{name}.{leaf}" for name in free for leaf in ("weight", "bias")}
    want |= {
        f"{name}.{leaf}" for name in convolutions - free for leaf in ("weight_orig", "weight_u", "weight_v", "bias")
    }
    assert set(normed.state_dict()) == want
    inner = "band_discriminators.0.0.conv" if case.name.startswith("resolution") else "layers.0.conv"
    assert f"discriminators.0.{inner}" in convolutions


@small_cases
def test_spectral_norm_is_torchs_over_several_steps(case):
    module, clip = case.module(), case.clip()
    ours = normed_convolutions(module)
    theirs = []
    for conv in ours:
        kind = torch.nn.Conv1d if conv.weight_orig.dim() == 3 else torch.nn.Conv2d
        twin = torch.nn.utils.spectral_norm(kind(conv.in_channels, conv.out_channels, conv.kernel_size))
        twin.load_state_dict(conv.state_dict())
        theirs.append(twin)
    for step in range(4):
        module(clip)
        for conv, twin in zip(ours, theirs, strict=True):
            twin(torch.zeros(1, conv.in_channels, *conv.kernel_size))
            for name in ("weight_u", "weight_v"):
                assert_close(
                    getattr(conv, name), getattr(twin, name), conv.weight_v.numel(), f"{name} after step {step}"
                )
            with torch.no_grad():  # an optimizer's step
                change = 0.1 * torch.randn_like(conv.weight_orig)
                conv.weight_orig += change
                twin.weight_orig += change


def test_spectral_norm_as_a_function():
    """Second derivatives, no iteration, several, and in a graph, against torch's."""
    function = fastblocks.functional.spectral_norm
    conv = torch.nn.utils.spectral_norm(torch.nn.Conv1d(3, 5, 4).double(), n_power_iterations=3)
    weight, u, v = conv.weight_orig.detach(), conv.weight_u.clone(), conv.weight_v.clone()
    still = partial(function, u=u, v=v, n_power_iterations=0)
    leaf = weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(still, leaf, fast_mode=True)
    assert torch.autograd.gradgradcheck(still, leaf, fast_mode=True)
    traced = torch.func.grad(lambda w: still(w).sin().sum())(weight)
    (want,) = torch.autograd.grad(still(leaf).sin().sum(), leaf)
    assert relative_error(traced, want) < EXACT
    assert torch.equal(u, conv.weight_u) and torch.equal(v, conv.weight_v)
    conv(torch.zeros(1, 3, 4).double())
    got = function(weight, u, v, n_power_iterations=3)
    for value, expected in ((got, conv.weight), (u, conv.weight_u), (v, conv.weight_v)):
        assert relative_error(value, expected) < EXACT


@pytest.mark.parametrize(
    "shapes, iterations, message",
    [
        (((5, 3, 4), (4,), (12,)), 1, r"\(5, 3, 4\), \(4,\)"),
        (((5, 3, 4), (5,), (11,)), 1, r"\(11,\)"),
        (((5,), (5,), (1,)), 1, r"\(5,\)"),
        (((5, 3, 4), (5,), (12,)), -1, "-1"),
    ],
)
def test_spectral_norm_checks_its_arguments(shapes, iterations, message):
    with pytest.raises(ValueError, match=message):
        fastblocks.functional.spectral_norm(*map(torch.ones, shapes), n_power_iterations=iterations)


def test_explain_sees_every_operation():
    """The small weights' norms in one call, others by themselves: the last is (256, 128, 3, 3)."""
    module = MultiFrequency(1, [32], hidden_channels=8)
    activations, norms = sorted(fastblocks.explain(module, torch.randn(1, 1, 100)).splitlines())
    assert norms.startswith("spectral_norm: ") and norms.endswith("× 4")
    assert activations.startswith("bias_leaky_relu: ") and activations.endswith("× 6")


@every_case
@pytest.mark.parametrize("norm", ["spectral", "weight"])
def test_scores_go_backward_one_after_the_other(case, norm):
    """As with norms one by one: parts that have nothing to do with a score get no gradient, instead of zeros, and each
    score has a backward pass of its own."""
    module, clip = case.module(norm=norm).double(), case.clip().double()
    module.eval()  # so that both calls see the same singular vectors
    parameters = list(module.parameters())
    want = torch.autograd.grad(sum(score.sum() for score in module(clip)[0]), parameters)
    first, *others = module(clip)[0]
    first.sum().backward()
    own = {id(parameter) for parameter in module.discriminators[0].parameters()}
    assert all((parameter.grad is not None) == (id(parameter) in own) for parameter in parameters)
    for score in others:
        score.sum().backward()
    for parameter, exact in zip(parameters, want, strict=True):
        assert relative_error(parameter.grad, exact) < EXACT


@pytest.mark.parametrize("norm", ["spectral", "weight"])
def test_keys_of_torchs_older_and_newer_norms(norm):
    """What HiFi-GAN's, DAC's and newer checkpoints have is loaded, and the numbers are torch's; a state that is saved
    has the older keys."""
    older = {"spectral": torch.nn.utils.spectral_norm, "weight": torch.nn.utils.weight_norm}[norm]
    newer = getattr(torch.nn.utils.parametrizations, f"{norm}_norm")
    clip = torch.randn(1, 1, 300)
    module = MultiFrequency(1, [64], hidden_channels=2, norm=norm)
    plain, keys = MultiFrequency(1, [64], hidden_channels=2, norm=False), set()
    for apply in (older, newer):
        twin = copy.deepcopy(plain)
        for layer in twin.discriminators[0].layers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                apply(layer.conv)
        if norm == "weight":
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.mul_(torch.rand(len(parameter)).view(-1, *[1] * (parameter.dim() - 1)) + 0.5)
        module.load_state_dict(settled(twin).state_dict(), strict=True)
        twin.eval(), module.eval()
        for got, want in zip(tensors(module(clip)), tensors(twin(clip)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert not any("parametrizations" in key for key in module.state_dict())
        keys = keys or twin.state_dict().keys()
        assert module.state_dict().keys() == keys
    remove = getattr(torch.nn.utils, f"remove_{norm}_norm")
    for layer in module.discriminators[0].layers:
        remove(layer.conv)
    plain.load_state_dict(module.state_dict())


def test_weight_norm_learns_is_copied_and_refuses_other_names():
    module, clip = MultiResolution(window_lengths=[64], hidden_channels=4, norm="weight"), torch.randn(1, 1, 200)
    state = state_of(module)
    grads = torch.autograd.grad(sum(s.sum() for s in module(clip)[0]), list(module.parameters()))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert all(map(torch.equal, tensors(twin(clip)), tensors(module(clip))))
    weights = {
        key.removesuffix("_v"): torch._weight_norm(v, state[f"{key.removesuffix('_v')}_g"], 0)
        for key, v in state.items()
        if key.endswith("_v")
    }
    plain = weights | {key: value for key, value in state.items() if key.endswith("bias")}
    score = reference.multi_resolution(plain, clip.double(), window_lengths=[64])[0][0].sum()
    want = torch.autograd.grad(score, [state[name] for name, _ in module.named_parameters()])
    for got, exact in zip(grads, want, strict=True):
        assert_close(got, exact, 2000)
    with pytest.raises(ValueError, match=r"norm must be .*'batch'"):
        MultiResolution(norm="batch")


@every_case
def test_power_iteration_in_training_only(case):
    module, clip = case.module(), case.clip()
    before = [conv.weight_u.clone() for conv in normed_convolutions(module)]
    module.eval()(clip)
    assert all(torch.equal(conv.weight_u, u) for conv, u in zip(normed_convolutions(module), before, strict=True))
    module.train()(clip)
    moved = [not torch.equal(conv.weight_u, u) for conv, u in zip(normed_convolutions(module), before, strict=True)]
    assert all(m for m, u in zip(moved, before, strict=True) if u.numel() > 1)


@small_cases
def test_two_forwards_before_a_backward(case):
    """Real and fake in one step: the second power iteration must not spoil the first graph."""
    module, clips = case.module().double(), [case.clip().double() for _ in range(2)]
    twin = copy.deepcopy(module)
    loss = sum(score.square().mean() for clip in clips for score in module(clip)[0])
    got = torch.autograd.grad(loss, list(module.parameters()))
    want = [torch.zeros_like(p) for p in module.parameters()]
    for clip in clips:
        part = sum(score.square().mean() for score in twin(clip)[0])
        want = [w + g for w, g in zip(want, torch.autograd.grad(part, list(twin.parameters())), strict=True)]
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < EXACT


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_copies_after_a_forward(case, training):
    module, clip = case.module().train(training), case.clip()
    module(clip)[0][0].sum().backward()
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)]
    want = list(tensors(module.eval()(clip)))
    for twin in twins:
        assert twin.training == training
        for got, expected in zip(tensors(twin.eval()(clip)), want, strict=True):
            assert torch.equal(got, expected)
        assert twin.state_dict().keys() == module.state_dict().keys()


@every_case
def test_a_copy_learns_by_itself(case):
    module, clip = case.module(), case.clip()
    module(clip)
    twin = copy.deepcopy(module)
    twin(clip)[0][0].sum().backward()
    assert all(p.grad is None for p in module.parameters())
    want = module.eval()(clip)[0][0]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.normal_()
    twin(clip)
    assert torch.equal(module(clip)[0][0], want)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_module(case, dtype):
    module = case.module().eval().to(dtype)
    clip = case.clip().to(dtype)
    assert {out.dtype for out in tensors(module(clip))} == {dtype}
    check_low_precision(module, case.reference, clip, dtype=dtype, layers=7)


@every_case
def test_cpu_autocast(case):
    module, clip = case.module().eval().bfloat16().float(), case.clip().bfloat16().float()

    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    check_low_precision(module, case.reference, clip, dtype=torch.bfloat16, call=call, layers=7)


def test_quiet_clips_in_half_precision():
    """The energy of a clip of 1e-4 is far below float16's smallest number; it is summed in float32."""
    module = settled(randomized(MultiFrequency(1, [64], hidden_channels=2))).eval()
    clip = (1e-4 * torch.randn(1, 1, 300)).half()
    want = module(clip.float())[0][0]
    got = module.half()(clip)[0][0]
    assert (
        relative_error(got, want) < 64 * torch.finfo(torch.float16).eps
    )  # seven layers, eight roundings of a bit each


def test_loudness_does_not_matter_to_the_frequency_discriminator():
    module = settled(randomized(MultiFrequency(2, [64], hidden_channels=2))).eval().double()
    clip = torch.randn(1, 2, 300, dtype=torch.float64)
    assert relative_error(module(100 * clip)[0][0], module(clip)[0][0]) < 1e-8  # the eps is 1e-7 of an energy of 600
    assert all(out.isfinite().all() for out in tensors(module(0 * clip)))


SHORTEST = [
    ("periods", lambda: MultiPeriod(), 1, 6),  # 5 more are needed for the period of 11
    ("one period", lambda: MultiPeriod(periods=[4]), 1, 3),
    ("rates", lambda: MultiScale(48000), 1, 4),
    ("rate 1", lambda: MultiScale(48000, [1]), 1, 1),
    ("windows", lambda: MultiResolution(window_lengths=[64, 128], hidden_channels=2), 1, 65),
    ("odd window", lambda: MultiResolution(window_lengths=[65], hidden_channels=2), 1, 33),
    ("frequency", lambda: MultiFrequency(2, [64, 256, 32], hidden_channels=2), 2, 129),
]


@pytest.mark.parametrize("make, nch, shortest", [case[1:] for case in SHORTEST], ids=[case[0] for case in SHORTEST])
def test_shortest_clip(make, nch, shortest):
    module = make()
    for out in tensors(module(torch.randn(1, nch, shortest))):
        assert out.isfinite().all()
    for length in {1, shortest // 2, shortest - 1} - {0, shortest}:
        with pytest.raises(ValueError, match=rf"\b{length}\b.*\b{shortest}\b"):
            module(torch.randn(1, nch, length))
    with pytest.raises(ValueError, match=rf"\b0\b.*\b{shortest}\b"):
        module(torch.randn(1, nch, 0))


@small_cases
def test_layout_of_the_clip(case):
    module, clip = case.module().eval(), case.clip()
    want = module(clip)[0]
    for unusual in (
        clip.mT.contiguous().mT,
        torch.stack((clip, clip), -1)[..., 0],
        torch.cat((clip, clip), -1)[..., : clip.shape[-1]],
    ):
        for got, expected in zip(module(unusual)[0], want, strict=True):
            assert_close(got, expected, case.terms)


@every_case
def test_empty_batch(case):
    module = case.module().eval()
    clip = torch.zeros(0, *case.shape[1:], requires_grad=True)
    outputs = list(tensors(module(clip)))
    assert all(len(out) == 0 for out in outputs)
    sum(out.sum() for out in outputs).backward()
    assert clip.grad.shape == clip.shape


@small_cases
def test_gradient_penalty(case):
    module = case.module(norm=False).double()
    clip = case.clip()[:1].double().requires_grad_()

    def slope(x):
        return torch.autograd.grad(sum(score.sum() for score in module(x)[0]), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(lambda x: slope(x).square().sum(), clip, fast_mode=True)


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=lambda case: case.name)
def test_compiles_without_a_graph_break(case):
    torch.compiler.reset()
    module, clip = case.module().eval(), case.clip()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, want in zip(tensors(compiled(clip)), tensors(module(clip)), strict=True):
        assert_close(got, want, case.terms)


@small_cases
def test_vmap_is_a_loop(case):
    module, clips = case.module().eval(), torch.randn(2, *case.shape)
    together = torch.func.vmap(lambda clip: module(clip)[0])(clips)
    for i, clip in enumerate(clips):
        for got, want in zip(together, module(clip)[0], strict=True):
            assert_close(got[i], want, case.terms)


@pytest.mark.parametrize("shape", [(1, 3, 400), (1, 400)])
def test_audio_of_another_shape(shape):
    with pytest.raises(ValueError, match="2"):
        MultiFrequency(2, [64])(torch.zeros(shape))
