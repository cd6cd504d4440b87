"""`python -m benchmarks compile`: what the compiler makes of every kernel, for GPUs that need not be there.

An operator takes part by being declared; its shapes stand in `cases`.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from multiprocessing.connection import Connection, wait
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.aot.cases import cases_of, random_shapes, standard_shapes
from benchmarks.aot.machine_code import Resources, missing_tools, resident_warps, resources
from benchmarks.options import BadInput, needs_compiled_kernels, new_file, positive, several
from benchmarks.report.table import fitted

TARGETS = {  # name of the launch tables -> what triton.compile takes
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TUNED = ("sm_80", "sm_90")  # where spills are errors
SPILL, ODD_SPILL = 0, 300  # bytes that a thread may spill at the standard workloads; at shapes drawn at random
FAST_CASES = 2  # of each kernel, for --fast


@dataclass(frozen=True)
class Compiled:
    """One kernel, as one architecture gets it."""

    operator: str
    kernel: str
    labels: list[str]
    architecture: str
    config: dict[str, int]
    seconds: float = 0.0
    resources: Resources | None = None
    warps: int = 0  # that can be resident on an SM; 0: the kernel does not fit
    error: str = ""

    @property
    def spills(self) -> bool:
        return bool(self.resources and self.resources.spilled_bytes)


@dataclass(frozen=True)
class Job:
    """What is compiled once, for all the cases that launch it alike."""

    operator: str
    architecture: str
    case: Any  # a `launch.CompileCase`; it is not imported here, as Triton may be missing
    labels: list[str]

    def compiled(self, since: float, **found) -> Compiled:
        """What came of it, begun at a time of `time.monotonic`."""
        blocks = {name: value for name, value in self.case.constants.items() if name.startswith("BLOCK")}
        config = {**blocks, "num_warps": self.case.config.num_warps, "num_stages": self.case.config.num_stages}
        name, seconds = self.case.kernel.fn.__name__, time.monotonic() - since
        return Compiled(self.operator, name, self.labels, self.architecture, config, seconds, **found)


def jobs(architectures: list[str], names: list[str], fast: bool, shapes: list | None = None) -> list[Job]:
    """Everything to compile; equal launches once. `names` select by substring of operator, kernel or label."""
    found: dict[tuple, Job] = {}
    for operator, group in groupby(shapes or standard_shapes(), key=lambda shape: shape.operator):
        group = list(group)
        for architecture in architectures:
            counts: Counter[str] = Counter()
            for case in cases_of(group, architecture):
                kernel = case.kernel.fn.__name__
                if names and not any(n.lower() in f"{operator} {kernel} {case.label}".lower() for n in names):
                    continue
                key = architecture, operator, repr(replace(case, label="", divisible=(), grid=()))
                if key in found:
                    found[key].labels.append(case.label)
                    continue
                counts[kernel] += 1
                if not fast or counts[kernel] <= FAST_CASES:
                    found[key] = Job(operator, architecture, case, [case.label])
    return list(found.values())


def compile_job(job: Job) -> Compiled:
    """Compile, and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case, target = job.case, GPUTarget(*TARGETS[job.architecture])
    divisible = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.kernel, case.signature, case.constants, divisible)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    start = time.monotonic()
    try:
        compiled = triton.compile(source, target=target, options=options)
        done = job.compiled(start)
        found = resources(compiled, target.backend)
        return replace(done, resources=found, warps=resident_warps(found, case.config.num_warps, job.architecture))
    except Exception as problem:
        lines = (line for line in str(problem).splitlines() if line.strip())
        return job.compiled(start, error=next(lines, type(problem).__name__)[:160])


def _work(jobs: list[Job], connection: Connection, messages: int) -> None:
    """In a process of its own: compile the jobs whose indices arrive. What LLVM says goes into a file."""
    os.dup2(messages, 2)
    while True:
        index = connection.recv()
        os.ftruncate(messages, 0)
        connection.send(compile_job(jobs[index]))


