"""`python -m benchmarks tune OP`: measures launch configurations on the GPU that is there.

A launch table is a function of a family's `config` module that returns a `LaunchConfig` (alone, or first of a tuple).
Each answer that a workload gets from a table is replaced by its neighbours, one answer at a time; a neighbour whose
kernels spill or do not fit, as an ahead-of-time compilation says, is not launched, and one whose results are wrong is
not timed.
"""

import argparse
import importlib
import inspect
import itertools
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import workloads
from benchmarks.measure import suite
from benchmarks.report.units import seconds as show
from benchmarks.workloads.workload import Workload

OPERATIONS = {
    "rope_attention": ("att-freq", "att-time", "att-long", "att-huge"),
    "grouped_gru": ("rnn-freq", "rnn-time", "rnn-wide-gru"),
    "grouped_lstm": ("rnn-wide-lstm",),
    "depthwise_conv_layer_norm": ("cnx-1d-conv", "cnx-2d-32-conv", "cnx-2d-64-conv", "cnx-2d-128-conv"),
    "convnext_mlp": ("cnx-1d", "cnx-2d-32", "cnx-2d-64", "cnx-2d-128"),
    "swiglu_mlp": ("rows-mlp-128", "rows-mlp-512"),
    "swiglu": ("rows-swiglu-128", "rows-swiglu-512"),
    "rms_norm": ("rows-norm-128", "rows-norm-512"),
}
WARPS, MOST_WARPS, MOST_STAGES, SMALLEST_BLOCK = (0.5, 1, 2), 16, 4, 8
REACH = ("BLOCK", "RUN")  # names of constants that are tile sizes


@dataclass(frozen=True)
class Question:
    """One call of a launch table."""

    table: str
    arguments: tuple
    keywords: tuple

    def __str__(self) -> str:
        parts = [repr(a) for a in self.arguments] + [f"{name}={value!r}" for name, value in self.keywords]
        return f"{self.table}({', '.join(parts)})"


def tables() -> dict[str, tuple[object, str, Callable]]:
    """The public functions of the families' `config` modules that answer with a configuration: module, name, function
    by `family.name`."""
    import fastblocks.kernels as package

    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        if not info.ispkg:
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}.config")
        for name, function in vars(module).items():
            plain = inspect.unwrap(function) if callable(function) else None  # some are cached
            if not inspect.isfunction(plain) or plain.__module__ != module.__name__ or name.startswith("_"):
                continue
            if "LaunchConfig" in str(inspect.signature(plain).return_annotation):
                found[f"{info.name}.{name}"] = module, name, function
    return found


