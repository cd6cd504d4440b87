"""What the operators launch, at the standard workloads and at odd shapes: the real launchers, run on meta tensors and
recorded."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import torch

import fastblocks
from benchmarks.providers.runner import tf32
from benchmarks.workloads import discriminators

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALL_DTYPES = DTYPES | {"fp16": torch.float16}
TF32 = " tf32"  # ends the labels of float32 shapes whose products may round to TF32
ATTENTION = {  # tokens, heads, head size, window, registers
    "att-freq": (64, 4, 32, -1, 0),
    "att-time": (282, 4, 32, -1, 0),
    "att-long": (8192, 8, 64, 128, 4),
    "att-huge": (65536, 8, 32, 256, 8),
    "full": (4096, 8, 64, -1, 0),
    "att-registers": (300, 2, 64, 64, 32),  # the most that sm_80 takes at this head size, q and k not rotated before
    "att-forty": (40, 4, 32, -1, 0),  # no power of two
}
RECURRENT = {  # G, I, H, N
    "rnn-freq": (8, 16, 8, 2),
    "rnn-time": (8, 16, 16, 1),
    "rnn-wide": (4, 128, 128, 1),
    "rnn-64": (4, 64, 64, 1),
    "rnn-packed": (8, 32, 4, 2),  # more inputs than a tile of all groups could have
}
CONVNEXT = {"cnx-1d": (16, 512, 1000)} | {  # B, C, sizes
    f"cnx-2d C {channels}": (4, channels, height, width)
    for channels, height, width in ((32, 282, 64), (64, 141, 32), (128, 71, 16), (256, 36, 8))
}
BLOCKS = {  # B, T, C, heads, registers
    "att-freq": (1128, 64, 128, 4, 0),
    "C 64": (1128, 64, 64, 2, 0),
    "C 24": (16, 70, 24, 2, 3),
    "C 96": (16, 70, 96, 3, 3),
    "C 512": (4, 282, 512, 8, 4),
}
BANDS = {
    "band": (4, 282, 2048, 64, 128),
    "band O 32": (4, 282, 2048, 64, 32),
}  # B, frames, n_fft, K, channels of a band
MAPS = {  # B, C, sizes, channels last in memory: of discriminators, on three seconds and on segments
    "disc-activation": (4, 512, (2667, 2), False),
    "disc-activation last": (4, 512, (2667, 2), True),
    "period, 3 to a row": (4, 1024, (593, 3), False),
    "period, segments": (16, 1024, (10, 11), False),
    "scale": (4, 64, (9000,), False),
    "resolution": (4, 32, (282, 102), False),
    "frequency": (4, 8, (282, 1025), False),
}
ROWS = {"128": (72192, 128), "512": (16384, 512), "odd": (1000, 341)}  # N, C

Arguments = tuple


def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


# ---- arguments of each operator


def _attention(
    dtype, batch: int, tokens: int, heads: int, head_dim: int, window: int | tuple[int, int], registers: int, out: bool,
    gated=False,
):  # fmt: skip
    width = 3 * heads * head_dim
    qkv, rope = empty(batch, tokens, width, dtype=dtype), empty(registers + tokens, head_dim // 2, 2)
    register_qkv = empty(1, registers, width, dtype=dtype) if registers else None
    return qkv, rope, heads, window, register_qkv, out, empty(batch, tokens, heads, dtype=dtype) if gated else None


def _recurrent(dtype, batch: int, length: int, shape: tuple, lstm: bool, given: bool, biased=False, keep_gates=None):
    groups, inputs, hidden, directions = shape
    rows = directions, groups, (4 if lstm else 3) * hidden
    biases = [empty(*rows, dtype=dtype) if biased else None for _ in range(2)]
    state = empty(directions, batch, groups * hidden, dtype=dtype) if given else None
    x, weights = empty(batch, length, groups * inputs, dtype=dtype), [empty(*rows, n, dtype=dtype) for n in shape[1:3]]
    return x, *weights, *biases, state, state if lstm else None, dtype, keep_gates


def _depthwise(
    dtype, batch: int, channels: int, sizes: list, kernel: list, stride: list, transposed: bool, biased=True
):
    out = [size * step if transposed else -(-size // step) for size, step in zip(sizes, stride, strict=True)]
    x, weight, vector = empty(batch, channels, *sizes, dtype=dtype), empty(channels, 1, *kernel), empty(channels)
    return x, weight, vector if biased else None, vector, vector, stride, transposed, out, 1e-6, dtype


def _mlp(dtype, batch: int, channels: int, hidden: int, c_out: int, sizes: list, added: bool):
    first, second = (empty(hidden, channels), empty(hidden)), (empty(c_out, hidden), empty(c_out))
    residual = empty(batch, c_out, *sizes) if added else None
    return empty(batch, *sizes, channels, dtype=dtype), *first, *second, residual, dtype


def _swiglu_mlp(dtype, n: int, channels: int, hidden: int, c_out: int):
    sizes = (n, channels), (hidden, channels), (hidden, channels), (c_out, hidden)
    return *(empty(*size, dtype=dtype) for size in sizes), dtype


# ---- the standard workloads


def attention() -> Iterator[tuple[str, Arguments]]:
    for name, (*sizes, window, registers) in ATTENTION.items():
        for element, dtype in DTYPES.items():
            for out in {False, registers > 0}:
                label = f"{name} {element}{' registers out' if out else ''}"
                yield label, _attention(dtype, 1, *sizes, window, registers, out)
    for name, (element, dtype) in product(("att-freq", "att-time", "full"), DTYPES.items()):  # as BS-RoFormer has them
        yield f"{name} gates {element}", _attention(dtype, 1, *ATTENTION[name], False, True)
    for element, dtype in ALL_DTYPES.items():
        yield f"att-registers gates {element}", _attention(dtype, 1, *ATTENTION["att-registers"], True, True)


def recurrent() -> Iterator[tuple[str, Arguments]]:
    for (name, shape), lstm in product(RECURRENT.items(), (False, True)):
        for (element, dtype), given in product(DTYPES.items(), (False, True)):
            label = f"{name} {'LSTM' if lstm else 'GRU'} {element}{' with a state' if given else ''}"
            yield label, _recurrent(dtype, 4, 64, shape, lstm, given)


def depthwise_conv_layer_norm() -> Iterator[tuple[str, Arguments]]:
    for (element, dtype), (name, (batch, channels, *sizes)) in product(DTYPES.items(), CONVNEXT.items()):
        for step, transposed in product((1,) if len(sizes) == 1 else (1, 2), (False, True)):
            kernel, stride = [7] * len(sizes), [step] * len(sizes)
            label = f"{name} stride {step}{' transposed' if transposed else ''} {element}"
            yield label, _depthwise(dtype, batch, channels, sizes, kernel, stride, transposed)


def convnext_mlp() -> Iterator[tuple[str, Arguments]]:
    for (element, dtype), (name, (batch, channels, *sizes)) in product(DTYPES.items(), CONVNEXT.items()):
        yield f"{name} {element}", _mlp(dtype, batch, channels, 4 * channels, channels, sizes, True)


def _spectral_norm(dtype, weights: list[tuple[int, ...]], iterations: int) -> Arguments:
    vectors = [
        [empty(n, dtype=dtype) for n in sizes] for sizes in zip(*((s[0], prod(s[1:])) for s in weights), strict=True)
    ]
    return [empty(*s, dtype=dtype) for s in weights], *vectors, iterations, 1e-12


def _weight_norm(dtype, weights: list[tuple[int, ...]]) -> Arguments:
    return [empty(*s, dtype=dtype) for s in weights], [empty(s[0], *[1] * (len(s) - 1), dtype=dtype) for s in weights]


def rms_norm() -> Iterator[tuple[str, Arguments]]:
    for (name, (n, c)), (element, dtype) in product((ROWS | {"16384": (512, 16384)}).items(), DTYPES.items()):
        yield f"rows-norm-{name} {element}", (empty(n, c, dtype=dtype), empty(c), 1e-6)


def swiglu() -> Iterator[tuple[str, Arguments]]:
    for (name, (n, c)), (element, dtype) in product(ROWS.items(), DTYPES.items()):
        f = int(8 * c / 3)
        yield f"rows-swiglu-{name} {element}", (empty(n, f, dtype=dtype), empty(n, f, dtype=dtype))


def swiglu_mlp() -> Iterator[tuple[str, Arguments]]:
    for (name, (n, c)), (element, dtype) in product(ROWS.items(), DTYPES.items()):
        yield f"rows-mlp-{name} {element}", _swiglu_mlp(dtype, n, c, int(8 * c / 3), c)


def band_split() -> Iterator[tuple[str, Arguments]]:
    yield from _bands(_split)


def band_unsplit() -> Iterator[tuple[str, Arguments]]:
    yield from _bands(_unsplit)


def _bands(make: Callable) -> Iterator[tuple[str, Arguments]]:
    """Mel bands of a view of a complex STFT; under autocast everything outside of the products is float32."""
    from fastblocks.spectral_ops import covered_bins, mel_filterbank

    for name, (batch, frames, n_fft, count, features) in BANDS.items():
        ranges = covered_bins(mel_filterbank(48000, n_fft, count))
        for label, stored, dtype in (
            ("autocast", torch.float32, torch.bfloat16), ("bf16", torch.bfloat16, torch.bfloat16),
            ("fp32", torch.float32, torch.float32),
        ):  # fmt: skip
            yield f"{name} {label}", make(batch, n_fft // 2 + 1, frames, 2, features, ranges, stored, dtype, True)


def _split(
    batch: int, bins: int, frames: int, channels: int, features: int, ranges: list, stored, dtype, adjacent: bool
) -> Arguments:
    lanes = channels * max(1, *(end - start for start, end in ranges))
    x = empty(batch, frames, bins, channels, dtype=stored).transpose(1, 2)
    x = x if adjacent else torch.empty_like(x, memory_format=torch.contiguous_format)
    weight, bias = empty(len(ranges), lanes, features, dtype=stored), empty(len(ranges), features, dtype=stored)
    return x, weight, bias, [n for pair in ranges for n in pair], dtype


def _unsplit(
    batch: int, bins: int, frames: int, channels: int, features: int, ranges: list, stored, dtype, adjacent: bool
) -> Arguments:
    lanes = channels * max(1, *(end - start for start, end in ranges))
    x = empty(batch, frames, len(ranges), features, dtype=stored).permute(0, 3, 1, 2)
    weight, bias = empty(len(ranges), features, lanes, dtype=stored), empty(len(ranges), lanes, dtype=stored)
    window = empty(bins, dtype=stored)
    return x, weight, bias, window, [n for pair in ranges for n in pair], channels, dtype


def roformer_block() -> Iterator[tuple[str, Arguments]]:
    for name, (batch, tokens, channels, heads, registers) in BLOCKS.items():
        for label, stream, dtype in (
            ("autocast", torch.float32, torch.bfloat16), ("bf16", torch.bfloat16, torch.bfloat16),
            ("fp32", torch.float32, torch.float32),
        ):  # fmt: skip
            tensors = _of_roformer_block(batch, tokens, channels, stream, torch.float32)
            rope = empty(registers + tokens, channels // heads // 2, 2)
            memory = empty(1, registers, channels, dtype=stream) if registers else None
            yield f"block {name} {label}", (*tensors, rope, heads, -1, memory, registers > 0, 1e-6, 1e-6, dtype)


def rnn_block() -> Iterator[tuple[str, Arguments]]:
    for channels, groups in ((128, 8), (64, 8)):
        for label, stream, dtype in (
            ("autocast", torch.float32, torch.bfloat16), ("bf16", torch.bfloat16, torch.bfloat16),
        ):  # fmt: skip
            arguments = _of_rnn_block(256, 282, channels, groups, stream)
            yield f"block rnn-time C {channels} {label}", (*arguments, 1e-6, 1e-6, dtype)


def _of_rnn_block(batch: int, length: int, channels: int, groups: int, stream: torch.dtype) -> Arguments:
    hidden, units = int(8 * channels / 3), channels // groups
    sizes = [(2, 1, groups, 3 * units, units)] * 2 + [(hidden, channels)] * 2 + [(channels, hidden)]
    weights = (empty(*size) for size in (*sizes, (channels,), (channels,)))
    return empty(batch, length, channels, dtype=stream), *weights


def _of_roformer_block(batch: int, tokens: int, channels: int, stream: torch.dtype, dtype: torch.dtype) -> Arguments:
    hidden = int(8 * channels / 3)
    sizes = [(3 * channels, channels), (channels, channels), (hidden, channels), (hidden, channels)]
    weights = (empty(*size, dtype=dtype) for size in (*sizes, (channels, hidden), (channels,), (channels,)))
    return empty(batch, tokens, channels, dtype=stream), *weights


def bias_leaky_relu() -> Iterator[tuple[str, Arguments]]:
    for (name, (batch, channels, sizes, last)), (element, dtype) in product(MAPS.items(), DTYPES.items()):
        yield f"{name} {element}", _bias_leaky_relu(dtype, batch, channels, sizes, last)


def _bias_leaky_relu(dtype, batch: int, channels: int, sizes: tuple[int, ...], last: bool) -> Arguments:
    x = (
        empty(batch, *sizes, channels, dtype=dtype).movedim(-1, 1)
        if last
        else empty(batch, channels, *sizes, dtype=dtype)
    )
    return x, empty(channels), 0.2


# operators whose kernels make float32 products
PRODUCTS = ("rope_attention", "grouped_rnn", "roformer_block", "band_split", "band_unsplit")


def weights_of_discriminators() -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the normed weights of each discriminator."""
    found = {}
    for workload in discriminators.workloads("full"):
        if workload.is_operation:
            continue
        with torch.device("meta"):
            convs = workload.build(fastblocks).modules()
        found[workload.name] = [tuple(conv.weight_orig.shape) for conv in convs if hasattr(conv, "weight_orig")]
    return found


