"""What the compiler makes of the kernels: the report, and cases that once did not compile, fit or keep to registers."""

import faulthandler
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.aot import cases, compiling
from fastblocks.kernels import runtime
from fastblocks.kernels.attention import operator as attention
from fastblocks.kernels.recurrent import config as recurrent

ROOT = Path(__file__).parents[2]


def run_python(*arguments):
    """Compiling needs a process in which kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTBLOCKS_BACKEND")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )


ONCE_WRONG = {
    "80": [
        "att-registers gates fp16: grad_query",  # spilled 56 bytes a thread
        "rnn-freq LSTM bf16: grouped_rnn_backward",  # spilled 8 bytes a thread
        "rnn-64 LSTM bf16: grouped_rnn_forward",  # unrolled, spilled 24 bytes a thread
        "cnx-1d stride 1 bf16: conv",  # spilled 8 bytes a thread
        "rnn-wide LSTM bf16 with a state: grouped_rnn_backward",  # needed 164 KB of shared memory, and there are 163
    ],
    "90": [
        "att-freq fp32 tf32: short_backward",  # Triton had no shared layout for a rotated operand
        "att-forty fp32: short_backward",  # spilled 624 bytes a thread
        "rnn-freq LSTM fp32: grouped_rnn_forward",  # LLVM aborted in Triton 3.9
        "rnn-packed GRU bf16 with a state: grouped_rnn_backward",  # four groups in a tile spilled 3.4 KB a thread
        "rnn-freq GRU bf16 with a state: grouped_rnn_backward",  # spilled 32 bytes a thread
        "rnn-packed LSTM bf16: grouped_rnn_backward",  # spilled 8 bytes a thread in two warps
        "rnn-64 LSTM fp32 with a state: recurrent_weight_gradient",  # spilled 336 bytes a thread
    ],
}


@pytest.mark.parametrize("architecture", ONCE_WRONG)
def test_compiles_without_a_spill_and_fits(tmp_path, architecture):
    file, names = tmp_path / "compiled.json", ONCE_WRONG[architecture]
    done = run_python("-m", "benchmarks", "compile", *names, "--arch", architecture, "--jobs", "1", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    labels = [label for one in json.loads(file.read_text()) for label in one["labels"]]
    assert all(any(name in label for label in labels) for name in names)


def test_a_compiler_that_aborts_is_an_error_of_its_case(monkeypatch):
    class Job:
        def __init__(self, number):
            self.number = number

        def compiled(self, since, error):
            return compiling.Compiled("", "", [], "sm_90", {}, error=error)

    def compile_job(job):
        if job.number % 2:
            faulthandler.disable()  # pytest's would print this process's stack
            os.write(2, b"LLVM ERROR: no such layout\n")
            os.abort()
        return job.compiled(0.0, error=str(job.number))

    monkeypatch.setattr(compiling, "compile_job", compile_job)
    for processes in (1, 2):
        found = compiling.compile_all([Job(number) for number in range(5)], processes, Console(quiet=True))
        errors = [one.error for one in found]
        assert errors[::2] == ["0", "2", "4"]
        assert all("SIGABRT" in error and "LLVM ERROR" in error for error in errors[1::2])


@pytest.mark.parametrize(
    ("architecture", "float32", "hidden"),
    [("sm_80", False, 128), ("sm_89", False, 64), ("sm_89", True, 64), ("gfx942", True, 32), ("sm_131", False, 64)],
)
def test_hidden_sizes_follow_the_shared_memory(architecture, float32, hidden):
    """An architecture that nobody has heard of counts as the smallest."""
    assert recurrent.largest_hidden(architecture, float32) == hidden


def test_every_architecture_of_the_report_has_a_size():
    assert all(name in runtime.SHARED_KIB for name in compiling.TARGETS)
    assert runtime.shared_memory("sm_131") == runtime.shared_memory("sm_89")
    assert runtime.shared_memory("gfx1300") == runtime.shared_memory("gfx942")


@pytest.mark.parametrize(("head_dim", "most"), [(8, 64), (24, 64), (64, 32), (72, 16), (128, 16), (136, 0), (256, 0)])
def test_registers_that_do_not_fit_step_aside(head_dim, most):
    qkv, rope = torch.zeros(1, 3, 3 * head_dim), torch.zeros(100, head_dim // 2, 2)
    for registers in (most, most + 1):
        reason = attention.unsupported_reason(
            qkv, rope, 1, (-1, -1), torch.zeros(1, registers, 3 * head_dim), False, None
        )
        assert bool(reason) == (registers > most)
        assert not reason or (str(registers) in reason and str(head_dim) in reason)


@pytest.mark.parametrize(("architecture", "runs"), [("sm_75", False), ("sm_80", True), ("sm_120", True)])
def test_gpus_that_triton_does_not_support_step_aside(monkeypatch, architecture, runs):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(runtime, "architecture", lambda device: architecture)
    reason = runtime.unsupported_reason(torch.device("cuda"))
    assert bool(reason) != runs and (runs or architecture in reason)


SWITCHES = """
import itertools, torch
from fastblocks.kernels.runtime import allows_tf32