def forget_plans() -> None:
    """Launchers may keep what follows from shapes and launch tables."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastblocks.kernels."):
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


@contextmanager
def overridden(answers: dict[Question, object], seen: dict[Question, object] | None = None) -> Iterator[None]:
    """Within it, launch tables answer as `answers` say; what is asked, and the answer, is noted in `seen`."""
    originals = tables()

    def wrap(name: str, function: Callable) -> Callable:
        def answer(*arguments, **keywords):
            question = Question(name, arguments, tuple(sorted(keywords.items())))
            result = function(*arguments, **keywords)
            config = result[0] if isinstance(result, tuple) and not hasattr(result, "num_warps") else result
            if seen is not None:
                seen[question] = config
            if question not in answers:
                return result
            chosen = answers[question]
            return (chosen, *result[1:]) if config is not result else chosen

        return answer

    for table, (module, name, function) in originals.items():
        setattr(module, name, wrap(table, function))
    forget_plans()
    try:
        yield
    finally:
        for module, name, function in originals.values():
            setattr(module, name, function)
        forget_plans()


def neighbours(config) -> list:
    """Half, same and double warps; one stage fewer, same and more; each tile size halved, same and doubled, one tile
    size at a time. The configuration itself is not among them; what differs in least comes first."""
    warps = sorted({int(config.num_warps * f) for f in WARPS if 1 <= config.num_warps * f <= MOST_WARPS})
    stages = [s for s in range(config.num_stages - 1, config.num_stages + 2) if 1 <= s <= MOST_STAGES]
    tiles = [config.blocks]
    for i, (name, size) in enumerate(config.blocks):
        if name.startswith(REACH):
            for other in (size // 2, size * 2):
                if other >= SMALLEST_BLOCK:
                    tiles.append((*config.blocks[:i], (name, other), *config.blocks[i + 1 :]))
    product = itertools.product(tiles, warps, stages)
    made = [replace(config, num_warps=w, num_stages=s, blocks=b) for b, w, s in product]
    return sorted((one for one in made if one != config), key=lambda one: distance(one, config))


def distance(one, other) -> int:
    """In how many parameters two configurations differ."""
    return sum(a != b for a, b in zip(one.keywords().values(), other.keywords().values(), strict=True))


def compiled_cases(workload: str, architecture: str) -> dict[str, object]:
    """What is compiled for a workload, by what tells one compilation from another.

    Kernels label their cases with the workload's name or the start of it.
    """
    from benchmarks.aot.compiling import jobs

    parts = workload.split("-")
    for length in range(len(parts), 0, -1):
        if found := jobs([architecture], ["-".join(parts[:length])], fast=False):
            return {f"{job.name} {job.signature} {job.constants} {job.config}": job for job in found}
    return {}


def objection(workload: str, architecture: str, known: dict[str, object]) -> str:
    """Why the compiler is against what the tables answer now; an empty string if it is not.

    Args:
        workload: its name.
        architecture: a key of `compiling.TARGETS`.
        known: the cases that are compiled anyway.
    """
    from benchmarks.aot.compiling import compile_job

    changed = [job for key, job in compiled_cases(workload, architecture).items() if key not in known]
    for job in changed:
        done = compile_job(job)
        if done.error or done.spills or not done.warps:
            return done.error or (f"{done.resources.spilled_bytes} bytes spilled" if done.spills else "does not fit")
    return ""


def entry(config, measured: float, before: float, device: str) -> str:
    """The line to put into the table, with its measurement."""
    blocks = "".join(f", {name}={size}" for name, size in config.blocks)
    text = f"config({config.num_warps}, {config.num_stages}{blocks})"
    return f"{text}  # {device}: {show(measured)}, before {show(before)}"


def timed(workload: Workload, device: torch.device, dtype: str, seconds: float) -> tuple[float, str]:
    """Median seconds of forward plus backward with this package, or infinity and why there is none."""
    settings = suite.Settings(("training",), (dtype,), ("fastblocks",), seconds, memory=False)
    (row,) = suite.measure(workload, device, settings)
    return (row.timing.median, "") if row.timing else (float("inf"), row.refused)


def tune(workload: Workload, device: torch.device, options: argparse.Namespace, console: Console) -> None:
    """Measure the neighbours of every configuration that a workload launches, and print what is better."""
    from fastblocks.kernels import runtime

    architecture, name = runtime.architecture(device), torch.cuda.get_device_name(device)
    seen: dict[Question, object] = {}
    known = compiled_cases(workload.name, architecture)
    with overridden({}, seen):
        before, problem = timed(workload, device, options.dtype, options.seconds)
    if problem:
        console.print(f"{workload.name}: {problem}", markup=False)
        return
    table = Table(title=f"{workload.name} {options.dtype}: {show(before)}", title_justify="left")
    for column in ("launch table", "configuration", "time", "× before"):
        table.add_column(column)
    for question, config in seen.items():
        found = []
        for candidate in neighbours(config)[: options.most]:
            with overridden({question: candidate}):
                against = objection(workload.name, architecture, known)
                now, problem = float("inf"), against
                if not against:
                    now, problem = timed(workload, device, options.dtype, options.seconds)
            found.append((now, candidate))
            table.add_row(str(question), str(candidate.keywords()), problem or show(now), f"{before / now:.3f}")
        best, winner = min(found, key=lambda pair: pair[0], default=(float("inf"), config))
        if best < before / options.gain:
            console.print(f"{question}\n    {entry(winner, best, before, name)}", markup=False, soft_wrap=True)
        else:
            console.print(f"{question}\n    keep {config.keywords()}", markup=False, soft_wrap=True)
    console.print(table)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("operation", choices=tuple(OPERATIONS), metavar="OP", help=", ".join(OPERATIONS))
    parser.add_argument("--workload", action="append", help="instead of all that go with the operation")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--seconds", type=float, default=0.2, help="for the samples of a candidate; default: 0.2")
    parser.add_argument("--most", type=int, default=24, help="candidates for each launch; default: 24")
    parser.add_argument("--gain", type=float, default=1.03, help="how many times faster counts as better")
    options = parser.parse_args(arguments)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if not torch.cuda.is_available():
        errors.print("error: tune measures on a GPU, and there is none; `compile` works without one", markup=False)
        return 2
    names = options.workload or list(OPERATIONS[options.operation])
    chosen, unknown = workloads.select(workloads.all_workloads("full"), names)
    if unknown:
        errors.print(f"error: there is no workload {', '.join(unknown)}", markup=False)
        return 2
    for workload in [w for w in chosen if w.name in names]:
        tune(workload, torch.device("cuda"), options, console)
    return 0
