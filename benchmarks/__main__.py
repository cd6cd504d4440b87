"""`python -m benchmarks`: this package beside the formulas that it replaces; its commands are in COMMANDS."""

import argparse
import os
import sys
import time
from importlib import import_module
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory would talk on stderr

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import original, results, suite_run, workloads
from benchmarks.case import make_instances, select
from benchmarks.cases import all_cases, operations
from benchmarks.kits import describe_device, get_kit
from benchmarks.measure import FUSED, ORIGINAL, measure
from benchmarks.table import make_table

WIDE = 170  # columns of a table that goes into a file or a pipe
COMMANDS = {  # name -> module, and what it does
    "train": ("benchmarks.train", "train a small restoration model"),
    "compile": ("benchmarks.aot.compiling", "compile every kernel, without a GPU: registers, spills, …"),
    "tune": ("benchmarks.aot.tuning", "measure launch configurations on the GPU that is there"),
    "report": ("benchmarks.report", "draw the README's table and the plots from result files"),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    commands = "\n".join(f"  {name:9} {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time, memory and error of this package beside the original formulas, with the same weights.\n"
        "Without names: on a CPU a table of cases that fit one, on a GPU the standard workloads at full size.",
        epilog=f"commands (each takes --help):\n{commands}\n"
        "under torchrun, `-m benchmarks model-roformer` measures distributed training steps",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help="standard workloads (att-freq, or a family: att, rnn, cnx, rows, band, disc, model); "
        "or the cases whose name contains one of these",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list cases and workloads and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    parser.add_argument("--backend", choices=("auto", "triton", "eager"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; default: what PyTorch takes")
    parser.add_argument("--seconds", type=float, default=1.2, help="for the samples of a case; default: 1.2")
    suite_run.add_options(parser)
    options = parser.parse_args(arguments)
    for name in ("threads", "seconds", "budget"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    return options


def choose(options: argparse.Namespace) -> tuple[list, list]:
    """(cases, standard workloads): what the names mean; one of them is empty unless everything is listed.

    Raises:
        ValueError: if names mean nothing, or some of each, or options do not fit what they mean.
    """
    everything, given = workloads.all_workloads(options.size or "full"), suite_run.given(options)
    if not options.names:
        if options.list:
            return all_cases(), everything
        if torch.cuda.is_available():
            return [], everything
        if given:
            names = ", ".join(dict.fromkeys(w.name.partition("-")[0] for w in everything))
            raise ValueError(f"{' '.join(given)} is for the standard workloads; name some: {names}")
        return all_cases(), []
    chosen, unknown = workloads.select(everything, options.names)
    if not chosen:
        try:
            cases = select(all_cases(), options.names)
        except ValueError as problem:
            raise ValueError(f"{problem}; standard workloads: {', '.join(w.name for w in everything)}") from None
        if given:
            raise ValueError(f"{' '.join(given)} is for the standard workloads, and {options.names} are cases")
        return cases, []
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is no standard workload; cases are measured in a run of their own")
    return [], chosen


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
    if arguments[:1] and arguments[0] in COMMANDS:
        return import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return import_module("benchmarks.distributed").main(arguments)
    options = parse(arguments)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        cases, chosen = choose(options)
        if options.list:
            for case in [*cases, *(workload.case for workload in chosen)]:
                console.print(f"{case.name:32} {case.what:14} {case.shape}", markup=False, soft_wrap=True)
            return 0
        if chosen:
            return suite_run.run(options, chosen, console, errors)
        if options.json and not options.json.absolute().parent.is_dir():
            raise ValueError(f"--json {options.json}: the folder {options.json.parent} does not exist")
    except ValueError as problem:
        errors.print(f"error: {problem}", markup=False, soft_wrap=True)
        return 2
    return run_cases(options, cases, console, errors)


def run_cases(options: argparse.Namespace, cases: list, console: Console, errors: Console) -> int:
    """The table of cases; returns the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kits = {ORIGINAL: original, FUSED: get_kit(options.backend)}
    console.print(describe_device(), markup=False, soft_wrap=True)
    console.print(explain_backend(kits[FUSED], device), markup=False, soft_wrap=True)
    found, start = [], time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            found.append(measure(case, kits, device, options.seconds))
            progress.advance(task)
    console.print(make_table(found))
    console.print(f"{len(found)} cases in {time.monotonic() - start:.0f} s", markup=False)
    if options.json:
        document = results.environment(options.commit) | {"backend": explain_backend(kits[FUSED], device)}
        results.write(options.json, document | {"results": [result.as_json() for result in found]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
