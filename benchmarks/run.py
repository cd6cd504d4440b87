"""The standard workloads, measured one after the other within a time budget: lines as they come, then a table.

Needs PyTorch and nothing else: without rich there is no table, without matplotlib no plot.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from itertools import groupby

import torch

import fastblocks
from benchmarks import providers
from benchmarks.measure import suite
from benchmarks.measure.environment import describe_device, environment, git_commit
from benchmarks.measure.load import busy
from benchmarks.options import BadInput, new_file, positive, several
from benchmarks.providers import BASELINE, COMPILE, FASTBLOCKS, OURS_COMPILED
from benchmarks.providers.runner import DTYPES
from benchmarks.report import files
from benchmarks.report.units import seconds
from benchmarks.workloads import FAMILIES, MODES, SIZES, all_workloads, select
from benchmarks.workloads.workload import Workload

GPU_DEFAULTS = {
    "mode": MODES, "dtype": ("bf16",), "size": "full",
    "provider": tuple(name for name in providers.PROVIDERS if name != OURS_COMPILED),
}  # fmt: skip
CPU_DEFAULTS = {
    "mode": ("forward", "training"), "dtype": ("fp32",), "provider": (BASELINE, FASTBLOCKS), "size": "cpu"
}  # fmt: skip
PLOTS = (".svg", ".png", ".pdf")


def parse(arguments: list[str], commands: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time, memory and error of this package beside the original formulas, with the same weights.\n"
        "Options that take several values: repeat them, or put commas.",
        epilog=commands,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help_of_names = (
        f"att-freq, att, or {', '.join(FAMILIES)}; all. Only where it is named: adapters, models that "
        "fastblocks.convert takes, original beside converted"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=help_of_names)
    parser.add_argument("--list", action="store_true", help="list the workloads and stop")
    for name, choices, default in (
        ("mode", MODES, "on a CPU not backward alone"),
        ("dtype", DTYPES, "bf16, CPU: fp32"),
        ("provider", providers.PROVIDERS, f"all, on a CPU {BASELINE} and {FASTBLOCKS}"),
    ):
        text = f"{', '.join(choices)}; {default}"
        parser.add_argument(
            f"--{name}", type=several(tuple(choices)), action="extend", metavar=name[0].upper(), help=text
        )
    parser.add_argument("--size", choices=SIZES, help="full on a GPU, cpu without one, toy for tests")
    parser.add_argument("--backend", choices=fastblocks.backend.BACKENDS, default="auto")
    parser.add_argument("--threads", type=positive(int), help="CPU threads; what PyTorch takes")
    parser.add_argument(
        "--busy", type=positive(int), metavar="N", help="beside N processes at full load, as data loaders are"
    )
    parser.add_argument(
        "--seconds", type=positive(float), default=0.4, help="for the samples of a workload and mode; 0.4"
    )
    parser.add_argument("--budget", type=positive(float), metavar="SECONDS", help="start no workload after this time")
    parser.add_argument(
        "--json",
        type=new_file,
        metavar="FILE",
        help="write the measurements; a folder: a new file there, or the one file of --dtype, --threads, --busy, …",
    )
    parser.add_argument("--append", action="store_true", help="keep the rows that --json FILE has already")
    parser.add_argument("--commit", help="of the source, for the result file, where there is no git")
    parser.add_argument("--plot", type=new_file, metavar="FILE", help=f"draw the speedups ({', '.join(PLOTS)})")
    options = parser.parse_args(arguments)
    if options.append and not options.json:
        raise BadInput("--append needs --json FILE")
    if options.json and options.json.is_dir():
        dated = f"{datetime.now():%Y-%m-%d}-{options.commit or git_commit()}"
        options.json /= f"{'-'.join(condition(options)) or dated}.json"
    if options.plot and options.plot.suffix not in PLOTS:
        raise BadInput(f"--plot {options.plot}: the name must end in {', '.join(PLOTS)}")
    if options.plot and not find_spec("matplotlib"):
        raise BadInput("--plot needs matplotlib, which is not installed")
    return options


def condition(options: argparse.Namespace) -> list[str]:
    """What is unlike a CPU's defaults, in words of the options: each such condition has its own result file and table.

    A GPU's result file has them all.
    """
    if torch.cuda.is_available():
        return []
    words = [dtype for dtype in dict.fromkeys(options.dtype or ()) if (dtype,) != CPU_DEFAULTS["dtype"]]
    words += ["compile"] if {COMPILE, OURS_COMPILED} & set(options.provider or ()) else []
    words += [f"threads{options.threads}"] if options.threads else []
    return words + ([f"busy{options.busy}"] if options.busy else [])


def explain_backend(device: torch.device) -> str:
    """Who runs each operation here, and why; one line if the answer is the same for all."""
    answers = {}
    for workload in all_workloads("toy"):
        if workload.step is None:
            call = workload.build(fastblocks)
            call = call.to(device) if isinstance(call, torch.nn.Module) else call
            inputs = [t.to(device) if isinstance(t, torch.Tensor) else t for t in workload.inputs(torch.Generator())]
            for line in fastblocks.explain(call, *inputs).splitlines():
                operation, colon, answer = line.partition(" × ")[0].partition(": ")
                answers |= {operation: answer} if colon else {}
    if len(set(answers.values())) == 1:
        return f"all operations: {answers.popitem()[1]}"
    return "\n".join(f"{operation}: {answer}" for operation, answer in answers.items())


def installed(chosen: list[Workload]) -> list[Workload]:
    """Those whose packages can be found; says what cannot.

    Raises:
        BadInput: if none is left.
    """
    found = [workload for workload in chosen if not workload.package or find_spec(workload.package)]
    if missing := [w for w in chosen if w not in found]:
        packages = ", ".join(dict.fromkeys(w.package.replace("_", "-") for w in missing))
        text = f"not installed: {packages} ({', '.join(w.name for w in missing)}); pip install -e '.[adapters]'"
        if not found:
            raise BadInput(text)
        print(text, flush=True)
    return found


def measure_all(
    document: dict, chosen: list[Workload], device: torch.device, settings: suite.Settings, options: argparse.Namespace
) -> Iterator[list[dict]]:
    """Measure, and write the result file after every workload: a run that is killed loses one.

    Args:
        document: to whose rows those of this run are added.
        chosen: the workloads.
        device: where.
        settings: of each.
        options: `budget` and `json`.

    Yields:
        The rows of each workload.
    """
    start = time.monotonic()
    for workload in chosen:
        try:
            if options.budget and time.monotonic() - start > options.budget:
                raise providers.Skipped("the time budget was spent")
            rows = suite.measure(workload, device, settings)
        except Exception as problem:  # the other workloads shall not be lost with it
            rows = suite.refused(workload, settings, suite.reason(problem))
        document["rows"] = files.merge(document["rows"], rows)
        if options.json:
            files.write(options.json, document)
        yield rows


def line(row: dict) -> str:
    """A row in a few words."""
    if "median" not in row:
        return f"{row['provider']}: {row['refused']}"
    floor = f", {100 / row['floor_ratio']:.0f} % of floor" if row["floor_ratio"] else ""
    return f"{row['provider']} {seconds(row['median'])} (error {row['error']:.0e}{floor})"


@contextmanager
def progress(total: int):
    """What is told after each workload: a bar on a terminal, else a line for each mode."""
    if find_spec("rich") and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda _, rows: bar.update(task, advance=1, description=rows[0]["workload"])
    else:

        def lines(index: int, rows: list[dict]) -> None:
            for (mode, dtype), few in groupby(rows, key=lambda row: (row["mode"], row["dtype"])):
                head = f"[{index}/{total}] {rows[0]['workload']} {dtype} {mode}"
                print(f"{head}: {'; '.join(map(line, few))}", flush=True)

        yield lines


def main(arguments: list[str], commands: str = "") -> int:
    """Returns the exit code."""
    options = parse(arguments, commands)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    defaults = GPU_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    size = options.size or defaults["size"]
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = select(size, options.names)
    if options.list:
        for workload in chosen:
            print(f"{workload.name:22} {workload.what:14} {workload.shape}")
        return 0
    chosen = installed(chosen)
    modes, dtypes, names = (tuple(getattr(options, n) or defaults[n]) for n in ("mode", "dtype", "provider"))
    settings = suite.Settings(modes, dtypes, names, options.seconds, memory=not condition(options))
    fastblocks.use_backend(options.backend)
    print(f"{describe_device()}\n{explain_backend(device)}", flush=True)
    old = files.read(options.json)["rows"] if options.append and options.json.exists() else []
    about = {"size": size, "condition": condition(options), "busy": options.busy or 0}
    document = environment(options.commit) | about | {"rows": old}
    start, everything = time.monotonic(), []
    with busy(options.busy or 0), progress(len(chosen)) as note:
        for index, rows in enumerate(measure_all(document, chosen, device, settings, options), 1):
            everything += rows
            note(index, rows)
    if find_spec("rich"):
        from benchmarks.report.table import show

        show(everything)
    print(f"{len(chosen)} workloads in {time.monotonic() - start:.0f} s")
    if options.plot:
        from benchmarks.report import plots

        plots.speedups(options.plot, document)
    return 0
