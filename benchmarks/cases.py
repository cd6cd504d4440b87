"""The workloads. Full sizes fit two CPU cores; toy sizes, for tests, run in a moment."""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks import counts, losses, models
from benchmarks.case import Case

SAMPLE_RATE = 48000


def normal(*shapes: tuple[int, ...], scale: float = 1.0) -> Callable[[torch.Generator], list[Tensor]]:
    """Inputs of these shapes, normally distributed; weights are (out, in) with variance 1 / in where scale is 0."""

    def draw(generator: torch.Generator) -> list[Tensor]:
        return [torch.randn(shape, generator=generator) * (scale or shape[-1] ** -0.5) for shape in shapes]

    return draw


def operation(name: str, **options) -> Callable[[ModuleType], Callable]:
    """kit -> its function of that name."""
    return lambda kit: partial(getattr(kit.functional, name), **options)


def block(name: str, *arguments, **keywords) -> Callable[[ModuleType], nn.Module]:
    """kit -> its module of that name."""
    return lambda kit: getattr(kit, name)(*arguments, **keywords)


def all_cases(toy: bool = False) -> list[Case]:
    """Every case, in the order of the table."""
    return [*operations(toy), *attention_blocks(toy), *rnn_blocks(toy), *convnext_blocks(toy), *others(toy)]


def operations(toy: bool) -> list[Case]:
    """Every function of `fastblocks.functional`."""
    n, c = (37, 24) if toy else (16384, 128)
    f = int(8 * c / 3)
    b, t, g, h = (2, 9, 2, 4) if toy else (64, 100, 8, 16)
    cb, cc, cl = (1, 8, 13) if toy else (8, 256, 1000)

    def mlp_inputs(generator):
        return [normal((n, c))(generator)[0], *normal((f, c), (f, c), (c, f), scale=0)(generator)]

    def recurrent(gates):
        def draw(generator):
            x = normal((b, t, g * h))(generator)
            return x + normal((1, g, gates * h, h), (1, g, gates * h, h), scale=0)(generator)

        return draw

    def convnext_inputs(generator):
        x, bias1, bias2, residual = normal((cb, cl, cc), (4 * cc,), (cc,), (cb, cc, cl))(generator)
        weight1, weight2 = normal((4 * cc, cc), (cc, 4 * cc), scale=0)(generator)
        return [x, weight1, bias1, weight2, bias2, residual]

    def convnext_call(kit):
        return lambda x, w1, b1, w2, b2, residual: kit.functional.convnext_mlp(x, w1, b1, w2, b2, residual=residual)

    rnn_shape, flat = f"B {b}, T {t}, C {g * h}, G {g}", f"{n} × {c}"
    return [
        Case("op-rms_norm", "operation", flat, operation("rms_norm"), normal((n, c), (c,))),
        Case("op-swiglu", "operation", f"{n} × {f}", operation("swiglu"), normal((n, f), (n, f))),
        Case("op-swiglu_mlp", "operation", flat, operation("swiglu_mlp"), mlp_inputs, counts.swiglu_mlp(n, c)),
        attention("op-attention", *((2, 11, 2, 8) if toy else (16, 282, 4, 32))),
        attention("op-attention-window-2k", *((1, 20, 2, 8, 6, 2) if toy else (1, 2048, 8, 32, 64, 4))),
        attention("op-attention-window-8k", *((1, 40, 2, 8, 6, 2) if toy else (1, 8192, 8, 32, 64, 4))),
        Case(
            "op-grouped_gru", "operation", rnn_shape, operation("grouped_gru"), recurrent(3),
            counts.grouped_rnn(b * t, h, h, g, 3),
        ),
        Case(
            "op-grouped_lstm", "operation", rnn_shape, operation("grouped_lstm"), recurrent(4),
            counts.grouped_rnn(b * t, h, h, g, 4),
        ),
        Case(
            "op-depthwise_conv_layer_norm", "operation", f"B {cb}, C {cc}, L {cl}, k 7",
            operation("depthwise_conv_layer_norm", stride=(1,)),
            normal((cb, cc, cl), (cc, 1, 7), (cc,), (cc,), (cc,)), 2 * cb * cl * cc * 7,
        ),
        Case(
            "op-convnext_mlp", "operation", f"B {cb}, C {cc}, L {cl}", convnext_call, convnext_inputs,
            2 * counts.linear(cb * cl, cc, 4 * cc),
        ),
    ]  # fmt: skip


