"""What every block does a row at a time: N rows of C channels."""

from benchmarks.workloads import flops
from benchmarks.workloads.workload import Workload, normal, operation

SHAPES = {"full": ((72192, 128), (16384, 512)), "cpu": ((16384, 128),), "toy": ((37, 24),)}  # N, C


def workloads(size: str) -> list[Workload]:
    return [workload for n, c in SHAPES[size] for workload in _workloads(n, c)]


def _workloads(n: int, c: int) -> list[Workload]:
    f = int(8 * c / 3)

    def mlp_inputs(generator):
        return [*normal((n, c))(generator), *normal((f, c), (f, c), (c, f), scale=0)(generator)]

    def make(part, name, width, inputs, count=0):
        rivals = {"liger": {"kind": part}}
        return Workload(
            f"rows-{part}-{c}", "operation", f"{n} × {width}", operation(name), inputs, count, rivals=rivals
        )

    return [
        make("norm", "rms_norm", c, normal((n, c), (c,))),
        make("swiglu", "swiglu", f, normal((n, f), (n, f))),
        make("mlp", "swiglu_mlp", c, mlp_inputs, flops.swiglu_mlp(n, c)),
    ]
