"""Layers of grouped GRUs and LSTMs alone, and the blocks around two of them (…-block)."""

from benchmarks.workloads import flops
from benchmarks.workloads.workload import Workload, block, normal

GATES = {"gru": 3, "lstm": 4}
KINDS = {  # name -> kind, both directions
    "rnn-freq": ("gru", True),
    "rnn-time": ("gru", False),
    "rnn-wide-gru": ("gru", False),
    "rnn-wide-lstm": ("lstm", False),
    "rnn-freq-block": ("gru", True),
    "rnn-time-block": ("gru", False),
    "rnn-freq-lstm-block": ("lstm", True),
    "rnn-time-lstm-block": ("lstm", False),
}
FREQ, TIME, WIDE = (1128, 64, 128, 8, 2), (256, 282, 128, 8, 2), (16, 1000, 512, 4, 1)
CPU = (64, 64, 128, 8, 2)
TOY = (2, 7, 16, 2, 2)
SHAPES = {  # B, T, C, G, layers
    "full": {
        "rnn-freq": FREQ,
        "rnn-freq-block": FREQ,
        "rnn-time": TIME,
        "rnn-time-block": TIME,
        "rnn-wide-gru": WIDE,
        "rnn-wide-lstm": WIDE,
    },
    "cpu": {
        "rnn-wide-gru": (64, 100, 128, 8, 1),
        "rnn-wide-lstm": (64, 100, 128, 8, 1),
        "rnn-freq-block": CPU,
        "rnn-time-block": (64, 282, 128, 8, 2),
        "rnn-freq-lstm-block": CPU,
        "rnn-time-lstm-block": CPU,
    },
    "toy": {name: (2, 7, 32, 2, 1) if "wide" in name else TOY for name in KINDS},
}


def workloads(size: str) -> list[Workload]:
    return [_workload(name, *shape) for name, shape in SHAPES[size].items()]


def _workload(name: str, b: int, t: int, c: int, g: int, layers: int) -> Workload:
    kind, both = KINDS[name]
    shape = f"{kind.upper()}, B {b}, T {t}, C {c}, G {g}, layers {layers}" + (", both directions" if both else "")
    whole = block("RNNBlock", c, layers, g, kind, both)
    if name.endswith("-block"):
        count = flops.rnn_block(b * t, c, layers, g, GATES[kind], 1 + both)
        return Workload(name, "block", shape, whole, normal((b, t, c)), count)
    width = c // g
    count = layers * flops.grouped_rnn(b * t, width, width // (1 + both), g, GATES[kind], 1 + both)
    rivals = {"block-diagonal": {}} | ({"flashrnn": {}} if layers == 1 else {})
    return Workload(name, "layer", shape, lambda kit: whole(kit).rnn, normal((b, t, c)), count, rivals=rivals)
