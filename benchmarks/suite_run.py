"""The standard workloads on a terminal: a progress bar while they run, then the table and the plot."""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import plots, unattended, workloads
from benchmarks.kits import describe_device
from benchmarks.suite_table import make_table

OPTIONS = ("mode", "dtype", "provider", "size", "budget", "plot", "append", "commit")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What only the standard workloads take."""
    unattended.add_options(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="workloads: draw the speedups (SVG, PNG, PDF)")


def given(options: argparse.Namespace) -> list[str]:
    """The options of the standard workloads that were set."""
    return [f"--{name}" for name in OPTIONS if getattr(options, name)]


def run(options: argparse.Namespace, chosen: list[workloads.Workload], console: Console, errors: Console) -> int:
    """Measure, show, write; returns the exit code.

    Raises:
        ValueError: for options that make no sense.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unattended.settings_of(options, device)
    if options.plot and not options.plot.absolute().parent.is_dir():
        raise ValueError(f"--plot {options.plot}: the folder {options.plot.parent} does not exist")
    if options.plot and options.plot.suffix not in plots.SUFFIXES:
        raise ValueError(f"--plot {options.plot}: the name must end in {', '.join(plots.SUFFIXES)}")
    console.print(describe_device(), markup=False, soft_wrap=True)
    start, columns = time.monotonic(), (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=errors, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))

        def note(workload: workloads.Workload, rows: list[dict]) -> None:
            progress.update(task, description=workload.name, advance=bool(rows))

        document, rows = unattended.measure_all(options, chosen, device, note)
    console.print(make_table(rows, device.type == "cuda"))
    console.print(f"{len(chosen)} workloads in {time.monotonic() - start:.0f} s", markup=False)
    if options.plot:
        plots.speedups(options.plot, document)
    return 0