def attention(name, batch, length, heads, head_dim, window=-1, registers=0) -> Case:
    width = heads * head_dim
    shape = f"B {batch}, T {length}, H {heads}, D {head_dim}" + (f", W {window}, R {registers}" if registers else "")

    def build(kit):
        def call(qkv, rope, register_qkv=None):
            return kit.functional.rope_attention(qkv, rope, heads, window=window, register_qkv=register_qkv)

        return call

    def draw(generator):
        from benchmarks.original.functional import rope_table

        qkv, rope = normal((batch, length, 3 * width))(generator), [rope_table(registers + length, head_dim)]
        return qkv + rope + (normal((batch, registers, 3 * width))(generator) if registers else [])

    flops = counts.attention(batch, length, width, window, registers)
    return Case(name, "operation", shape, build, draw, flops, constant=(1,))


def attention_blocks(toy: bool) -> list[Case]:
    b, t, c, h = (2, 12, 16, 2) if toy else (64, 282, 128, 4)
    wt, wh, wd, w, r = (30, 2, 8, 6, 2) if toy else (8192, 8, 32, 64, 4)
    wc = wh * wd
    return [
        Case(
            "RoFormerBlock", "block", f"B {b}, T {t}, C {c}, H {h}", block("RoFormerBlock", c, h, t),
            normal((b, t, c)), counts.roformer(b, t, c),
        ),
        Case(
            "AttentionRegisterRoFormerBlock", "block", f"B 1, T {wt}, H {wh}, D {wd}, W {w}, R {r}",
            block("AttentionRegisterRoFormerBlock", wc, wh, wt, num_register_tokens=r, window_size=w),
            normal((1, wt, wc)), counts.roformer(1, wt, wc, w, r),
        ),
    ]  # fmt: skip


def rnn_blocks(toy: bool) -> list[Case]:
    def make(kind, both, b, t, c, g, layers):
        name = f"RNNBlock-{kind}" + ("-both" if both else "")
        return Case(
            name, "block", f"B {b}, T {t}, C {c}, G {g}, {layers} layers",
            block("RNNBlock", c, layers, g, kind, both), normal((b, t, c)),
            counts.rnn_block(b * t, c, layers, g, {"gru": 3, "lstm": 4}[kind], 1 + both),
        )  # fmt: skip

    if toy:
        return [make(kind, both, 2, 7, 16, 2, 2) for kind in ("gru", "lstm") for both in (False, True)]
    # the goal's shape first; the others shorter, for the sake of time
    sizes = {("gru", False): (64, 282, 128, 8, 2)}
    return [
        make(kind, both, *sizes.get((kind, both), (64, 64, 128, 8, 2)))
        for kind in ("gru", "lstm")
        for both in (False, True)
    ]


