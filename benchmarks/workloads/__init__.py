"""The standard workloads: the shapes of real models at full size for a GPU, less for a CPU, toys for tests.

The shapes come from four clips of 3 s at 48 kHz, an STFT of 2048 by 512 samples and 64 mel bands: 282 frames. A size
is a selection, too: a workload need not exist at every size.
"""

from collections.abc import Sequence

from benchmarks.options import BadInput
from benchmarks.workloads import adapters, attention, bands, convnext, discriminators, models, recurrent, rows
from benchmarks.workloads.workload import Workload

SIZES = ("full", "cpu", "toy")
MODES = ("forward", "backward", "training")
FAMILIES = {  # name -> module, and how its workloads' names begin
    "attention": (attention, "att"),
    "recurrent": (recurrent, "rnn"),
    "convnext": (convnext, "cnx"),
    "rows": (rows, "rows"),
    "bands": (bands, "band"),
    "discriminators": (discriminators, "disc", "gan"),
    "models": (models, "model"),
}
ON_REQUEST = {"adapters": (adapters, "from")}  # needs other packages: only where it is named


def all_workloads(size: str = "full") -> list[Workload]:
    """The workloads of a size, in the order of the table; names are unique."""
    return [workload for family, *_ in FAMILIES.values() for workload in family.workloads(size)]


def select(size: str, names: Sequence[str]) -> list[Workload]:
    """The workloads of a size that are named (by name, its start up to a hyphen, or family); `all_workloads` without
    names.

    Raises:
        BadInput: for a name that names none.
    """
    everything, families = all_workloads(size), FAMILIES | ON_REQUEST
    if names:
        everything += [workload for family, *_ in ON_REQUEST.values() for workload in family.workloads(size)]

    def means(name: str, workload: Workload) -> bool:
        starts = families[name][1:] if name in families else [name]
        return f"{workload.name}-".startswith(tuple(f"{start}-" for start in starts))

    if unknown := [name for name in names if not any(means(name, w) for w in everything)]:
        known = ", ".join(workload.name for workload in everything)
        raise BadInput(f"{', '.join(unknown)} is no workload at --size {size}; there are {known}")
    return [w for w in everything if not names or any(means(name, w) for name in names)]
