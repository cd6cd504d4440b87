"""`python -m benchmarks`: this package beside the formulas that it replaces; with `train`, what train.py does."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory would talk on stderr

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import original
from benchmarks.case import make_instances, select
from benchmarks.cases import all_cases, operations
from benchmarks.kits import describe_device, get_kit
from benchmarks.measure import FUSED, ORIGINAL, measure
from benchmarks.table import make_table

WIDE = 170  # columns of a table that goes into a file or a pipe


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time, memory and error of this package beside the original formulas, with the same weights.",
        epilog="`python -m benchmarks train --help`: train a small restoration model.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only cases whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    parser.add_argument("--backend", choices=("auto", "triton", "eager"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; default: what PyTorch takes")
    parser.add_argument("--seconds", type=float, default=1.2, help="for the samples of a case; default: 1.2")
    options = parser.parse_args(arguments)
    for name in ("threads", "seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    return options


def explain_backend(kit, device: torch.device) -> str:
    """Who runs each operation here, and why; one line if the answer is the same for all."""
    answers = {}
    for case in operations(toy=True):
        instance = make_instances(case, {FUSED: kit}, device)[FUSED]
        operation, _, answer = kit.explain(instance.call, *instance.inputs).partition(": ")
        answers[operation] = answer
    if len(set(answers.values())) == 1:
        return f"all operations: {answer}"
    return "\n".join(f"{operation}: {answer}" for operation, answer in answers.items())


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if arguments[:1] == ["train"]:
        from benchmarks.train import main as train

        return train(arguments[1:])
    options = parse(arguments)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    try:
        cases = select(all_cases(), options.names)
        if options.json and not options.json.absolute().parent.is_dir():
            raise ValueError(f"--json {options.json}: the folder {options.json.parent} does not exist")
    except ValueError as problem:
        errors.print(f"error: {problem}", markup=False, soft_wrap=True)
        return 2
    if options.list:
        for case in cases:
            console.print(f"{case.name:32} {case.what:14} {case.shape}", markup=False, soft_wrap=True)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kits = {ORIGINAL: original, FUSED: get_kit(options.backend)}
    console.print(describe_device(), markup=False, soft_wrap=True)
    console.print(explain_backend(kits[FUSED], device), markup=False, soft_wrap=True)
    results, start = [], time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            results.append(measure(case, kits, device, options.seconds))
            progress.advance(task)
    console.print(make_table(results))
    console.print(f"{len(results)} cases in {time.monotonic() - start:.0f} s", markup=False)
    if options.json:
        document = {"device": describe_device(), "backend": explain_backend(kits[FUSED], device)}
        document |= {"threads": torch.get_num_threads(), "results": [result.as_json() for result in results]}
        options.json.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
