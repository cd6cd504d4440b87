"""`python -m benchmarks host`: what an operation costs the CPU that launches it; no GPU needed.

At the standard workloads a GPU finishes a kernel in 20 to 200 µs, so the time that Python takes to launch the next one
counts. Here everything runs but the driver's launch: the public function, its checks, the choice of the backend,
autograd, allocations (on CPU tensors), and each `launch()` up to Triton's compiled kernel.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from timeit import repeat
from unittest import mock

import torch
from rich.console import Console

from benchmarks.options import needs_compiled_kernels
from benchmarks.report.table import fitted

ROUNDS, CALLS = 1000, 3  # the shorter a round, the likelier one that nothing interrupts


def calls() -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """Each operation at a small size (time grows with what is launched, not with how much): function and leaves."""
    from fastblocks import functional as F

    def leaves(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(size).requires_grad_() for size in sizes]

    rope = F.rope_table(300, 8)
    qkv, long_qkv, registers = leaves((2, 20, 48), (1, 290, 48), (1, 2, 48))
    x, w, u, v = leaves((2, 3, 16), (1, 2, 24, 8), (1, 2, 24, 8), (1, 2, 32, 8))
    feature_map, map_bias = leaves((1, 8, 300), (8,))
    image, kernel, bias, norm = leaves((1, 8, 6, 6), (8, 1, 3, 3), (8,), (8,))
    rows, w1, b1, w2, b2, residual = leaves((1, 6, 6, 8), (32, 8), (32,), (8, 32), (8,), (1, 8, 6, 6))
    norm_rows, scale, gate, up, down = leaves((6, 8), (8,), (21, 8), (21, 8), (8, 21))
    block, rnn = (
        [t.detach().bfloat16().requires_grad_() for t in leaves(*sizes, *mlp_sizes)]
        for mlp_sizes in [((42, 16), (42, 16), (16, 42), (16,), (16,))]
        for sizes in (
            ((2, 20, 16), (48, 16), (16, 16)),
            ((2, 3, 16), (2, 1, 2, 24, 8), (2, 1, 2, 24, 8)),
        )
    )
    depthwise, mlp = [image, kernel, bias, norm], [rows, w1, b1, w2, b2]
    spectrum, split, split_bias, bands, unsplit, unsplit_bias = leaves(
        (2, 9, 5, 2), (3, 8, 16), (3, 16), (2, 16, 5, 3), (3, 16, 8), (3, 8)
    )
    ranges, bins = [(0, 4), (2, 6), (5, 9)], torch.ones(9)
    bands = bands.detach().to(memory_format=torch.channels_last).requires_grad_()
    window = {"window": 32, "register_qkv": registers}
    from torch.nn.functional import normalize

    weights = leaves(*[(16, 8, 3)] * 30)
    us, vs = ([normalize(torch.randn(n), dim=0) for _ in weights] for n in (16, 24))
    lengths = leaves(*[(16, 1, 1)] * 30)
    maps, real = leaves(*[(2, 8, 9)] * 25), [torch.randn(2, 8, 9) for _ in range(25)]
    return {
        "rope_attention, short": (lambda: F.rope_attention(qkv, rope, 2), [qkv]),
        "rope_attention, window, registers": (
            lambda: F.rope_attention(long_qkv, rope, 2, **window), [long_qkv, registers]
        ),
        "grouped_gru": (lambda: F.grouped_gru(x, w, u)[0], [x, w, u]),
        "grouped_lstm": (lambda: F.grouped_lstm(x, v, v)[0], [x, v]),
        "depthwise_conv_layer_norm": (
            lambda: F.depthwise_conv_layer_norm(*depthwise, bias, stride=(1, 1)), depthwise
        ),
        "convnext_mlp": (lambda: F.convnext_mlp(*mlp, residual=residual), [*mlp, residual]),
        "bias_leaky_relu": (lambda: F.bias_leaky_relu(feature_map, map_bias, 0.2), [feature_map, map_bias]),
        "rms_norm": (lambda: F.rms_norm(norm_rows, scale), [norm_rows, scale]),
        "swiglu": (lambda: F.swiglu(gate, up), [gate, up]),
        "swiglu_mlp": (lambda: F.swiglu_mlp(norm_rows, gate, up, down), [norm_rows, gate, up, down]),
        "roformer_block": (lambda: F.roformer_block(*block, rope, 2), block),
        "band_split": (
            lambda: F.band_split(spectrum, split, split_bias, ranges), [spectrum, split, split_bias]
        ),
        "band_unsplit": (
            lambda: F.band_unsplit(bands, unsplit, unsplit_bias, ranges, bins), [bands, unsplit, unsplit_bias]
        ),
        "rnn_block": (lambda: F.rnn_block(*rnn), rnn),
        "spectral_norms of 30": (lambda: F.spectral_norms(weights, us, vs), weights),
        "feature_matching of 25": (lambda: F.feature_matching([real], [maps]), maps),
        "weight_norms of 30": (lambda: F.weight_norms(weights, lengths), [*weights, *lengths]),
    }  # fmt: skip


class _Held(dict):
    """Every kernel has been compiled; what was is called with a grid, and does nothing."""

    def get(self, key):
        hash(key)
        return _COMPILED


_COMPILED = defaultdict(lambda: lambda *arguments: None)


@contextmanager
def as_on_a_gpu(on_launch: Callable | None = None) -> Iterator[None]:
    """Operations on CPU tensors take the kernels' way; `on_launch` gets what each launch gets. Without it a launch goes
    on to the compiled kernel, which does nothing."""
    from fastblocks import use_backend
    from fastblocks.kernels import launch, runtime

    with (
        use_backend("triton"),
        mock.patch.object(runtime, "unsupported_reason", lambda device: ""),
        runtime.pretending("sm_90"),
        mock.patch.object(launch, "_listener", on_launch),
        mock.patch.object(launch, "_held", _Held()),
        mock.patch.object(torch.cuda, "current_device", lambda: -1),  # the index that a tensor on the CPU tells
    ):
        yield


def microseconds(function: Callable) -> float:
    """The quickest of ROUNDS averages: what is slower has been interrupted."""
    # with the garbage collector, which timeit stops: autograd's nodes hold each other
    return min(repeat(function, "import gc; gc.enable()", number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def launches_of(function: Callable) -> int:
    found: list[tuple] = []
    with as_on_a_gpu(lambda *launched: found.append(launched)):
        function()
    return len(found)


def measure(function: Callable, leaves: list[torch.Tensor]) -> dict[str, float]:
    """µs of a call without gradients, of one that will be differentiated, and of that and its backward pass."""

    def training():
        y = function()
        torch.autograd.grad(y, leaves, [torch.ones_like(one) for one in ([y] if isinstance(y, torch.Tensor) else y)])

    def inference():
        with torch.no_grad():
            function()

    result = {}
    for name, run in (("inference", inference), ("forward", function), ("forward + backward", training)):
        result[f"launches, {name}"] = launches_of(run)
        with as_on_a_gpu():
            result[name] = microseconds(run)
    return result


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks host",
        description="Host time of each fused operation, without a GPU: everything but the driver's launch.",
    ).parse_args(arguments)
    needs_compiled_kernels()
    torch.set_num_threads(1)
    console, lines = Console(highlight=False), []
    for name, (function, leaves) in calls().items():
        found = measure(function, leaves)
        cells = [f"{found[k]:.0f} ({found[f'launches, {k}']})" for k in ("inference", "forward", "forward + backward")]
        lines.append([name, *cells])
    header = ["operation", "inference", "forward", "forward + backward"]
    console.print(fitted(header, lines, console, "host time, µs (launches)"))
    x = torch.randn(64, requires_grad=True)
    empty = microseconds(lambda: torch.empty(64))
    product = microseconds(lambda: torch.autograd.grad(x * 2.0, x, x))
    print(f"torch.empty takes {empty:.1f} µs here; x * 2, forward + backward, {product:.0f} (autograd's own)")
    return 0
