"""Who computes a workload: the original formulas, this package, both also compiled, this package also in a CUDA graph,
and rivals.

Rivals are the strongest that there are for one operation each; whoever is missing is skipped by name.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

import fastblocks
from benchmarks import original
from benchmarks.providers.graph import GraphRunner
from benchmarks.providers.rivals import BlockDiagonal, FlashRNN, flex_attention, liger
from benchmarks.providers.runner import Runner, Skipped, make_runner
from benchmarks.workloads.workload import Workload

OWN = ("baseline", "compile", "fastblocks", "fastblocks-compile", "fastblocks-graph")
BASELINE, COMPILE, FASTBLOCKS, OURS_COMPILED, GRAPH = OWN
RIVALS = ("flex", "block-diagonal", "flashrnn", "max-autotune", "liger")
PROVIDERS = (*OWN, *RIVALS)
PACKAGES = {"flashrnn": "flashrnn", "liger": "liger_kernel"}  # what has to be installed
GPU_ONLY = {
    GRAPH: "CUDA graphs need a GPU",
    "max-autotune": "max-autotune chooses among GPU kernels",
    "flashrnn": "FlashRNN needs a GPU",
    "liger": "Liger's kernels need a GPU",
}


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
        dtype: a key of `runner.DTYPES`.
        compiler: torch.compile's backend; tests take one that needs no time.

    Raises:
        Skipped: with the reason, if it is not installed or cannot run here.
    """
    if provider in PACKAGES and find_spec(PACKAGES[provider]) is None:
        raise Skipped(f"{PACKAGES[provider].replace('_', '-')} is not installed")
    if device.type != "cuda" and provider in GPU_ONLY:
        raise Skipped(GPU_ONLY[provider])
    make, details = partial(make_runner, workload, device=device, dtype=dtype), workload.rivals.get(provider, {})
    if provider == FASTBLOCKS:
        return make(fastblocks)
    if provider == GRAPH:
        return GraphRunner(make(fastblocks))
    if provider == OURS_COMPILED:
        return make(fastblocks, wrap=compiled(backend=compiler))
    wrap = {
        BASELINE: lambda call: call,
        COMPILE: compiled(backend=compiler),
        "max-autotune": compiled(mode="max-autotune"),
        "flex": lambda _: flex_attention(device=device, compiler=compiler, **details),
        "liger": lambda _: liger(**details),
        "block-diagonal": lambda layers: BlockDiagonal(layers).to(device),
        "flashrnn": lambda layers: FlashRNN(layers).to(device),
    }[provider]
    runner = make(original, wrap=wrap)
    if provider == "max-autotune":
        runner.before_call = torch.compiler.cudagraph_mark_step_begin
    if provider in ("block-diagonal", "flashrnn"):
        runner.foreign, runner.weights = True, list(runner.call.parameters())  # the same weights in its own layout
    return runner


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
