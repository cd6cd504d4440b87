"""Models that `fastblocks.convert` takes, whole: the original is the baseline, its converted copy is fastblocks.

Measured where they are named: the packages are those of the extra `adapters`. MSRKit's models are the ones of
`benchmarks.original`.
"""

import random
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

import fastblocks
from benchmarks import original
from benchmarks.workloads import models
from benchmarks.workloads.workload import Workload, by, normal

BINS = 1025  # of both separators' STFT
BAND = 25  # bins of a band of BSRoformer
SIZES = {
    "full": {
        "separator": (4, 132300, {"dim": 256, "depth": 6, "heads": 8, "dim_head": 64}),
        "vocos": (16, 1000, {"dim": 512, "intermediate_dim": 1536, "num_layers": 8}),
        "x-transformers": (8, 2048, {"dim": 512, "depth": 6, "heads": 8}),
        "timm": (32, 224, {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}),
    },
    "cpu": {
        "separator": (1, 22050, {"dim": 64, "depth": 2, "heads": 4, "dim_head": 32}),
        "vocos": (2, 400, {"dim": 256, "intermediate_dim": 768, "num_layers": 4}),
        "x-transformers": (2, 300, {"dim": 128, "depth": 2, "heads": 4}),
        "timm": (1, 128, {"depths": (1, 1, 3, 1), "dims": (48, 96, 192, 384)}),
    },
    "toy": {
        "separator": (1, 4000, {"dim": 8, "depth": 1, "heads": 2, "dim_head": 8}),
        "vocos": (1, 20, {"dim": 8, "intermediate_dim": 16, "num_layers": 1}),
        "x-transformers": (1, 9, {"dim": 8, "depth": 1, "heads": 2}),
        "timm": (1, 32, {"depths": (1,) * 4, "dims": (8,) * 4}),
    },
}  # B, length, arguments of the model


class Separator(nn.Module):
    """A model of bs-roformer, (B, samples) -> (B, samples), whose window has the waveform's dtype.

    Args:
        model: BSRoformer or MelBandRoformer.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, waveform: Tensor) -> Tensor:
        self.model.stft_window_fn = partial(torch.hann_window, 2048, dtype=waveform.dtype)
        return self.model(waveform)


class Vocoder(nn.Module):
    """Vocos behind its mel spectrogram: (B, 100, frames) -> (B, samples).

    Args:
        dim, intermediate_dim, num_layers: of the backbone.
    """

    def __init__(self, dim: int, intermediate_dim: int, num_layers: int):
        super().__init__()
        backbone, head = import_module("vocos.models").VocosBackbone, import_module("vocos.heads").ISTFTHead
        self.backbone = backbone(100, dim, intermediate_dim, num_layers)
        self.head = head(dim, n_fft=1024, hop_length=256)

    def forward(self, mel: Tensor) -> Tensor:
        return self.head(self.backbone(mel))


def _separator(name: str, **arguments) -> Separator:
    random.seed(0)  # its hyper-connections take some initial weights from there
    return Separator(getattr(import_module("bs_roformer"), name)(**arguments))


def _encoder(**arguments) -> nn.Module:
    return import_module("x_transformers").Encoder(attn_dim_head=64, rotary_pos_emb=True, ff_glu=True, **arguments)


def _timm(**arguments) -> nn.Module:
    return import_module("timm.models.convnext").ConvNeXt(num_classes=10, **arguments)


def _either(make: Callable[[], nn.Module]) -> Callable[[ModuleType], nn.Module]:
    """kit -> the model, converted if it is this package that computes."""
    return lambda kit: fastblocks.convert(make()) if kit is fastblocks else make()


def workloads(size: str) -> list[Workload]:
    found = []

    def add(name: str, package: str, shape: str, make: Callable[[], nn.Module], *sizes: int, scale: float = 1.0):
        inputs = normal(sizes, scale=scale)
        found.append(Workload(f"from-{name}", "model", shape, _either(make), inputs, constant=(0,), package=package))

    for net, arguments in models.SIZES[size].items():
        clip, spectrum = models.CLIPS[size], models.TOY_SPECTRUM if size == "toy" else {}
        make = partial(models.NETS[net], original, *arguments, **spectrum)
        add(f"msrkit-{net}", "", f"{clip}, {arguments}", make, *clip, scale=0.1)

    batch, samples, arguments = SIZES[size]["separator"]
    common = {**arguments, "time_transformer_depth": 1, "freq_transformer_depth": 1, "flash_attn": True}
    shape = f"{(batch, samples)}, dim {arguments['dim']}, depth {arguments['depth']}"
    bands = {"freqs_per_bands": (BAND,) * (BINS // BAND)}
    make = partial(_separator, "BSRoformer", **common, **bands)
    add("bs-roformer", "bs_roformer", shape, make, batch, samples, scale=0.1)
    options = {"linear_transformer_depth": 0, "attn_dropout": 0.0, "ff_dropout": 0.0}
    make = partial(_separator, "MelBandRoformer", **common, **options)
    add("mel-band", "bs_roformer", shape, make, batch, samples, scale=0.1)

    batch, frames, arguments = SIZES[size]["vocos"]
    shape = f"{(batch, 100, frames)}, dim {arguments['dim']}, layers {arguments['num_layers']}"
    add("vocos", "vocos", shape, partial(Vocoder, **arguments), batch, 100, frames)

    batch, length, arguments = SIZES[size]["x-transformers"]
    shape = f"{(batch, length, arguments['dim'])}, depth {arguments['depth']}"
    make = partial(_encoder, **arguments)
    add("x-transformers", "x_transformers", shape, make, batch, length, arguments["dim"])

    batch, side, arguments = SIZES[size]["timm"]
    shape = f"B {batch}, {by((side, side))}, dims {by(arguments['dims'])}, depths {by(arguments['depths'])}"
    add("timm-convnext", "timm", shape, partial(_timm, **arguments), batch, 3, side, side)
    return found
