"""`torchrun --nproc-per-node 2 -m benchmarks model-roformer`: training steps a second of all processes together."""

import argparse
import time
import warnings
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fastblocks
from benchmarks import original, workloads
from benchmarks.measure.environment import describe_device
from benchmarks.options import BadInput, positive, several
from benchmarks.providers import BASELINE, COMPILE, FASTBLOCKS, compiled
from benchmarks.providers.runner import DTYPES, make_runner
from benchmarks.workloads import models
from benchmarks.workloads.workload import Workload

PROVIDERS = (BASELINE, COMPILE, FASTBLOCKS)


class DistributedGan(models.Gan):
    """A `models.Gan` whose gradients are averaged over the processes.

    Args:
        gan: with its weights, where they stay.
    """

    def __init__(self, gan: models.Gan):
        super().__init__(gan.model, gan.critic)
        # buffers are each process's own: broadcasting them between two forwards would spoil the first's backward
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions have two arguments for this one
            model, critic = (DistributedDataParallel(part, broadcast_buffers=False) for part in self.parts())
        self._together = {"model": model, "critic": critic}  # not registered again: parameters keep their names

    def forward(self, mixture: Tensor, target: Tensor | None = None, *, judge: bool = False):
        if not judge:
            return self._together["model"](mixture)
        learns = next(self.critic.parameters()).requires_grad  # while the model learns, there is nothing to average
        return (self._together["critic"] if learns else self.critic)(mixture[:, None])


def steps_per_second(workload: Workload, provider: str, device: torch.device, dtype: str, count: int) -> list:
    """The rate of each of `count` steps, each process with its own batch, after two that are not counted."""
    kit = fastblocks if provider == FASTBLOCKS else original
    prepare = compiled() if provider == COMPILE else lambda gan: gan
    runner = make_runner(workload, kit, device, dtype, wrap=lambda gan: DistributedGan(prepare(gan)))
    generator = torch.Generator().manual_seed(dist.get_rank())
    runner.inputs = [torch.randn(t.shape, generator=generator).mul_(0.1).to(device) for t in runner.inputs]
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rates = []
    for index in range(count + 2):
        dist.barrier()
        sync()
        start = time.perf_counter()
        models.step(runner.call, runner.inputs)
        sync()
        dist.barrier()
        if index >= 2:
            rates.append(1 / (time.perf_counter() - start))
    return rates


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m benchmarks", description="Distributed training steps a second."
    )
    parser.add_argument("names", nargs="+", metavar="MODEL", help="model, model-roformer, model-rnn, model-unet")
    parser.add_argument("--size", choices=workloads.SIZES, default="full")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16, on a CPU fp32")
    parser.add_argument("--provider", type=several(PROVIDERS), action="extend", help=", ".join(PROVIDERS))
    parser.add_argument("--steps", type=positive(int), default=20)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code; the first process prints."""
    options = parse(arguments)
    chosen = workloads.select(options.size, options.names)
    if other := [w.name for w in chosen if w.step is not models.step]:
        raise BadInput(f"{', '.join(other)}: only models (model-roformer, …) are measured under torchrun")
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dtype = options.dtype or ("bf16" if cuda else "fp32")
    table = Table("workload", "dtype", "provider", "processes", "steps/s")
    try:
        for workload in chosen:
            for provider in options.provider or PROVIDERS:
                rates = steps_per_second(workload, provider, device, dtype, options.steps)
                table.add_row(workload.name, dtype, provider, str(size), f"{median(rates):.3g}")
        if rank == 0:
            print(describe_device())
            Console(highlight=False).print(table)
    finally:
        dist.destroy_process_group()
    return 0
