"""Who computes a workload: the original formulas, the same compiled, this package, also in a CUDA graph, and rivals."""

from collections.abc import Callable

import torch
from torch import nn

import fastblocks
from benchmarks import original, rivals
from benchmarks.rivals import Skipped
from benchmarks.runners import GraphRunner, Runner, make_runner
from benchmarks.workloads import Workload

EAGER, FUSED = "eager", "fused"
OWN = (EAGER, "compile", FUSED, "fused-graph")
PROVIDERS = (*OWN, *rivals.NAMES)


def belongs(provider: str, workload: Workload) -> bool:
    """Whether a provider can be asked for at all: a rival only where the workload names it."""
    return provider in OWN or provider in workload.rivals


def prepare(
    provider: str, workload: Workload, device: torch.device, dtype: str, compiler: str = "inductor"
) -> "Runner | GraphRunner":
    """A provider's runner.

    Args:
        provider: one of `PROVIDERS`.
        workload: one to which it belongs.
        device: where.
        dtype: a key of `runners.DTYPES`.
        compiler: torch.compile's backend; tests take one that needs no time.

    Raises:
        Skipped: with the reason, if it is not installed or cannot run here.
    """
    if provider == EAGER:
        return make_runner(workload, original, device, dtype)
    if provider == "compile":
        return make_runner(workload, original, device, dtype, wrap=compiled(backend=compiler))
    if provider == FUSED:
        return make_runner(workload, fastblocks, device, dtype)
    if provider == "fused-graph":
        if device.type != "cuda":
            raise Skipped("CUDA graphs need a GPU")
        return GraphRunner(make_runner(workload, fastblocks, device, dtype))
    if provider == "max-autotune":
        if device.type != "cuda":
            raise Skipped("max-autotune chooses among GPU kernels")
        runner = make_runner(workload, original, device, dtype, wrap=compiled(mode="max-autotune"))
        runner.before_call = torch.compiler.cudagraph_mark_step_begin
        return runner
    return rivals.build(provider, workload, device, dtype, compiler)


def reference(workload: Workload, device: torch.device, dtype: str) -> Runner:
    """The same values in float64: the original's formulas; where those would hold every pair of a long sequence's
    tokens, this package's plain path, which tests hold against them."""
    kit = fastblocks if workload.banded else original
    return make_runner(workload, kit, device, dtype, double=True)


def compiled(**options) -> Callable[[Callable], Callable]:
    """What compiles a callable; a module that names its parts is compiled part by part."""

    def wrap(call: Callable) -> Callable:
        torch._dynamo.reset()  # one workload's recompilation limit is none of the next one's
        if not isinstance(call, nn.Module):
            return torch.compile(call, dynamic=False, **options)
        for part in call.parts() if hasattr(call, "parts") and callable(call.parts) else [call]:
            part.compile(dynamic=False, **options)
        return call

    return wrap
