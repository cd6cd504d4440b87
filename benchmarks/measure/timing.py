"""Time and memory of two or more providers, sample by sample in turn."""

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import quantiles

import torch

Run = Callable[[], object]
# What the profiler has to say where a tensor older than it is released; that is none of the run's own memory.
OLDER_BLOCK = b"Memory block of unknown size"
LEAST, MAX_SAMPLES = 2, 50


def quartiles(samples: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else 3 * samples


def wall_clock(run: Run) -> float:
    """Seconds of one run on a CPU."""
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


class EventClock:
    """Seconds of one run on a GPU, from event to event, with a cold L2 cache.

    The write that empties the cache takes longer than most launches, so the host is ahead when the first event passes.
    """

    def __init__(self):
        size = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(4 * size, dtype=torch.int8, device="cuda")

    def __call__(self, run: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000


def clock_of(device: torch.device) -> Callable[[Run], float]:
    return EventClock() if device.type == "cuda" else wall_clock


def interleaved(
    runs: dict[str, tuple[Run, Run]], seconds: float, clock: Callable[[Run], float] = wall_clock
) -> dict[str, list[float]]:
    """Seconds of runs in turn, A B B A A B …: whatever slows the machine down for a while slows all of them, and nobody
    always finds the memory as the same other one left it.

    Args:
        runs: name -> what to do before each run, outside its time, and what to time; each has run before.
        seconds: to spend; at least LEAST samples are taken of each.
        clock: measures one run, in seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for count in range(MAX_SAMPLES):
            if count >= LEAST and time.perf_counter() - start > seconds:
                break
            for name, (prepare, run) in list(runs.items())[:: -1 if count % 2 else 1]:
                prepare()
                samples[name].append(clock(run))
    finally:
        if collecting:
            gc.enable()
    return samples


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most bytes of tensors that are alive at one time during `run`, beyond those that were there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # PyTorch's CPU allocator keeps no peak; its profiler reports every allocation and release in order
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _stderr_without(OLDER_BLOCK), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = run()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


@contextmanager
def _stderr_without(message: bytes) -> Iterator[None]:
    """Lines with `message` do not reach stderr, whoever writes them; other lines do, at the end."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            os.write(2, b"".join(line for line in said if message not in line))
