"""What the operators launch at the standard workloads: the real launchers, run on meta tensors and recorded."""

from collections.abc import Callable, Iterator

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ATTENTION = {  # tokens, heads, head size, window, registers
    "att-freq": (64, 4, 32, -1, 0),
    "att-time": (282, 4, 32, -1, 0),
    "att-long": (8192, 8, 64, 128, 4),
    "att-huge": (65536, 8, 32, 256, 8),
    "full": (4096, 8, 64, -1, 0),
}
RECURRENT = {"rnn-freq": (8, 16, 8, 2), "rnn-time": (8, 16, 16, 1), "rnn-wide": (4, 128, 128, 1)}  # G, I, H, N
CONVNEXT = {"cnx-1d": (16, 512, 1000)} | {  # B, C, sizes
    f"cnx-2d C {channels}": (4, channels, height, width)
    for channels, height, width in ((32, 282, 64), (64, 141, 32), (128, 71, 16), (256, 36, 8))
}

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


WORKLOADS: dict[str, Callable[[], Iterator[tuple[str, Arguments]]]] = {  # by operator
    "rope_attention": attention,
    "grouped_rnn": recurrent,
    "depthwise_conv_layer_norm": depthwise_conv_layer_norm,
    "convnext_mlp": convnext_mlp,
}


def cases_of(operator: str, architecture: str) -> Iterator:
    """Every launch of an operator at the standard workloads, as a `launch.CompileCase`."""
    from fastblocks.kernels.launch import recording
    from fastblocks.kernels.operator import all_operators

    rehearse = all_operators()[operator].rehearse
    for label, arguments in WORKLOADS[operator]():
        if operator == "grouped_rnn" and not _fits(arguments, architecture):
            continue
        with recording(architecture, label) as cases:
            rehearse(*arguments)
        yield from cases


def _fits(arguments: Arguments, architecture: str) -> bool:
    from fastblocks.kernels.recurrent.config import largest_hidden

    return arguments[2].shape[3] <= largest_hidden(architecture, arguments[0].dtype == torch.float32)
