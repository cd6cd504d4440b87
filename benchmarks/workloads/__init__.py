"""The standard workloads: the shapes of real models at full size for a GPU, less for a CPU, toys for tests.

The shapes come from four clips of 3 s at 48 kHz, an STFT of 2048 by 512 samples and 64 mel bands: 282 frames. A size
is a selection, too: a workload need not exist at every size.
"""

from collections.abc import Sequence

from benchmarks.workloads import attention, bands, convnext, discriminators, models, recurrent, rows
from benchmarks.workloads.workload import Workload

SIZES = ("full", "cpu", "toy")
MODES = ("forward", "backward", "training")
FAMILIES = {  # name -> module, and how its workloads' names begin
    "attention": (attention, "att"),
    "recurrent": (recurrent, "rnn"),
    "convnext": (convnext, "cnx"),
    "rows": (rows, "rows"),
    "bands": (bands, "band"),
    "discriminators": (discriminators, "disc"),
    "models": (models, "model"),
}


def all_workloads(size: str = "full") -> list[Workload]:
    """Every workload of a size, in the order of the table; names are unique."""
    return [workload for family, _ in FAMILIES.values() for workload in family.workloads(size)]


def select(workloads: Sequence[Workload], names: Sequence[str]) -> tuple[list[Workload], list[str]]:
    """Workloads that a name names (itself, its start up to a hyphen, its family), and the names that name none."""

    def means(name: str, workload: Workload) -> bool:
        start = FAMILIES[name][1] if name in FAMILIES else name
        return workload.name == start or workload.name.startswith(f"{start}-")

    unknown = [name for name in names if not any(means(name, w) for w in workloads)]
    return [w for w in workloads if any(means(name, w) for name in names)], unknown