matmul = torch.backends.cuda.matmul
new = hasattr(matmul, "fp32_precision")

def legacy(value): matmul.allow_tf32 = value
def precision(value): torch.set_float32_matmul_precision(value)
def operation(value): matmul.fp32_precision = value
def everything(value): torch.backends.fp32_precision = value

settings = [(legacy, True, True), (legacy, False, False), (precision, "high", True), (precision, "medium", True),
            (precision, "highest", False)]
if new:
    settings += [(operation, "tf32", True), (operation, "ieee", False), (everything, "tf32", None),
                 (everything, "ieee", None)]
assert allows_tf32() is False
for chosen in itertools.permutations(settings, 2):
    if new:
        operation("none"), everything("none")
    for set_it, value, expected in chosen:
        set_it(value)
        before = matmul.fp32_precision if new else None
        found = allows_tf32()
        assert found is (before == "tf32" if expected is None else expected), (chosen, set_it, value, found)
        assert not new or matmul.fp32_precision == before
if new:
    operation("none"), everything("tf32")
    assert allows_tf32()
    everything("ieee")
    assert not allows_tf32()
print("done")
"""


def test_tf32_is_read_from_whichever_switch_was_set():
    done = run_python("-c", SWITCHES)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_of_a_pytorch_with_one_switch(monkeypatch, allowed):
    class Matmul:
        allow_tf32 = allowed

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    assert runtime.allows_tf32() is allowed


def test_both_families_read_tf32_in_one_place(monkeypatch):
    from fastblocks.kernels.attention.config import plan_of
    from fastblocks.kernels.recurrent.forward import precision_of

    qkv = torch.zeros(1, 4, 48)
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        monkeypatch.setattr(runtime, "allows_tf32", lambda allowed=allowed: allowed)
        assert plan_of(qkv, 1, -1, None, False).configs["short_forward"]["PRECISION"] == precision
        assert precision_of(qkv, torch.float32)["PRECISION"] == precision
        assert precision_of(qkv, torch.bfloat16)["PRECISION"] == "ieee"


RECORDED = """
import torch
from benchmarks.aot import cases

shapes = cases.random_shapes(6 * len(cases.OPERATORS), seed=5)
for operator in cases.OPERATORS:
    ours = [shape for shape in shapes if shape.operator == operator]
    assert len(ours) == 6 and len(list(cases.cases_of(ours, "sm_90"))) > len(ours), operator
products = [shape for shape in cases.random_shapes(40 * len(cases.OPERATORS), seed=0) if shape.tf32]
assert products and all(shape.arguments[0].dtype == torch.float32 for shape in products)

def precisions(shapes):
    return {case.constants.get("PRECISION") for case in cases.cases_of(shapes, "sm_90")}

for operator in cases.PRODUCTS:  # attention and recurrences have sizes that stay exact, or go to PyTorch
    assert "tf32" in precisions([shape for shape in products if shape.operator == operator][:8]), operator
exact = [shape for shape in shapes if shape.operator in cases.PRODUCTS and not shape.tf32]
assert precisions(exact) == {"ieee", None}, precisions(exact)
assert torch.get_float32_matmul_precision() == "highest"
print("done")
"""


def test_odd_shapes_are_drawn_by_a_seed_and_recorded():
    labels = [[shape.label for shape in cases.random_shapes(24, seed)] for seed in (5, 5, 6)]
    assert labels[0] == labels[1] != labels[2]
    done = run_python("-c", RECORDED)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr


def test_random_report(tmp_path):
    file = tmp_path / "compiled.json"
    options = ("--random", "4", "--seed", "3", "--arch", "90", "--json", str(file))
    done = run_python("-m", "benchmarks", "compile", "grouped_rnn", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {one["operator"] for one in json.loads(file.read_text())} == {"grouped_rnn"}
