"""What the operators launch, at the standard workloads and at odd shapes: the real launchers, run on meta tensors and
recorded."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALL_DTYPES = DTYPES | {"fp16": torch.float16}
TF32 = " tf32"  # ends the labels of float32 shapes whose products may round to TF32
ATTENTION = {  # tokens, heads, head size, window, registers
    "att-freq": (64, 4, 32, -1, 0),
    "att-time": (282, 4, 32, -1, 0),
    "att-long": (8192, 8, 64, 128, 4),
    "att-huge": (65536, 8, 32, 256, 8),
    "full": (4096, 8, 64, -1, 0),
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
ROWS = {"128": (72192, 128), "512": (16384, 512), "odd": (1000, 341)}  # N, C

Arguments = tuple


def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def attention() -> Iterator[tuple[str, Arguments]]:
    for name, (tokens, heads, head_dim, window, registers) in ATTENTION.items():
        for element, dtype in DTYPES.items():
            for registers_out in {False, registers > 0}:
                qkv = empty(1, tokens, 3 * heads * head_dim, dtype=dtype)
                register_qkv = empty(1, registers, 3 * heads * head_dim, dtype=dtype) if registers else None
                rope = empty(registers + tokens, head_dim // 2, 2)
                label = f"{name} {element}{' registers out' if registers_out else ''}"
                yield label, (qkv, rope, heads, window, register_qkv, registers_out)


def recurrent() -> Iterator[tuple[str, Arguments]]:
    for name, (groups, inputs, hidden, directions) in RECURRENT.items():
        for kind, gates in (("GRU", 3), ("LSTM", 4)):
            for element, dtype in DTYPES.items():
                for given in (False, True):
                    x = empty(4, 64, groups * inputs, dtype=dtype)
                    weights = (empty(directions, groups, gates * hidden, n, dtype=dtype) for n in (inputs, hidden))
                    state = empty(directions, 4, groups * hidden, dtype=dtype) if given else None
                    states = (state, state if kind == "LSTM" else None)
                    label = f"{name} {kind} {element}{' with a state' if given else ''}"
                    yield label, (x, *weights, None, None, *states, dtype, None)


def depthwise_conv_layer_norm() -> Iterator[tuple[str, Arguments]]:
    for element, dtype in DTYPES.items():
        for name, (batch, channels, *sizes) in CONVNEXT.items():
            for step in (1,) if len(sizes) == 1 else (1, 2):
                for transposed in (False, True):
                    vector = empty(channels)
                    weight, stride = empty(channels, 1, *[7] * len(sizes)), [step] * len(sizes)
                    out = [size * step if transposed else -(-size // step) for size in sizes]
                    x = empty(batch, channels, *sizes, dtype=dtype)
                    label = f"{name} stride {step}{' transposed' if transposed else ''} {element}"
                    yield label, (x, weight, vector, vector, vector, stride, transposed, out, 1e-6, dtype)


def convnext_mlp() -> Iterator[tuple[str, Arguments]]:
    for element, dtype in DTYPES.items():
        for name, (batch, channels, *sizes) in CONVNEXT.items():
            x, residual = empty(batch, *sizes, channels, dtype=dtype), empty(batch, channels, *sizes)
            first = empty(4 * channels, channels), empty(4 * channels)
            yield f"{name} {element}", (x, *first, empty(channels, 4 * channels), empty(channels), residual, dtype)


def rms_norm() -> Iterator[tuple[str, Arguments]]:
    for name, (n, c) in (ROWS | {"16384": (512, 16384)}).items():
        for element, dtype in DTYPES.items():
            yield f"rows-norm-{name} {element}", (empty(n, c, dtype=dtype), empty(c), 1e-6)


def swiglu() -> Iterator[tuple[str, Arguments]]:
    for name, (n, c) in ROWS.items():
        f = int(8 * c / 3)
        for element, dtype in DTYPES.items():
            yield f"rows-swiglu-{name} {element}", (empty(n, f, dtype=dtype), empty(n, f, dtype=dtype))


def swiglu_mlp() -> Iterator[tuple[str, Arguments]]:
    for name, (n, c) in ROWS.items():
        f = int(8 * c / 3)
        for element, dtype in DTYPES.items():
            tensors = (empty(*size, dtype=dtype) for size in ((n, c), (f, c), (f, c), (c, f)))
            yield f"rows-mlp-{name} {element}", (*tensors, dtype)


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


WORKLOADS: dict[str, Callable[[], Iterator[tuple[str, Arguments]]]] = {  # by operator
    "rope_attention": attention,
    "grouped_rnn": recurrent,
    "depthwise_conv_layer_norm": depthwise_conv_layer_norm,
    "convnext_mlp": convnext_mlp,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "swiglu_mlp": swiglu_mlp,
    "roformer_block": roformer_block,
    "rnn_block": rnn_block,
}
PRODUCTS = ("rope_attention", "grouped_rnn", "roformer_block")  # operators whose kernels make float32 products


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
    for operator, workloads in WORKLOADS.items():
        for label, arguments in workloads():
            yield Shape(operator, label, arguments)
            if operator in PRODUCTS and arguments[0].dtype == torch.float32:
                yield Shape(operator, label + TF32, arguments)


# ---- odd shapes ------------------------------------------------------------------------------------------------------


def _attention(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    heads, head_dim = draw.randint(1, 8), 2 * draw.randint(4, draw.choice((16, 32, 128)))
    tokens, window = (
        draw.choice((draw.randint(1, 128), draw.randint(129, 3000))),
        draw.choice((-1, draw.randint(1, 300))),
    )
    registers = draw.choice((0, draw.randint(1, 16), draw.randint(1, 64)))
    registers_out = registers > 0 and draw.random() < 0.5
    width = 3 * heads * head_dim
    qkv, rope = empty(2, tokens, width, dtype=dtype), empty(registers + tokens, head_dim // 2, 2)
    register_qkv = empty(1, registers, width, dtype=dtype) if registers else None
    label = f"T {tokens} heads {heads} × {head_dim} window {window} registers {registers}{' out' * registers_out}"
    return label, (qkv, rope, heads, window, register_qkv, registers_out)


def _recurrent(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    groups, directions = draw.randint(1, 16), draw.randint(1, 2)
    inputs, hidden = (draw.randint(1, draw.choice((16, 32, 128))) for _ in range(2))
    lstm, biased, given, keep_gates = (draw.choice((False, True)) for _ in range(4))
    gates = 4 if lstm else 3
    x = empty(3, 20, groups * inputs, dtype=dtype)
    weights = [empty(directions, groups, gates * hidden, n, dtype=dtype) for n in (inputs, hidden)]
    biases = [empty(directions, groups, gates * hidden, dtype=dtype) if biased else None for _ in range(2)]
    state = empty(directions, 3, groups * hidden, dtype=dtype) if given else None
    label = f"{'LSTM' if lstm else 'GRU'} groups {groups} of {inputs} -> {hidden} directions {directions}"
    label += f"{' biases' * biased}{' state' * given}{' gates kept' * keep_gates}"
    return label, (x, *weights, *biases, state, state if lstm else None, dtype, keep_gates or None)


def _depthwise(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    dims, channels = draw.randint(1, 2), draw.randint(1, draw.choice((64, 256, 2048)))
    sizes, half, stride = ([draw.randint(low, most) for _ in range(dims)] for low, most in ((1, 300), (0, 10), (1, 4)))
    kernel, transposed, biased = [2 * n + 1 for n in half], draw.random() < 0.5, draw.random() < 0.5
    out = [size * step if transposed else -(-size // step) for size, step in zip(sizes, stride, strict=True)]
    weight, vector = empty(channels, 1, *kernel), empty(channels)
    x = empty(2, channels, *sizes, dtype=dtype)
    label = f"C {channels} sizes {sizes} kernel {kernel} stride {stride}{' transposed' * transposed}"
    label += " bias" * biased
    return label, (x, weight, vector if biased else None, vector, vector, stride, transposed, out, 1e-6, dtype)


def _mlp(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    channels, hidden, c_out = (draw.randint(1, draw.choice((32, 128, 600))) for _ in range(3))
    sizes = [draw.randint(1, 100) for _ in range(draw.randint(1, 2))]
    first, second = (empty(hidden, channels), empty(hidden)), (empty(c_out, hidden), empty(c_out))
    residual = empty(2, c_out, *sizes) if draw.random() < 0.5 else None
    label = f"{channels} -> {hidden} -> {c_out} sizes {sizes}{'' if residual is None else ' residual'}"
    return label, (empty(2, *sizes, channels, dtype=dtype), *first, *second, residual, dtype)


def _rms_norm(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    channels, scale = draw.randint(1, draw.choice((64, 1024, 16384))), draw.choice((dtype, torch.float32))
    x, scale = empty(draw.randint(1, 5000), channels, dtype=dtype), empty(channels, dtype=scale)
    return f"{tuple(x.shape)} scale {str(scale.dtype).removeprefix('torch.')}", (x, scale, 1e-6)


def _swiglu(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    rows, columns = draw.randint(1, 5000), draw.randint(1, draw.choice((64, 1024, 5000)))
    if draw.random() < 0.5:  # halves of one tensor
        both = empty(rows, 2 * columns, dtype=dtype)
        return f"{rows} × {columns} halves", (both[:, :columns], both[:, columns:])
    return f"{rows} × {columns}", (empty(rows, columns, dtype=dtype), empty(rows, columns, dtype=dtype))


def _swiglu_mlp(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    channels, hidden, c_out = (draw.randint(1, draw.choice((32, 128, 600))) for _ in range(3))
    tensors = [(draw.randint(1, 5000), channels), (hidden, channels), (hidden, channels), (c_out, hidden)]
    return f"{channels} -> {hidden} -> {c_out}", (*(empty(*size, dtype=dtype) for size in tensors), dtype)


def _roformer_block(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
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


def _rnn_block(draw: random.Random, dtype: torch.dtype) -> tuple[str, Arguments]:
    groups = draw.randint(1, 8)
    channels = groups * draw.randint(1, draw.choice((8, 32)))
    stream = draw.choice((dtype, torch.float32))
    arguments = _of_rnn_block(draw.randint(1, 20), draw.randint(1, 400), channels, groups, stream)
    return f"block C {channels} groups {groups}", (*arguments, 1e-6, 1e-6, dtype)


RANDOM = {
    "rope_attention": _attention,
    "grouped_rnn": _recurrent,
    "depthwise_conv_layer_norm": _depthwise,
    "convnext_mlp": _mlp,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "swiglu_mlp": _swiglu_mlp,
    "roformer_block": _roformer_block,
    "rnn_block": _rnn_block,
}


def random_shapes(count: int, seed: int) -> list[Shape]:
    """`count` shapes, of the operators in turn, operator by operator; the same ones for the same seed."""
    draw, names = random.Random(seed), list(RANDOM)
    shapes = []
    for i in range(count):
        operator, element = names[i % len(names)], draw.choice(list(ALL_DTYPES))
        label, arguments = RANDOM[operator](draw, ALL_DTYPES[element])
        tf32 = element == "fp32" and operator in PRODUCTS and draw.random() < 0.5
        shapes.append(Shape(operator, f"{label} {element}{TF32 if tf32 else ''}", arguments))
    return sorted(shapes, key=lambda shape: names.index(shape.operator))


# ---- what they launch ------------------------------------------------------------------------------------------------


def cases_of(shapes: Iterable[Shape], architecture: str) -> Iterator:
    """Every launch at these shapes, as a `launch.CompileCase`; none where the kernels step aside."""
    from fastblocks.kernels.launch import recording
    from fastblocks.kernels.operator import all_operators

    operators = all_operators()
    for shape in shapes:
        if not _is_taken(shape, architecture):
            continue
        with recording(architecture, shape.label) as cases, _tf32(shape.tf32):
            operators[shape.operator].rehearse(*shape.arguments)
        yield from cases


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
