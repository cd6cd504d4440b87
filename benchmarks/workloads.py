"""The standard workloads: the shapes of real models, at full size for a GPU, small for a CPU, toy for tests.

The shapes come from four clips of 3 s at 48 kHz, an STFT of 2048 by 512 samples and 64 mel bands: 282 frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import counts, steps
from benchmarks.case import Case
from benchmarks.cases import SAMPLE_RATE, attention, block, gan_step, normal, operation

SIZES = ("full", "small", "toy")
MODES = ("forward", "backward", "training")
WINDOWS = (2048, 1024, 512)  # samples, of the spectral discriminators


@dataclass(frozen=True)
class Workload:
    """A case of the standard suite.

    Args:
        case: what is computed; `case.what` is "operation" (tensors in the dtype that is measured) or else a module
            with float32 weights, which 16-bit dtypes reach through autocast.
        rivals: name of a rival -> what `rivals.build` has to know of the shape.
        has_floor: bytes and FLOPs of inputs and outputs bound the time from below in a useful way; False for whole
            networks.
        banded: attention whose float64 reference must not hold all pairs of tokens.
    """

    case: Case
    rivals: dict[str, dict[str, Any]] = field(default_factory=dict)
    has_floor: bool = True
    banded: bool = False

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def is_operation(self) -> bool:
        return self.case.what == "operation"


def pick(size: str, full: Any, small: Any, toy: Any) -> Any:
    return {"full": full, "small": small, "toy": toy}[size]


def all_workloads(size: str = "full") -> list[Workload]:
    """Every workload, in the order of the table; names are unique."""
    parts = (attentions, sweep, recurrences, convnexts, rows, bands, discriminators, nets)
    return [workload for part in parts for workload in part(size)]


def select(workloads: Sequence[Workload], names: Sequence[str]) -> tuple[list[Workload], list[str]]:
    """Workloads that a name names (itself, or its start up to a hyphen), and the names that name none."""

    def means(name: str, workload: Workload) -> bool:
        return workload.name == name or workload.name.startswith(f"{name}-")

    unknown = [name for name in names if not any(means(name, w) for w in workloads)]
    return [w for w in workloads if any(means(name, w) for name in names)], unknown


def attentions(size: str) -> list[Workload]:
    """The operation on packed qkv, and the two blocks around it."""
    shapes = {  # B, T, H, D, window, registers
        "att-freq": pick(size, (1128, 64, 4, 32), (64, 64, 4, 32), (3, 8, 2, 8)),
        "att-time": pick(size, (256, 282, 4, 32), (16, 282, 4, 32), (2, 11, 2, 8)),
        "att-long": pick(size, (4, 8192, 8, 64, 128, 4), (1, 2048, 8, 32, 128, 4), (1, 40, 2, 8, 6, 2)),
        "att-huge": pick(size, (1, 65536, 8, 32, 256, 8), (1, 4096, 8, 32, 256, 8), (1, 50, 2, 8, 8, 3)),
    }
    found = [_attention(name, shape) for name, shape in shapes.items()]
    for name in ("att-freq", "att-time"):
        b, t, h, d = shapes[name]
        case = Case(
            f"{name}-block", "block", f"B {b}, T {t}, C {h * d}, H {h}", block("RoFormerBlock", h * d, h, t),
            normal((b, t, h * d)), counts.roformer(b, t, h * d),
        )  # fmt: skip
        found.append(Workload(case))
    return found


def _attention(name: str, shape: tuple[int, ...]) -> Workload:
    case = attention(name, *shape)
    details = dict(zip(("n_head", "window", "registers"), (shape[2], *(shape[4:] or (-1, 0))), strict=True))
    return Workload(case, {"flex": details}, banded=len(shape) > 4)


def sweep(size: str) -> list[Workload]:
    """Windowed attention at growing lengths: time and memory against T."""
    lengths = pick(size, (1024, 4096, 16384, 32768), (512, 1024, 2048, 4096, 8192), (20, 40))
    head = (2, 8, 6, 2) if size == "toy" else (8, 32, 64, 4)
    return [_attention(f"att-sweep-{length}", (1, length, *head)) for length in lengths]


def recurrences(size: str) -> list[Workload]:
    """The layers alone (rnn-freq, …), and the blocks around two of them."""
    freq = pick(size, (1128, 64, 128, 8, 2), (64, 64, 128, 8, 2), (2, 7, 16, 2, 2))
    along = pick(size, (256, 282, 128, 8, 2), (64, 282, 128, 8, 2), (2, 9, 16, 2, 2))
    wide = pick(size, (16, 1000, 512, 4, 1), (8, 100, 512, 4, 1), (2, 7, 32, 2, 1))
    found = []
    for name, kind, shape, both in (
        ("rnn-freq", "gru", freq, True),
        ("rnn-time", "gru", along, False),
        ("rnn-wide-gru", "gru", wide, False),
        ("rnn-wide-lstm", "lstm", wide, False),
    ):
        b, t, c, g, layers = shape
        text = f"B {b}, T {t}, C {c}, G {g}, {layers} layer{'s' * (layers > 1)}" + (", both directions" if both else "")
        gates, directions = {"gru": 3, "lstm": 4}[kind], 1 + both
        width = c // g
        flops = layers * counts.grouped_rnn(b * t, width, width // directions, g, gates, directions)
        details = {"channels": c, "layers": layers, "groups": g, "kind": kind, "both": both}
        rivals = {"block-diagonal": details} | ({"flashrnn": details} if layers == 1 else {})

        def layers_only(kit, shape=shape, kind=kind, both=both):
            return kit.RNNBlock(shape[2], shape[4], shape[3], kind, both).rnn

        found.append(Workload(Case(name, "layer", text, layers_only, normal((b, t, c)), flops), rivals))
        if layers > 1:
            whole = block("RNNBlock", c, layers, g, kind, both)
            flops = counts.rnn_block(b * t, c, layers, g, gates, directions)
            found.append(Workload(Case(f"{name}-block", "block", text, whole, normal((b, t, c)), flops)))
    return found


def convnexts(size: str) -> list[Workload]:
    """Blocks of stride 1 and, in the plane, of stride 2 both ways; and the depthwise half alone (…-conv)."""
    line = pick(size, (16, 512, 1000), (2, 512, 1000), (2, 8, 15))
    batch = pick(size, 4, 1, 1)
    planes = ((32, 282, 64), (64, 141, 32), (128, 71, 16), (256, 36, 8))
    planes = ((6, 9, 8), (8, 7, 5)) if size == "toy" else planes
    found = [*_convnext("cnx-1d", line[0], line[1], line[2:])]
    for channels, *sizes in planes:
        found += _convnext(f"cnx-2d-{channels}", batch, channels, tuple(sizes))
    return found


def _convnext(name: str, batch: int, channels: int, sizes: tuple[int, ...]) -> list[Workload]:
    spatial, taps = len(sizes), 7 ** len(sizes)
    rows = batch * int(torch.tensor(sizes).prod())
    down = tuple(-(-s // 2) for s in sizes)
    rows_down = batch * int(torch.tensor(down).prod())
    rivals = {"max-autotune": {}}

    def make(suffix, mode, stride, c_in, c_out, x, y, rows_in, rows_out):
        def draw(generator):
            return [*normal((batch, c_in, *x))(generator), tuple(y)]

        text = f"B {batch}, {c_in}→{c_out}, {'×'.join(map(str, x))}, k {'×'.join('7' * spatial)}, stride {stride}"
        build = block(f"ConvNeXt{spatial}DBlock", 7, stride, c_in, c_out, mode)
        flops = counts.convnext(rows_in, rows_out, taps, c_in, c_out, mode == "transposed")
        return Workload(Case(name + suffix, "block", text, build, draw, flops), rivals)

    conv = Case(
        f"{name}-conv", "operation", f"B {batch}, C {channels}, {'×'.join(map(str, sizes))}: conv and LayerNorm",
        operation("depthwise_conv_layer_norm", stride=(1,) * spatial),
        normal((batch, channels, *sizes), (channels, 1, *(7,) * spatial), (channels,), (channels,), (channels,)),
        2 * rows * channels * taps,
    )  # fmt: skip
    found = [make("", "normal", 1, channels, channels, sizes, sizes, rows, rows), Workload(conv, rivals)]
    if spatial == 2:
        found.append(make("-down", "normal", 2, channels, 2 * channels, sizes, down, rows, rows_down))
        found.append(make("-up", "transposed", 2, 2 * channels, channels, down, sizes, rows_down, rows))
    return found


def rows(size: str) -> list[Workload]:
    """What every block does a row at a time."""
    found = []
    for n, c in pick(size, ((72192, 128), (16384, 512)), ((16384, 128), (4096, 512)), ((37, 24),)):
        f = int(8 * c / 3)

        def mlp_inputs(generator, n=n, c=c, f=f):
            return [normal((n, c))(generator)[0], *normal((f, c), (f, c), (c, f), scale=0)(generator)]

        norm = Case(f"rows-norm-{c}", "operation", f"{n} × {c}", operation("rms_norm"), normal((n, c), (c,)))
        gate = Case(f"rows-swiglu-{c}", "operation", f"{n} × {f}", operation("swiglu"), normal((n, f), (n, f)))
        mlp = Case(
            f"rows-mlp-{c}", "operation", f"{n} × {c}", operation("swiglu_mlp"), mlp_inputs, counts.swiglu_mlp(n, c)
        )
        for case, kind in ((norm, "norm"), (gate, "swiglu"), (mlp, "mlp")):
            found.append(Workload(case, {"liger": {"kind": kind}}))
    return found


class Half(nn.Module):
    """A module of which one method is called."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.module, self.method)(x)


