"""ConvNeXt blocks of stride 1, of stride 2 both ways (…-down, …-up), and the halves alone (…-conv, …-mlp)."""

from math import prod

from benchmarks.workloads import flops
from benchmarks.workloads.workload import Workload, block, by, normal, operation

KERNEL = 7
RIVALS = {"max-autotune": {}}
SHAPES = {  # name, B, C, sizes, parts
    "full": [
        ("cnx-1d", 16, 512, (1000,), ("", "conv", "mlp")),
        ("cnx-2d-32", 4, 32, (282, 64), ("", "conv", "down", "up")),
        ("cnx-2d-64", 4, 64, (141, 32), ("", "conv", "down", "up")),
        ("cnx-2d-128", 4, 128, (71, 16), ("", "conv", "down", "up")),
        ("cnx-2d-256", 4, 256, (36, 8), ("", "conv", "down", "up")),
    ],
    "cpu": [
        ("cnx-1d", 8, 256, (1000,), ("", "conv", "mlp")),
        ("cnx-1d-128", 8, 128, (1000,), ("down", "up")),
        ("cnx-2d-32", 2, 32, (282, 64), ("", "down", "up")),
    ],
    "toy": [
        ("cnx-1d", 2, 8, (15,), ("", "conv", "mlp", "down", "up")),
        ("cnx-2d-6", 1, 6, (9, 8), ("", "conv", "down", "up")),
        ("cnx-2d-8", 1, 8, (7, 5), ("", "conv", "down", "up")),
    ],
}


def workloads(size: str) -> list[Workload]:
    make = {"conv": _conv, "mlp": _mlp}
    return [
        make.get(part, _block)(f"{name}-{part}".rstrip("-"), part, b, c, sizes)
        for name, b, c, sizes, parts in SHAPES[size]
        for part in parts
    ]


def _block(name: str, part: str, b: int, c: int, sizes: tuple[int, ...]) -> Workload:
    half = tuple(-(-s // 2) for s in sizes)
    mode, stride, c_in, c_out, x, y = {
        "": ("normal", 1, c, c, sizes, sizes),
        "down": ("normal", 2, c, 2 * c, sizes, half),
        "up": ("transposed", 2, 2 * c, c, half, sizes),
    }[part]
    return Workload(
        name, "block", f"B {b}, {c_in}→{c_out}, {by(x)}, k {by((KERNEL,) * len(x))}, stride {stride}",
        block(f"ConvNeXt{len(x)}DBlock", KERNEL, stride, c_in, c_out, mode),
        lambda generator: [*normal((b, c_in, *x))(generator), y],
        flops.convnext(b * prod(x), b * prod(y), KERNEL ** len(x), c_in, c_out, mode == "transposed"), rivals=RIVALS,
    )  # fmt: skip


def _conv(name: str, part: str, b: int, c: int, sizes: tuple[int, ...]) -> Workload:
    kernel = (KERNEL,) * len(sizes)
    return Workload(
        name, "operation", f"B {b}, C {c}, {by(sizes)}, k {by(kernel)}",
        operation("depthwise_conv_layer_norm", stride=(1,) * len(sizes)),
        normal((b, c, *sizes), (c, 1, *kernel), (c,), (c,), (c,)), 2 * b * prod(sizes) * c * prod(kernel),
        rivals=RIVALS,
    )  # fmt: skip


def _mlp(name: str, part: str, b: int, c: int, sizes: tuple[int, ...]) -> Workload:
    def build(kit):
        return lambda x, w1, b1, w2, b2, residual: kit.functional.convnext_mlp(x, w1, b1, w2, b2, residual=residual)

    def draw(generator):
        x, bias1, bias2, residual = normal((b, *sizes, c), (4 * c,), (c,), (b, c, *sizes))(generator)
        weight1, weight2 = normal((4 * c, c), (c, 4 * c), scale=0)(generator)
        return [x, weight1, bias1, weight2, bias2, residual]

    count = 2 * flops.linear(b * prod(sizes), c, 4 * c)
    return Workload(name, "operation", f"B {b}, C {c}, {by(sizes)}", build, draw, count, rivals=RIVALS)
