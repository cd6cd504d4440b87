"""Rotary attention on packed qkv, full and windowed; the blocks around it; windows at growing lengths (att-sweep-T)."""

from benchmarks.original.functional import rope_table
from benchmarks.workloads import flops
from benchmarks.workloads.workload import Workload, block, normal

SWEEP = "att-sweep-"


def _sweep(*lengths: int, head=(8, 32, 64, 4)) -> dict[str, tuple[int, ...]]:
    return {f"{SWEEP}{length}": (1, length, *head) for length in lengths}


SHAPES = {  # B, T, H, D; with a window also W and R register tokens
    "full": {
        "att-freq": (1128, 64, 4, 32),
        "att-time": (256, 282, 4, 32),
        "att-long": (4, 8192, 8, 64, 128, 4),
        "att-huge": (1, 65536, 8, 32, 256, 8),
        "att-freq-block": (1128, 64, 4, 32),
        "att-time-block": (256, 282, 4, 32),
        "att-long-block": (4, 8192, 8, 64, 128, 4),
        **_sweep(1024, 4096, 16384, 32768),
    },
    "cpu": {
        "att-time": (16, 282, 4, 32),
        **_sweep(2048, 8192),
        "att-time-block": (64, 282, 4, 32),
        "att-long-block": (1, 8192, 8, 32, 64, 4),
    },
    "toy": {
        "att-freq": (3, 8, 2, 8),
        "att-time": (2, 11, 2, 8),
        "att-long": (1, 40, 2, 8, 6, 2),
        "att-huge": (1, 50, 2, 8, 8, 3),
        "att-freq-block": (3, 8, 2, 8),
        "att-time-block": (2, 11, 2, 8),
        "att-long-block": (1, 40, 2, 8, 6, 2),
        **_sweep(20, 40, head=(2, 8, 6, 2)),
    },
}


def workloads(size: str) -> list[Workload]:
    return [(_block if name.endswith("-block") else _operation)(name, *s) for name, s in SHAPES[size].items()]


def _shape(b: int, t: int, h: int, d: int, window: int, registers: int) -> str:
    return f"B {b}, T {t}, H {h}, D {d}" + (f", W {window}, R {registers}" if registers else "")


def _operation(name: str, b: int, t: int, h: int, d: int, window: int = -1, registers: int = 0) -> Workload:
    def build(kit):
        def call(qkv, rope, register_qkv=None):
            return kit.functional.rope_attention(qkv, rope, h, window=window, register_qkv=register_qkv)

        return call

    def draw(generator):
        qkv, *more = normal((b, t, 3 * h * d), *([(b, registers, 3 * h * d)] if registers else []))(generator)
        return [qkv, rope_table(registers + t, d), *more]

    return Workload(
        name, "operation", _shape(b, t, h, d, window, registers), build, draw,
        flops.attention(b, t, h * d, window, registers), constant=(1,), banded=registers > 0,
        rivals={"flex": {"n_head": h, "window": window, "registers": registers}},
    )  # fmt: skip


def _block(name: str, b: int, t: int, h: int, d: int, window: int = -1, registers: int = 0) -> Workload:
    c = h * d
    if registers:
        build = block("AttentionRegisterRoFormerBlock", c, h, t, num_register_tokens=registers, window_size=window)
    else:
        build = block("RoFormerBlock", c, h, t)
    return Workload(
        name, "block", _shape(b, t, h, d, window, registers), build, normal((b, t, c)),
        flops.roformer(b, t, c, window, registers), banded=registers > 0,
    )  # fmt: skip