class _Worker:
    """A forked process that compiles, because kernels cannot be pickled and a compiler's abort ends its process."""

    def __init__(self, jobs: list[Job]):
        self.jobs, self.index, self.start = jobs, 0, 0.0
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115 -- it lives as long as the worker
        fork = multiprocessing.get_context("fork")
        self.connection, theirs = fork.Pipe()
        self.process = fork.Process(target=_work, args=(jobs, theirs, self.messages.fileno()), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, index: int) -> None:
        self.index, self.start = index, time.monotonic()
        self.connection.send(index)

    def take(self) -> Compiled:
        """What became of the job; if the process is no more, why."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
        code = self.process.exitcode
        self.messages.seek(0)
        said = re.search(r"LLVM ERROR.*|Assertion.*failed", self.messages.read().decode(errors="replace"))
        died = f"the compiler died of {signal.Signals(-code).name}" if code < 0 else f"the compiler exited with {code}"
        return self.jobs[self.index].compiled(self.start, error=(died + (f": {said[0]}" if said else ""))[:240])


def compile_all(work: list[Job], processes: int, errors: Console) -> list[Compiled]:
    """In the order of `work`. A job that kills its process is an error of that job alone."""
    found: dict[int, Compiled] = {}
    busy: dict[Connection, _Worker] = {}
    waiting = iter(range(len(work)))
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("compiling", total=len(work))
        idle = [_Worker(work) for _ in range(min(processes, len(work)))]
        while len(found) < len(work):
            for worker in idle:
                if (index := next(waiting, None)) is None:
                    worker.process.kill()
                else:
                    worker.give(index)
                    busy[worker.connection] = worker
            idle = []
            for worker in [busy.pop(connection) for connection in wait(busy)]:
                found[worker.index] = worker.take()
                progress.advance(task)
                idle.append(worker if worker.process.exitcode is None else _Worker(work))
        for worker in idle:
            worker.process.kill()
    return [found[index] for index in range(len(work))]


def make_table(found: list[Compiled], console: Console) -> Table:
    header = ["kernel", "GPU", "regs", "spilled B", "shared B", "warps", "first case (of how many)", "configuration"]
    header += ["matrix instr.", "s"]
    lines = []
    for one in found:
        label = one.labels[0] + (f" ({len(one.labels)})" if len(one.labels) > 1 else "")
        config = " ".join(f"{name.removeprefix('num_')} {value}" for name, value in one.config.items())
        measured, matrix = ["", "", "", "[red]–[/red]"], ""
        if r := one.resources:
            registers, spilled = ("–" if n is None else str(n) for n in (r.registers, r.spilled_bytes))
            matrix = "–" if r.matrix is None else " ".join(f"{n} {c}" for n, c in r.matrix.items())
            spilled = f"[red]{spilled}[/red]" if one.spills else spilled
            measured = [registers, spilled, str(r.shared_bytes), str(one.warps or "[red]none[/red]")]
        lines.append([one.kernel, one.architecture, *measured, label, config, matrix, f"{one.seconds:.1f}"])
    return fitted(header, lines, console, "kernels as compiled")


def fault(one: Compiled, tolerated: int) -> str:
    """What is wrong with it, if anything is; `tolerated` bytes may be spilled, and any number where not TUNED."""
    if one.error:
        return one.error
    if one.architecture in TUNED and one.spills and one.resources.spilled_bytes > tolerated:
        return f"spills {one.resources.spilled_bytes} bytes"
    return "" if one.warps else "does not fit"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compile",
        description="Registers, spills, shared memory, occupancy and matrix instructions of every kernel. Exit code 1 "
        f"if a kernel does not compile or does not fit, or spills on {' or '.join(TUNED)}.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only modules, kernels or cases that contain one")
    short = [name.removeprefix("sm_") for name in TARGETS]
    help_arch = f"{', '.join(TARGETS)}; commas or repeated; default: all"
    parser.add_argument("--arch", type=several([*TARGETS, *short]), action="extend", help=help_arch)
    parser.add_argument(
        "--random", type=positive(int), metavar="N", help="N shapes of all operators instead, drawn at random, for "
        f"{' and '.join(TUNED)}"
    )  # fmt: skip
    parser.add_argument(
        "--tolerate", type=int, metavar="BYTES",
        help=f"that a thread may spill; default: {SPILL}, for random shapes {ODD_SPILL}",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of --random; default: 0")
    parser.add_argument("--fast", action="store_true", help=f"for CI: {' and '.join(TUNED)}, {FAST_CASES} of a kernel")
    parser.add_argument("--jobs", type=positive(int), default=max(1, (os.cpu_count() or 1) // 2), help="processes")
    parser.add_argument("--json", type=new_file, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 for a spill where that is an error."""
    options = parse(arguments)
    needs_compiled_kernels()
    console, errors = Console(highlight=False), Console(stderr=True)
    if not console.is_terminal:
        console.width = max(console.width, 170)
    architectures = [name if name in TARGETS else f"sm_{name}" for name in options.arch or ()]
    architectures = architectures or list(TUNED if options.fast or options.random else TARGETS)
    shapes, tolerated = None, SPILL if options.tolerate is None else options.tolerate
    if options.random:
        shapes = random_shapes(options.random, options.seed)
        tolerated = ODD_SPILL if options.tolerate is None else options.tolerate
        print("\n".join(f"{shape.operator}: {shape.label}" for shape in shapes))
    work = jobs(architectures, options.names, options.fast, shapes)
    if not work:
        if options.names:
            raise BadInput(f"no kernel has a case like {', '.join(options.names)}")
        return 0
    with tempfile.TemporaryDirectory() as cache:  # what Triton has in its cache would take no time
        os.environ["TRITON_CACHE_DIR"] = cache
        found = compile_all(work, options.jobs, errors)
    console.print(make_table(found, console))
    for note in missing_tools():
        print(note)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1))
    bad = [one for one in found if fault(one, tolerated)]
    for one in bad:
        print(f"{one.architecture} {one.kernel} {one.labels[0]}: {fault(one, tolerated)}")
    print(f"{len(found)} compiled, {len(bad)} spilling, failing or not fitting")
    return 1 if bad else 0
