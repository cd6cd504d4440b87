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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import workloads
from benchmarks.aot.compiling import Job, compile_job, jobs
from benchmarks.measure import suite
from benchmarks.options import BadInput, positive
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
    "band_split": ("band-split",),
    "band_unsplit": ("band-unsplit",),
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
    for family in (info.name for info in pkgutil.iter_modules(package.__path__) if info.ispkg):
        module = importlib.import_module(f"{package.__name__}.{family}.config")
        for name, function in inspect.getmembers(module, callable):
            plain = inspect.unwrap(function)  # some are cached
            own = inspect.isfunction(plain) and plain.__module__ == module.__name__ and not name.startswith("_")
            if own and "LaunchConfig" in str(inspect.signature(plain).return_annotation):
                found[f"{family}.{name}"] = module, name, function
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

    def wrap(name: str, function: Callable) -> Callable:
        def answer(*arguments, **keywords):
            question = Question(name, arguments, tuple(sorted(keywords.items())))
            result = function(*arguments, **keywords)
            config, *rest = result if isinstance(result, tuple) else (result,)
            if seen is not None:
                seen[question] = config
            config = answers.get(question, config)
            return (config, *rest) if isinstance(result, tuple) else config

        return answer

    with ExitStack() as stack:
        stack.callback(forget_plans)
        for table, (module, name, function) in tables().items():
            stack.enter_context(mock.patch.object(module, name, wrap(table, function)))
        forget_plans()
        yield


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


def compiled_cases(workload: str, architecture: str) -> dict[str, Job]:
    """What is compiled for a workload, by what tells one compilation from another.

    Kernels label their cases with the workload's name or the start of it.
    """
    while workload:
        if found := jobs([architecture], [workload], fast=False):
            return {repr(replace(job.case, label="")): job for job in found}
        workload = workload.rpartition("-")[0]
    return {}


def objection(workload: str, architecture: str, known: dict[str, Job]) -> str:
    """Why the compiler is against what the tables answer now; an empty string if it is not.

    Args:
        workload: its name.
        architecture: a key of `compiling.TARGETS`.
        known: the cases that are compiled anyway.
    """
    for key, job in compiled_cases(workload, architecture).items():
        done = None if key in known else compile_job(job)
        if done and (done.error or done.spills or not done.warps):
            return done.error or (f"{done.resources.spilled_bytes} bytes spilled" if done.spills else "does not fit")
    return ""


def entry(config, measured: float, before: float, device: str) -> str:
    """The line to put into the table, with its measurement."""
    blocks = "".join(f", {name}={size}" for name, size in config.blocks)
    text = f"config({config.num_warps}, {config.num_stages}{blocks})"
    return f"{text}  # {device}: {show(measured)}, before {show(before)}"


def timed(workload: Workload, options: argparse.Namespace) -> tuple[float, str]:
    """Median seconds of forward plus backward with this package, or infinity and why there is none."""
    settings = suite.Settings(("training",), (options.dtype,), ("fastblocks",), options.seconds, memory=False)
    (row,) = suite.measure(workload, torch.device("cuda"), settings)
    return row.get("median", float("inf")), row.get("refused", "")


def tune(workload: Workload, options: argparse.Namespace) -> None:
    """Measure the neighbours of every configuration that a workload launches, and print what is better."""
    from fastblocks.kernels import runtime

    architecture, name = runtime.architecture(torch.device("cuda")), torch.cuda.get_device_name()
    seen: dict[Question, object] = {}
    known = compiled_cases(workload.name, architecture)
    with overridden({}, seen):
        before, problem = timed(workload, options)
    if problem:
        print(f"{workload.name}: {problem}")
        return
    columns = ("launch table", "configuration", "time", "× before")
    table = Table(*columns, title=f"{workload.name} {options.dtype}: {show(before)}", title_justify="left")
    for question, config in seen.items():
        best, winner = float("inf"), config
        for candidate in neighbours(config)[: options.most]:
            with overridden({question: candidate}):
                problem, now = objection(workload.name, architecture, known), float("inf")
                if not problem:
                    now, problem = timed(workload, options)
            if now < best:
                best, winner = now, candidate
            table.add_row(str(question), str(candidate.keywords()), problem or show(now), f"{before / now:.3f}")
        better = best < before / options.gain
        print(f"{question}\n    {entry(winner, best, before, name) if better else f'keep {config.keywords()}'}")
    Console(highlight=False).print(table)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("operation", choices=tuple(OPERATIONS), metavar="OP", help=", ".join(OPERATIONS))
    parser.add_argument("--workload", action="append", help="instead of all that go with the operation")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--seconds", type=float, default=0.2, help="for the samples of a candidate; default: 0.2")
    parser.add_argument("--most", type=positive(int), default=24, help="candidates for each launch; default: 24")
    parser.add_argument("--gain", type=positive(float), default=1.03, help="how many times faster counts as better")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise BadInput("tune measures on a GPU, and there is none; `compile` works without one")
    names = options.workload or OPERATIONS[options.operation]
    for workload in workloads.select("full", names):
        if workload.name in names:
            tune(workload, options)
    return 0
