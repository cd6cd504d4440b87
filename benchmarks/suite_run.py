"""`python -m benchmarks WORKLOAD …`: the standard workloads, measured one after the other within a time budget."""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import plots, providers, results, runners, suite, workloads
from benchmarks.kits import describe_device, get_kit
from benchmarks.suite_table import make_table

CHOICES = {"mode": workloads.MODES, "dtype": tuple(runners.DTYPES), "provider": providers.PROVIDERS}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the standard workloads take beside names, --json, --backend, --threads and --seconds."""
    group = parser.add_argument_group("standard workloads (several values: repeat the option, or put commas)")
    group.add_argument("--mode", action="append", metavar="M", help="forward, backward (alone), training; default: all")
    group.add_argument("--dtype", action="append", metavar="D", help="bf16, fp16, fp32, tf32; default: bf16, CPU: fp32")
    group.add_argument("--provider", action="append", metavar="P", help=", ".join(providers.PROVIDERS))
    group.add_argument("--size", choices=workloads.SIZES, help="full (default), small for a CPU, toy for a test")
    group.add_argument("--budget", type=float, metavar="SECONDS", help="start no workload after this time")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the speedups (SVG, PNG, PDF)")
    group.add_argument("--append", action="store_true", help="keep the rows that --json FILE has already")
    group.add_argument("--commit", help="of the source, for the result file, where there is no git")


def given(options: argparse.Namespace) -> list[str]:
    """The options of the standard workloads that were set."""
    names = ("mode", "dtype", "provider", "size", "budget", "plot", "append", "commit")
    return [f"--{name}" for name in names if getattr(options, name)]


def values(options: argparse.Namespace, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
    """The values of a repeatable option.

    Raises:
        ValueError: for a value that it does not take.
    """
    found = [v for text in getattr(options, name) or () for v in text.split(",") if v]
    for value in found:
        if value not in CHOICES[name]:
            raise ValueError(f"--{name}: {value!r} is none of {', '.join(CHOICES[name])}")
    return tuple(dict.fromkeys(found)) or default


def run(options: argparse.Namespace, chosen: list[workloads.Workload], console: Console, errors: Console) -> int:
    """Measure, show, write; returns the exit code.

    Raises:
        ValueError: for options that make no sense.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = suite.Settings(
        modes=values(options, "mode", workloads.MODES),
        dtypes=values(options, "dtype", ("bf16",) if device.type == "cuda" else ("fp32",)),
        providers=values(options, "provider", providers.PROVIDERS),
        seconds=options.seconds,
    )
    for path in (options.json, options.plot):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist")
    if options.plot and options.plot.suffix not in plots.SUFFIXES:
        raise ValueError(f"--plot {options.plot}: the name must end in {', '.join(plots.SUFFIXES)}")
    if options.append and not options.json:
        raise ValueError("--append needs --json FILE")
    old = results.read(options.json)["rows"] if options.append and options.json.exists() else []
    get_kit(options.backend)
    document = results.environment(options.commit) | {"size": options.size or "full", "rows": old}
    console.print(describe_device(), markup=False, soft_wrap=True)
    start, rows, columns = time.monotonic(), [], (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=errors, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for workload in chosen:
            progress.update(task, description=workload.name)
            if options.budget and time.monotonic() - start > options.budget:
                rows += left_out(workload, settings, "the time budget was spent")
            else:
                rows += [row.as_json() for row in suite.measure(workload, device, settings)]
            progress.advance(task)
            if options.json:  # after every workload: a run that is killed loses one
                results.write(options.json, document | {"rows": results.merge(old, rows)})
    console.print(make_table(rows, device.type == "cuda"))
    console.print(f"{len(chosen)} workloads in {time.monotonic() - start:.0f} s", markup=False)
    if options.plot:
        plots.speedups(options.plot, document | {"rows": results.merge(old, rows)})
    return 0


def left_out(workload: workloads.Workload, settings: suite.Settings, why: str) -> list[dict]:
    """Rows of a workload that was not measured."""
    return [
        suite.Row(workload.name, workload.case.shape, mode, dtype, name, refused=why).as_json()
        for dtype in settings.dtypes
        for mode in settings.modes
        for name in settings.providers
        if providers.belongs(name, workload)
    ]
