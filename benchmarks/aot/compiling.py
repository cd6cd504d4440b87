"""`python -m benchmarks compile`: what the compiler makes of every kernel, for GPUs that need not be there.

An operator takes part by being declared; its shapes stand in `cases`.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import groupby
from multiprocessing.connection import Connection, wait
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.aot.cases import cases_of, random_shapes, standard_shapes
from benchmarks.aot.machine_code import Resources, missing_tools, resident_warps, resources

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
    labels: tuple[str, ...]
    architecture: str
    config: dict[str, int]
    seconds: float
    resources: Resources | None
    warps: int  # that can be resident on an SM; 0: the kernel does not fit
    error: str = ""

    @property
    def spills(self) -> bool:
        return bool(self.resources and self.resources.spilled_bytes)


@dataclass(frozen=True)
class Job:
    """What is compiled once, for all the cases that launch it alike."""

    operator: str
    kernel: object
    signature: dict
    constants: dict
    config: object
    architecture: str
    divisible: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def jobs(architectures: list[str], names: list[str], fast: bool, shapes: list | None = None) -> list[Job]:
    """Everything to compile; equal launches once. `names` select by substring of operator, kernel or label."""
    found: dict[tuple, Job] = {}
    for operator, group in groupby(shapes or standard_shapes(), key=lambda shape: shape.operator):
        group = list(group)
        for architecture in architectures:
            counts: dict[str, int] = {}
            for case in cases_of(group, architecture):
                job = Job(
                    operator, case.kernel, case.signature, case.constants, case.config, architecture, case.divisible,
                    (case.label,),
                )  # fmt: skip
                if names and not any(n.lower() in f"{operator} {job.name} {case.label}".lower() for n in names):
                    continue
                key = (architecture, operator, job.name, repr(sorted(case.signature.items())), repr(case.config))
                key += (repr(sorted(case.constants.items(), key=lambda item: item[0])),)
                if key in found:
                    old = found[key]
                    found[key] = Job(*(getattr(old, f) for f in list(vars(old))[:-1]), (*old.labels, case.label))
                    continue
                counts[job.name] = counts.get(job.name, 0) + 1
                if not fast or counts[job.name] <= FAST_CASES:
                    found[key] = job
    return list(found.values())


def compile_job(job: Job) -> Compiled:
    """Compile, and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, lanes = TARGETS[job.architecture]
    signature = {name: job.signature.get(name, "constexpr") for name in job.kernel.arg_names}
    constants = {(job.kernel.arg_names.index(name),): value for name, value in job.constants.items()}
    for name, kind in signature.items():
        if kind == "constexpr":
            constants.setdefault((job.kernel.arg_names.index(name),), None)
    source = ASTSource(job.kernel, signature, constants, attributes(job, signature))
    options = {"num_warps": job.config.num_warps, "num_stages": job.config.num_stages}
    start, found, warps, error = time.monotonic(), None, 0, ""
    try:
        compiled = triton.compile(source, target=GPUTarget(backend, architecture, lanes), options=options)
        seconds = time.monotonic() - start
        found = resources(compiled, backend)
        warps = resident_warps(found, job.config.num_warps, job.architecture)
    except Exception as problem:
        seconds = time.monotonic() - start
        error = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)[:160]
    config = configuration(job)
    return Compiled(job.operator, job.name, job.labels, job.architecture, config, seconds, found, warps, error)


def configuration(job: Job) -> dict[str, int]:
    """Tile sizes, warps and stages."""
    blocks = {name: value for name, value in job.constants.items() if name.startswith("BLOCK")}
    return {**blocks, "num_warps": job.config.num_warps, "num_stages": job.config.num_stages}


