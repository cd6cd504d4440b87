"""Who computes a workload: the original formulas, the same compiled, this package, also in a CUDA graph, and rivals.

Rivals are the strongest that there are for one operation each; whoever is missing is skipped by name.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import fastblocks
from benchmarks import original
from benchmarks.providers.attention import flex_attention
from benchmarks.providers.graph import GraphRunner
from benchmarks.providers.recurrent import BlockDiagonal, FlashRNN
from benchmarks.providers.rows import liger
from benchmarks.providers.runner import Runner, make_runner
from benchmarks.providers.skipped import Skipped
from benchmarks.workloads.workload import Workload

BASELINE, COMPILE, FASTBLOCKS, GRAPH = OWN = ("baseline", "compile", "fastblocks", "fastblocks-graph")
RIVALS = ("flex", "block-diagonal", "flashrnn", "max-autotune", "liger")
PROVIDERS = (*OWN, *RIVALS)


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
    if device.type != "cuda" and provider in (GRAPH, "max-autotune"):
        raise Skipped({GRAPH: "CUDA graphs need a GPU"}.get(provider, "max-autotune chooses among GPU kernels"))
    make = partial(make_runner, workload, device=device, dtype=dtype)
    if provider == BASELINE:
        return make(original)
    if provider == COMPILE:
        return make(original, wrap=compiled(backend=compiler))
    if provider == FASTBLOCKS:
        return make(fastblocks)
    if provider == GRAPH:
        return GraphRunner(make(fastblocks))
    details = workload.rivals[provider]
    if provider == "max-autotune":
        runner = make(original, wrap=compiled(mode="max-autotune"))
        runner.before_call = torch.compiler.cudagraph_mark_step_begin
        return runner
    if provider == "flex":
        return make(original, wrap=lambda _: flex_attention(device=device, compiler=compiler, **details))
    if provider == "liger":
        return make(original, wrap=lambda _: liger(device, **details))
    if provider == "flashrnn":
        FlashRNN.check(device, details["kind"], details["channels"] // details["groups"])
    rival = {"block-diagonal": BlockDiagonal, "flashrnn": FlashRNN}[provider]
    runner = make(original, wrap=lambda layers: rival(layers, **details).to(device))
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