def convnext_blocks(toy: bool) -> list[Case]:
    def make(name, mode, stride, b, c_in, c_out, *sizes):
        spatial = len(sizes)
        down = [-(-s // stride) for s in sizes]
        x, y = (down, list(sizes)) if mode == "transposed" else (list(sizes), down)
        kernel = 7
        rows_in, rows_out = (b * int(torch.tensor(s).prod()) for s in (x, y))
        shape = f"B {b}, {c_in}→{c_out}, {'×'.join(map(str, x))}, k {'×'.join(['7'] * spatial)}, stride {stride}"

        def draw(generator):
            return [*normal((b, c_in, *x))(generator), tuple(y)]

        return Case(
            name, "block", shape, block(f"ConvNeXt{spatial}DBlock", kernel, stride, c_in, c_out, mode), draw,
            counts.convnext(rows_in, rows_out, kernel**spatial, c_in, c_out, mode == "transposed"),
        )  # fmt: skip

    line = (2, 8, 8, 15) if toy else (8, 256, 256, 1000)
    plane = (1, 6, 6, 9, 8) if toy else (2, 32, 32, 282, 64)
    step_line = (2, 8, 12, 15) if toy else (8, 128, 256, 1000)
    step_plane = (1, 6, 8, 9, 7) if toy else (2, 32, 64, 282, 64)
    swap = {name: (s[0], s[2], s[1], *s[3:]) for name, s in {"1": step_line, "2": step_plane}.items()}
    return [
        make("ConvNeXt1DBlock", "normal", 1, *line),
        make("ConvNeXt1DBlock-down", "normal", 2, *step_line),
        make("ConvNeXt1DBlock-up", "transposed", 2, *swap["1"]),
        make("ConvNeXt2DBlock", "normal", 1, *plane),
        make("ConvNeXt2DBlock-down", "normal", 2, *step_plane),
        make("ConvNeXt2DBlock-up", "transposed", 2, *swap["2"]),
    ]


class RoundTrip(nn.Module):
    """Split and join again, or there and back: both halves of a module as one."""

    def __init__(self, module: nn.Module, there: str, back: str):
        super().__init__()
        self.module, self.there, self.back = module, there, back

    def forward(self, x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
        between = getattr(self.module, self.there)(x)
        return between, getattr(self.module, self.back)(between, *arguments)


def gan_step(critic: Callable, clips: Sequence[Tensor]) -> None:
    """The discriminator's loss on a real and a fake clip, then the generator's on the fake one, both with backward."""
    real, fake = clips
    parameters = [p for p in critic.parameters() if p.requires_grad]
    (real_scores, _), (fake_scores, _) = critic(real), critic(fake.detach())
    losses.discriminator_loss(real_scores, fake_scores).backward()
    for parameter in parameters:
        parameter.requires_grad_(False)
    with torch.no_grad():
        _, real_maps = critic(real)
    scores, maps = critic(fake)
    (losses.adversarial_loss(scores) + losses.feature_loss(real_maps, maps)).backward()
    for parameter in parameters:
        parameter.requires_grad_(True)


class Critic(nn.Module):
    """A discriminator that, called with the two clips of `gan_step`, judges the first."""

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, clip: Tensor, fake: Tensor | None = None) -> tuple[list, list]:
        return self.discriminator(clip)


def others(toy: bool) -> list[Case]:
    """Spectral operations, discriminators, whole models."""
    b, frames, n_fft, bands, out = (1, 5, 64, 6, 4) if toy else (4, 282, 2048, 64, 128)
    rate, clip = (8000, 2400) if toy else (SAMPLE_RATE, 16384)
    samples = 500 if toy else 3 * SAMPLE_RATE
    windows = [256, 128] if toy else [2048, 1024, 512]

    def fourier(kit):
        return RoundTrip(kit.Fourier(n_fft, n_fft // 4), "stft", "istft")

    def band(kit):
        return RoundTrip(kit.Band(rate, n_fft, bands, 2, out), "split", "unsplit")

    critics = {
        "MultiPeriodDiscriminator": ({"periods": [2, 3]} if toy else {}),
        "MultiScaleDiscriminator": {"sample_rate": SAMPLE_RATE},
        "MultiResolutionDiscriminator": {"window_lengths": windows, "hidden_channels": 4 if toy else 32},
        "MultiFrequencyDiscriminator": {"nch": 1, "window_sizes": windows, "hidden_channels": 2 if toy else 8},
    }
    small = {"sample_rate": 8000, "n_fft": 256, "hop_length": 64, "bands": 8} if toy else {}
    length = 2000 if toy else SAMPLE_RATE
    nets = {
        "MelRoFormer": (models.MelRoFormer, (8, 1, 2) if toy else (32, 2, 4)),
        "MelRNN": (models.MelRNN, (8, 1, 2) if toy else (64, 2, 8)),
        "MelUNet": (models.MelUNet, (4, 2) if toy else (16, 3)),
    }
    return [
        Case(
            "Fourier", "spectral", f"({b}, {samples}), {n_fft}/{n_fft // 4}", fourier,
            lambda generator: [*normal((b, samples))(generator), samples],
        ),
        Case(
            "Band", "spectral", f"({b}, {n_fft // 2 + 1}, {frames}, 2), K {bands}, out {out}", band,
            normal((b, n_fft // 2 + 1, frames, 2)),
        ),
        *(
            Case(
                name, "discriminator", f"(1, 1, {clip}), real and fake, D and G",
                lambda kit, name=name, keywords=keywords: Critic(getattr(kit, name)(**keywords)),
                normal((1, 1, clip), (1, 1, clip), scale=0.1), constant=(0,), step=gan_step,
            )
            for name, keywords in critics.items()
        ),
        *(
            Case(
                name, "model", f"(1, {length}), {sizes}", lambda kit, net=net, sizes=sizes: net(kit, *sizes, **small),
                normal((1, length), scale=0.1), constant=(0,),
            )
            for name, (net, sizes) in nets.items()
        ),
    ]  # fmt: skip