def spectral_norm() -> Iterator[tuple[str, Arguments]]:
    for (name, weights), (element, dtype) in product(weights_of_discriminators().items(), DTYPES.items()):
        for iterations in (1, 0):
            yield f"{name} {'' if iterations else 'evaluation '}{element}", _spectral_norm(dtype, weights, iterations)


def weight_norm() -> Iterator[tuple[str, Arguments]]:
    for (name, weights), (element, dtype) in product(weights_of_discriminators().items(), DTYPES.items()):
        yield f"{name} {element}", _weight_norm(dtype, weights)


PERIODS = (2, 3, 5, 7, 11)


def feature_matching() -> Iterator[tuple[str, Arguments]]:
    """The maps of MultiPeriod's discriminators on three seconds, and one whose addresses are odd."""
    maps = []
    for period in PERIODS:
        rows = -(-3 * 48000 // period)
        for channels, stride in ((32, 3), (128, 3), (512, 3), (1024, 3), (1024, 3)):
            rows = -(-rows // stride)
            maps.append((4, channels, rows, period))
    for element, dtype in DTYPES.items():
        for name, sizes in (("disc-period", maps), ("odd", [(3, 5, 7)])):
            yield f"{name} {element}", tuple([empty(*size, dtype=dtype) for size in sizes] for _ in range(2))


@dataclass(frozen=True)
class Shape:
    """Arguments of an operator, on the device "meta"."""

    operator: str
    label: str
    arguments: Arguments

    @property
    def tf32(self) -> bool:
        return self.label.endswith(TF32)


def standard_shapes() -> Iterator[Shape]:
    """The standard workloads, operator by operator."""
    for operator, (workloads, _) in OPERATORS.items():
        for label, arguments in workloads():
            yield Shape(operator, label, arguments)
            if operator in PRODUCTS and arguments[0].dtype == torch.float32:
                yield Shape(operator, label + TF32, arguments)


# ---- odd shapes


def odd_weights(draw: random.Random) -> list[tuple[int, ...]]:
    return [
        (draw.randint(1, draw.choice((4, 64, 1024))), draw.randint(1, draw.choice((4, 300))), draw.randint(1, 9))
        for _ in range(draw.randint(1, draw.choice((3, 80))))
    ]


def odd_spectral_norm(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    weights, iterations = odd_weights(draw), draw.randint(0, 1)
    return f"{len(weights)} weights iterations {iterations}", _spectral_norm(dtype, weights, iterations)


def odd_weight_norm(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    weights = odd_weights(draw)
    return f"{len(weights)} weights", _weight_norm(dtype, weights)


def odd_bias_leaky_relu(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    batch, channels = draw.randint(1, 4), draw.randint(1, draw.choice((4, 64, 1024)))
    sizes = tuple(draw.randint(1, draw.choice((3, 40, 1000))) for _ in range(draw.randint(0, 2)))
    last = draw.random() < 0.3
    return f"{batch} × {channels} × {sizes}{' last' * last}", _bias_leaky_relu(dtype, batch, channels, sizes, last)


def odd_feature_matching(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    sizes = [(draw.randint(1, 4), draw.randint(1, 99), draw.randint(1, 999)) for _ in range(draw.randint(1, 300))]
    return f"{len(sizes)} maps", tuple([empty(*size, dtype=dtype) for size in sizes] for _ in range(2))


def odd_attention(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    heads, head_dim = draw.randint(1, 8), 2 * draw.randint(4, draw.choice((16, 32, 128)))
    tokens = draw.choice((draw.randint(1, 128), draw.randint(129, 3000)))
    window = draw.choice((-1, draw.randint(1, 300), (-1, 0), (draw.randint(0, 300), draw.randint(0, 20))))
    registers = draw.choice((0, draw.randint(1, 16), draw.randint(1, 64)))
    out, gated = registers > 0 and draw.random() < 0.5, draw.random() < 0.3
    label = f"T {tokens} heads {heads} × {head_dim} window {window} registers {registers}{' out' * out}"
    return label + " gates" * gated, _attention(dtype, 2, tokens, heads, head_dim, window, registers, out, gated)


def odd_recurrent(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    groups, directions = draw.randint(1, 16), draw.randint(1, 2)
    inputs, hidden = (draw.randint(1, draw.choice((16, 32, 128))) for _ in range(2))
    lstm, biased, given, keep_gates = (draw.choice((False, True)) for _ in range(4))
    label = f"{'LSTM' if lstm else 'GRU'} groups {groups} of {inputs} -> {hidden} directions {directions}"
    label += f"{' biases' * biased}{' state' * given}{' gates kept' * keep_gates}"
    shape = groups, inputs, hidden, directions
    return label, _recurrent(dtype, 3, 20, shape, lstm, given, biased, keep_gates or None)


def odd_depthwise(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    dims, channels = draw.randint(1, 2), draw.randint(1, draw.choice((64, 256, 2048)))
    sizes, half, stride = ([draw.randint(low, most) for _ in range(dims)] for low, most in ((1, 300), (0, 10), (1, 4)))
    kernel, transposed, biased = [2 * n + 1 for n in half], draw.random() < 0.5, draw.random() < 0.5
    label = f"C {channels} sizes {sizes} kernel {kernel} stride {stride}{' transposed' * transposed}{' bias' * biased}"
    return label, _depthwise(dtype, 2, channels, sizes, kernel, stride, transposed, biased)


def odd_mlp(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    channels, hidden, c_out = (draw.randint(1, draw.choice((32, 128, 600))) for _ in range(3))
    sizes = [draw.randint(1, 100) for _ in range(draw.randint(1, 2))]
    added = draw.random() < 0.5
    label = f"{channels} -> {hidden} -> {c_out} sizes {sizes}{' residual' * added}"
    return label, _mlp(dtype, 2, channels, hidden, c_out, sizes, added)


def odd_rms_norm(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    channels, scale = draw.randint(1, draw.choice((64, 1024, 16384))), draw.choice((dtype, torch.float32))
    x, scale = empty(draw.randint(1, 5000), channels, dtype=dtype), empty(channels, dtype=scale)
    return f"{tuple(x.shape)} scale {str(scale.dtype).removeprefix('torch.')}", (x, scale, 1e-6)


def odd_swiglu(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    rows, columns = draw.randint(1, 5000), draw.randint(1, draw.choice((64, 1024, 5000)))
    if draw.random() < 0.5:  # halves of one tensor
        both = empty(rows, 2 * columns, dtype=dtype)
        return f"{rows} × {columns} halves", (both[:, :columns], both[:, columns:])
    return f"{rows} × {columns}", (empty(rows, columns, dtype=dtype), empty(rows, columns, dtype=dtype))


def odd_swiglu_mlp(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    channels, hidden, c_out = (draw.randint(1, draw.choice((32, 128, 600))) for _ in range(3))
    return f"{channels} -> {hidden} -> {c_out}", _swiglu_mlp(dtype, draw.randint(1, 5000), channels, hidden, c_out)


def odd_roformer_block(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    heads, head_dim = draw.randint(1, 4), 2 * draw.randint(4, draw.choice((16, 64)))
    channels, tokens, registers = heads * head_dim, draw.randint(1, 400), draw.choice((0, draw.randint(1, 16)))
    stream = draw.choice((dtype, torch.float32))
    tensors = _of_roformer_block(draw.randint(1, 4), tokens, channels, stream, torch.float32)
    rope, memory = empty(registers + tokens, head_dim // 2, 2), None
    if registers:
        memory = empty(1, registers, channels, dtype=stream)
    window, out = draw.choice((-1, draw.randint(1, 300))), registers > 0 and draw.random() < 0.5
    label = f"block T {tokens} heads {heads} × {head_dim} window {window} registers {registers}{' out' * out}"
    return label, (*tensors, rope, heads, window, memory, out, 1e-6, 1e-6, dtype)


def odd_rnn_block(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    groups = draw.randint(1, 8)
    channels = groups * draw.randint(1, draw.choice((8, 32)))
    stream = draw.choice((dtype, torch.float32))
    arguments = _of_rnn_block(draw.randint(1, 20), draw.randint(1, 400), channels, groups, stream)
    return f"block C {channels} groups {groups}", (*arguments, 1e-6, 1e-6, dtype)


def odd_band_split(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    return _odd_bands(draw, dtype, _split)


def odd_band_unsplit(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    return _odd_bands(draw, dtype, _unsplit)


def _odd_bands(draw: random.Random, dtype: torch.dtype, make: Callable) -> tuple[str, Arguments]:
    bins, count, channels = draw.randint(1, 1100), draw.randint(1, 40), draw.randint(1, 4)
    ranges = []
    for _ in range(count):  # in no order, some without a bin, some with hundreds
        start = draw.randint(0, bins)
        ranges.append((start, min(bins, start + draw.choice((0, 1, draw.randint(1, 400))))))
    frames, features = draw.randint(1, 300), draw.randint(1, draw.choice((32, 128, 300)))
    stored, adjacent = draw.choice((dtype, torch.float32)), draw.random() < 0.5
    label = f"{count} bands of {bins} × {channels} -> {features} frames {frames}{'' if adjacent else ' apart'}"
    return label, make(2, bins, frames, channels, features, ranges, stored, dtype, adjacent)


OPERATORS: dict[str, tuple[Callable, Callable]] = {  # what yields its standard workloads, what draws one at random
    "rope_attention": (attention, odd_attention),
    "grouped_rnn": (recurrent, odd_recurrent),
    "depthwise_conv_layer_norm": (depthwise_conv_layer_norm, odd_depthwise),
    "convnext_mlp": (convnext_mlp, odd_mlp),
    "rms_norm": (rms_norm, odd_rms_norm),
    "swiglu": (swiglu, odd_swiglu),
    "swiglu_mlp": (swiglu_mlp, odd_swiglu_mlp),
    "roformer_block": (roformer_block, odd_roformer_block),
    "rnn_block": (rnn_block, odd_rnn_block),
    "spectral_norm": (spectral_norm, odd_spectral_norm),
    "weight_norm": (weight_norm, odd_weight_norm),
    "bias_leaky_relu": (bias_leaky_relu, odd_bias_leaky_relu),
    "feature_matching": (feature_matching, odd_feature_matching),
    "band_split": (band_split, odd_band_split),
    "band_unsplit": (band_unsplit, odd_band_unsplit),
}


def random_shapes(count: int, seed: int) -> list[Shape]:
    """`count` shapes, of the operators in turn, operator by operator; the same ones for the same seed."""
    draw, names = random.Random(seed), list(OPERATORS)
    shapes = []
    for i in range(count):
        operator, element = names[i % len(names)], draw.choice(list(ALL_DTYPES))
        label, arguments = OPERATORS[operator][1](draw, ALL_DTYPES[element])
        tf32 = element == "fp32" and operator in PRODUCTS and draw.random() < 0.5
        shapes.append(Shape(operator, f"{label} {element}{TF32 if tf32 else ''}", arguments))
    return sorted(shapes, key=lambda shape: names.index(shape.operator))


# ---- what they launch ------------------------------------------------------------------------------------------------


def cases_of(shapes: Iterable[Shape], architecture: str) -> Iterator:
    """Every launch at these shapes, as a `launch.CompileCase`; none where the kernels step aside."""
    from fastblocks.kernels.launch import recording
    from fastblocks.kernels.losses import feature_matching
    from fastblocks.kernels.norms import spectral_norm, weight_norm
    from fastblocks.kernels.operator import all_operators

    operators, of_lists = all_operators(), (spectral_norm, weight_norm, feature_matching)
    of_lists = {module.__name__.rpartition(".")[2]: module for module in of_lists}
    for shape in shapes:
        if not _is_taken(shape, architecture):
            continue
        with recording(architecture, shape.label) as cases, tf32(shape.tf32):
            (operators | of_lists)[shape.operator].rehearse(*shape.arguments)
        yield from cases


def _is_taken(shape: Shape, architecture: str) -> bool:
    """Whether the kernels take a shape on an architecture."""
    from fastblocks.kernels import runtime
    from fastblocks.kernels.attention import operator as attention
    from fastblocks.kernels.recurrent.config import largest_hidden

    arguments = shape.arguments
    if shape.operator == "grouped_rnn":
        return arguments[2].shape[3] <= largest_hidden(architecture, arguments[0].dtype == torch.float32)
    if shape.operator == "rope_attention":
        with runtime.pretending(architecture):
            return not attention.unsupported_reason(*arguments)
    return True