def attributes(job: Job, signature: dict) -> dict:
    """What a launch finds out: pointers and integers that are multiples of 16."""
    return {(job.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in job.divisible}


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
        self.jobs, self.index, self.start = jobs, None, 0.0
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115 -- it lives as long as the worker
        fork = multiprocessing.get_context("fork")
        self.connection, theirs = fork.Pipe()
        self.process = fork.Process(target=_work, args=(jobs, theirs, self.messages.fileno()), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, index: int) -> None:
        self.index, self.start = index, time.monotonic()
        self.connection.send(index)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def take(self) -> Compiled:
        """What became of the job; if the process is no more, why."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
        job, code = self.jobs[self.index], self.process.exitcode
        self.messages.seek(0)
        text = self.messages.read().decode(errors="replace")
        said = re.search(r"LLVM ERROR.*|Assertion.*failed", text)
        died = f"the compiler died of {signal.Signals(-code).name}" if code < 0 else f"the compiler exited with {code}"
        error = died + (f": {said[0]}" if said else "")
        config = configuration(job)
        seconds = time.monotonic() - self.start
        return Compiled(job.operator, job.name, job.labels, job.architecture, config, seconds, None, 0, error[:240])


def compile_all(work: list[Job], processes: int, errors: Console) -> list[Compiled]:
    """In the order of `work`. A job that kills its process is an error of that job alone."""
    found: dict[int, Compiled] = {}
    waiting = iter(range(len(work)))
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("compiling", total=len(work))
        workers = [_Worker(work) for _ in range(min(processes, len(work)))]
        for worker in workers:
            worker.give(next(waiting))
        while workers:
            for connection in wait([worker.connection for worker in workers]):
                i = next(i for i, worker in enumerate(workers) if worker.connection is connection)
                found[workers[i].index] = workers[i].take()
                progress.advance(task)
                following = next(waiting, None)
                if following is None:
                    workers.pop(i).stop()
                    continue
                if workers[i].process.exitcode is not None:
                    workers[i] = _Worker(work)
                workers[i].give(following)
    return [found[index] for index in range(len(work))]


def make_table(found: list[Compiled]) -> Table:
    columns = ["kernel", "first case (of how many)", "GPU", "configuration", "regs", "spilled B", "shared B", "warps"]
    columns += ["matrix instr.", "s"]
    table = Table(title="kernels as compiled", title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i > 3 else "left", overflow="fold", no_wrap=i in (2, 4, 5, 6, 7, 9))
    for one in found:
        label = one.labels[0] + (f" ({len(one.labels)})" if len(one.labels) > 1 else "")
        config = " ".join(f"{name.removeprefix('num_')} {value}" for name, value in one.config.items())
        head = [one.kernel, label, one.architecture, config]
        if one.error:
            table.add_row(*head, "", "", "", "", f"[red]{one.error}[/red]", f"{one.seconds:.1f}")
            continue
        r = one.resources
        unknown = "–"
        spilled = unknown if r.spilled_bytes is None else str(r.spilled_bytes)
        matrix = " ".join(f"{n} {c}" for n, c in r.matrix.items()) if r.matrix is not None else unknown
        table.add_row(
            *head,
            unknown if r.registers is None else str(r.registers),
            f"[red]{spilled}[/red]" if one.spills else spilled,
            str(r.shared_bytes),
            str(one.warps) if one.warps else "[red]does not fit[/red]",
            matrix,
            f"{one.seconds:.1f}",
        )
    return table


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
    parser.add_argument("--arch", action="append", help=f"{', '.join(TARGETS)}; commas or repeated; default: all")
    parser.add_argument(
        "--random", type=int, metavar="N", help="N shapes of all operators instead, drawn at random, for "
        f"{' and '.join(TUNED)}"
    )  # fmt: skip
    parser.add_argument(
        "--tolerate", type=int, metavar="BYTES",
        help=f"that a thread may spill; default: {SPILL}, for random shapes {ODD_SPILL}",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of --random; default: 0")
    parser.add_argument("--fast", action="store_true", help=f"for CI: {' and '.join(TUNED)}, {FAST_CASES} of a kernel")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="processes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 for a spill where that is an error."""
    options = parse(arguments)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 170)
    try:
        import triton  # noqa: F401
    except ImportError as problem:
        errors.print(f"error: Triton cannot be imported: {problem}", markup=False)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        errors.print("error: TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled", markup=False)
        return 2
    architectures = [a for text in options.arch or () for a in text.split(",") if a]
    architectures = architectures or list(TUNED if options.fast or options.random else TARGETS)
    architectures = [a if a in TARGETS else f"sm_{a}" for a in architectures]
    if unknown := [a for a in architectures if a not in TARGETS]:
        errors.print(f"error: --arch {', '.join(unknown)}: there are {', '.join(TARGETS)}", markup=False)
        return 2
    if options.random is not None and options.random < 1:
        errors.print(f"error: --random must be positive, got {options.random}", markup=False)
        return 2
    if options.jobs < 1:
        errors.print(f"error: --jobs must be positive, got {options.jobs}", markup=False)
        return 2
    if options.json and not options.json.absolute().parent.is_dir():
        errors.print(f"error: --json {options.json}: there is no such folder", markup=False)
        return 2
    shapes, tolerated = None, SPILL if options.tolerate is None else options.tolerate
    if options.random:
        shapes = random_shapes(options.random, options.seed)
        tolerated = ODD_SPILL if options.tolerate is None else options.tolerate
        console.print("\n".join(f"{shape.operator}: {shape.label}" for shape in shapes), markup=False, soft_wrap=True)
    work = jobs(architectures, options.names, options.fast, shapes)
    if not work:
        errors.print(f"error: no kernel has a case like {', '.join(options.names) or 'this'}", markup=False)
        return 2 if options.names else 0
    with tempfile.TemporaryDirectory() as cache:  # what Triton has in its cache would take no time
        os.environ["TRITON_CACHE_DIR"] = cache
        found = compile_all(work, options.jobs, errors)
    console.print(make_table(found))
    for note in missing_tools():
        console.print(note, markup=False, soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1))
    bad = [one for one in found if fault(one, tolerated)]
    for one in bad:
        why = fault(one, tolerated)
        console.print(f"{one.architecture} {one.kernel} {one.labels[0]}: {why}", markup=False, soft_wrap=True)
    console.print(f"{len(found)} compiled, {len(bad)} spilling, failing or not fitting", markup=False)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