def bands(size: str) -> list[Workload]:
    """Spectrum to bands and back."""
    b, frames, n_fft, k, out = pick(size, (4, 282, 2048, 64, 128), (1, 282, 2048, 64, 128), (1, 5, 64, 6, 4))
    rate = 8000 if size == "toy" else SAMPLE_RATE
    spectrum, features = (b, n_fft // 2 + 1, frames, 2), (b, out, frames, k)
    found = []
    for method, shape in (("split", spectrum), ("unsplit", features)):

        def build(kit, method=method):
            return Half(kit.Band(rate, n_fft, k, 2, out), method)

        text = f"{spectrum}, K {k}, out {out}"
        found.append(Workload(Case(f"band-{method}", "layer", text, build, normal(shape))))
    return found


def discriminators(size: str) -> list[Workload]:
    """Each one and all four; a training step is the discriminator's losses and the generator's, with both backward."""
    shape = pick(size, (4, 1, 3 * SAMPLE_RATE), (1, 1, 16384), (1, 1, 1200))
    toy = size == "toy"
    windows = [256, 128] if toy else list(WINDOWS)
    makers = {
        "period": lambda kit: kit.MultiPeriodDiscriminator(**({"periods": [2, 3]} if toy else {})),
        "scale": lambda kit: kit.MultiScaleDiscriminator(sample_rate=SAMPLE_RATE),
        "resolution": lambda kit: kit.MultiResolutionDiscriminator(
            window_lengths=windows, hidden_channels=4 if toy else 32
        ),
        "frequency": lambda kit: kit.MultiFrequencyDiscriminator(
            nch=1, window_sizes=windows, hidden_channels=2 if toy else 8
        ),
    }
    cases = {name: lambda kit, make=make: steps.Critics([make(kit)]) for name, make in makers.items()}
    cases["all"] = lambda kit: steps.Critics([make(kit) for make in makers.values()])
    draw = normal(shape, shape, scale=0.1)
    return [
        Workload(
            Case(f"disc-{name}", "discriminator", f"{shape}, real and fake", build, draw, constant=(0,), step=gan_step),
            has_floor=False,
        )
        for name, build in cases.items()
    ]


def nets(size: str) -> list[Workload]:
    """Whole models: inference, and one training step with the multi-frequency discriminator and both optimizers."""
    from benchmarks import models

    toy = size == "toy"
    shapes = {
        "roformer": (models.MelRoFormer, pick(size, (128, 12, 4), (32, 2, 4), (8, 1, 2))),
        "rnn": (models.MelRNN, pick(size, (128, 9, 8), (64, 2, 8), (8, 1, 2))),
        "unet": (models.MelUNet, pick(size, (32, 4), (16, 3), (4, 2))),
    }
    shape = pick(size, (4, 3 * SAMPLE_RATE), (1, SAMPLE_RATE), (1, 2000))
    spectrum = {"sample_rate": 8000, "n_fft": 256, "hop_length": 64, "bands": 8} if toy else {}
    windows, width = ([256, 128], 2) if toy else (list(WINDOWS), 8)
    return [
        Workload(
            Case(
                f"model-{name}", "model", f"{shape}, {sizes}",
                _gan(partial(net, **spectrum), sizes, windows, width), normal(shape, shape, scale=0.1),
                constant=(0, 1), step=steps.train,
            ),
            has_floor=False,
        )
        for name, (net, sizes) in shapes.items()
    ]  # fmt: skip


def _gan(net: Callable, sizes: tuple[int, ...], windows: list[int], width: int) -> Callable[[ModuleType], nn.Module]:
    def build(kit):
        critic = kit.MultiFrequencyDiscriminator(nch=1, window_sizes=windows, hidden_channels=width)
        return steps.Gan(net(kit, *sizes), critic)

    return build
