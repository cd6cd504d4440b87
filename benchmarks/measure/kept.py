"""`python -m benchmarks kept`: how much memory a training step keeps between forward and backward; no GPU needed.

What autograd saves is counted by storage, without parameters, buffers and inputs: of the original formulas on this CPU
under autocast to bfloat16, of the same as torch.compile partitions them, and of this package as on a GPU (kernels are
not launched, so values are not computed). A library's kernels on a GPU may keep other tensors than those on a CPU. It
is not the peak: neither inputs of operations that are still running are in it, nor what a backward pass allocates for
itself. A block's MLP, where it stores its hidden units' gradients or the library multiplies, takes 3 F numbers a row
more than it kept, one block at a time.
"""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from torch import nn

import fastblocks
from benchmarks import original, workloads
from benchmarks.measure.host import as_on_a_gpu
from benchmarks.options import needs_compiled_kernels
from benchmarks.report.table import fitted

PARTITION = "aot_eager_decomp_partition"  # what inductor keeps, without its C++
NAMES = ("att-time-block", "att-long-block", "rnn-time-block", "rnn-time-lstm-block", "model-roformer", "model-rnn")


def kept_bytes(call: Callable, *inputs: torch.Tensor) -> int:
    """What a call keeps for backward, in bytes."""
    known = {t.untyped_storage().data_ptr() for t in inputs}
    if isinstance(call, nn.Module):
        known |= {t.untyped_storage().data_ptr() for t in (*call.parameters(), *call.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets this address
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(inputs[0].device.type, torch.bfloat16),
    ):
        results = call(*inputs)
    total = sum(storage.nbytes() for storage in kept.values())
    del results
    return total


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kept", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=("full", "cpu", "toy"), default="cpu", help="full needs 20 GB")
    size = parser.parse_args(arguments).size
    needs_compiled_kernels()
    lines = []
    for workload in (w for w in workloads.all_workloads(size) if w.name in NAMES):
        torch.manual_seed(0)
        modules = [workload.build(kit) for kit in (original, fastblocks)]
        inputs = workload.inputs(torch.Generator().manual_seed(0))[:1]
        theirs, ours = (getattr(module, "model", module) for module in modules)  # of a GAN: the generator
        before = kept_bytes(theirs, *inputs)
        with as_on_a_gpu(lambda *launched: None):
            after = kept_bytes(ours, *inputs)
        compiled = kept_bytes(torch.compile(theirs, backend=PARTITION), *inputs)
        cells = [f"{size / 1e6:.1f}" for size in (before, compiled, after)]
        lines.append([workload.name, *cells, f"{100 * after / before:.0f} %", workload.shape])
    header = ["workload", "original", "compile", "fastblocks", "of the original", "shape"]
    console = Console()
    console.print(fitted(header, lines, console, "kept for backward, MB"))
    return 0
