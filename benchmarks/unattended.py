"""The standard workloads, measured one after the other within a time budget. Needs PyTorch and nothing else.

`python -m benchmarks.unattended --json FILE` writes plain lines: for machines where rich and matplotlib are missing.
Elsewhere `python -m benchmarks` does the same, with a table.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory would talk on stderr

import torch

from benchmarks import providers, results, runners, suite, workloads
from benchmarks.kits import describe_device, get_kit

CHOICES = {"mode": workloads.MODES, "dtype": tuple(runners.DTYPES), "provider": providers.PROVIDERS}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the standard workloads take beside names, --json, --backend, --threads and --seconds."""
    group = parser.add_argument_group("standard workloads (several values: repeat the option, or put commas)")
    group.add_argument("--mode", action="append", metavar="M", help="forward, backward (alone), training; default: all")
    group.add_argument("--dtype", action="append", metavar="D", help="bf16, fp16, fp32, tf32; default: bf16, CPU: fp32")
    group.add_argument("--provider", action="append", metavar="P", help=", ".join(providers.PROVIDERS))
    group.add_argument("--size", choices=workloads.SIZES, help="full (default), small for a CPU, toy for a test")
    group.add_argument("--budget", type=float, metavar="SECONDS", help="start no workload after this time")
    group.add_argument("--append", action="store_true", help="keep the rows that --json FILE has already")
    group.add_argument("--commit", help="of the source, for the result file, where there is no git")


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


def settings_of(options: argparse.Namespace, device: torch.device) -> suite.Settings:
    """What the options ask for.

    Raises:
        ValueError: for options that make no sense.
    """
    if options.json and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json {options.json}: the folder {options.json.parent} does not exist")
    if options.append and not options.json:
        raise ValueError("--append needs --json FILE")
    return suite.Settings(
        modes=values(options, "mode", workloads.MODES),
        dtypes=values(options, "dtype", ("bf16",) if device.type == "cuda" else ("fp32",)),
        providers=values(options, "provider", providers.PROVIDERS),
        seconds=options.seconds,
    )


def measure_all(
    options: argparse.Namespace,
    chosen: list[workloads.Workload],
    device: torch.device,
    note: Callable[[workloads.Workload, list[dict]], None],
) -> tuple[dict, list[dict]]:
    """Measure, and write the result file after every workload: a run that is killed loses one.

    Args:
        options: parsed.
        chosen: the workloads.
        device: where.
        note: called before a workload with no rows, and after it with its rows.

    Returns:
        The document, with what was in the file before; the rows of this run.

    Raises:
        ValueError: for options that make no sense.
    """
    settings = settings_of(options, device)
    old = results.read(options.json)["rows"] if options.append and options.json.exists() else []
    get_kit(options.backend)
    document = results.environment(options.commit) | {"size": options.size or "full", "rows": old}
    start, rows = time.monotonic(), []
    for workload in chosen:
        note(workload, [])
        if options.budget and time.monotonic() - start > options.budget:
            found = left_out(workload, settings, "the time budget was spent")
        else:
            try:
                found = [row.as_json() for row in suite.measure(workload, device, settings)]
            except Exception as problem:  # the other workloads shall not be lost with it
                found = left_out(workload, settings, suite.reason(problem))
        rows += found
        document["rows"] = results.merge(old, rows)
        if options.json:
            results.write(options.json, document)
        note(workload, found)
    return document, rows


def left_out(workload: workloads.Workload, settings: suite.Settings, why: str) -> list[dict]:
    """Rows of a workload that was not measured."""
    return [
        suite.Row(workload.name, workload.case.shape, mode, dtype, name, refused=why).as_json()
        for dtype in settings.dtypes
        for mode in settings.modes
        for name in settings.providers
        if providers.belongs(name, workload)
    ]


def line(row: dict) -> str:
    """A row as text: milliseconds, or why there are none."""
    head = f"{row['workload']:20} {row['dtype']:5} {row['mode']:9} {row['provider']:15}"
    if "median" not in row:
        return f"{head} {row['refused']}"
    floor = f" {100 / row['floor_ratio']:4.0f} % of floor" if row["floor_ratio"] else ""
    return f"{head} {1000 * row['median']:10.4f} ms{floor}  error {row['error']:.1e}"


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unattended", description="The standard workloads.")
    parser.add_argument("names", nargs="*", metavar="WORKLOAD", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    parser.add_argument("--backend", choices=("auto", "triton", "eager"), default="auto")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the samples of a workload and mode")
    add_options(parser)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    everything = workloads.all_workloads(options.size or "full")
    chosen, unknown = workloads.select(everything, options.names)
    try:
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is none of {', '.join(w.name for w in everything)}")
        print(describe_device(), flush=True)

        def note(_, rows):
            for row in rows:
                print(line(row), flush=True)

        measure_all(options, chosen or everything, device, note)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
