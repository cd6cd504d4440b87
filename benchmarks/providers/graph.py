"""A provider in CUDA graphs."""

import torch
from torch import Tensor

from benchmarks.providers.runner import Runner


class GraphRunner:
    """The same in CUDA graphs: what remains of the host's work is one launch a call. One mode at a time is held."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self._mode = ""
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._results: list[Tensor | None] = []

    def __getattr__(self, name: str):
        return getattr(self.runner, name)

    def capture(self, mode: str) -> None:
        """Record a mode; what cannot be recorded raises."""
        self.release()
        runner, stream = self.runner, torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                runner.prepare(mode)
                runner.run(mode)
        torch.cuda.current_stream().wait_stream(stream)
        runner.release()
        runner.reset()
        graph, pool = torch.cuda.CUDAGraph(), None
        if mode == "backward":
            first = torch.cuda.CUDAGraph()
            with torch.cuda.graph(first):
                runner.prepare(mode)
            self._graphs, pool = [first], first.pool()
        with torch.cuda.graph(graph, pool=pool):
            self._results = runner.run(mode)
        self._graphs.append(graph)
        self._mode = mode

    def prepare(self, mode: str) -> None:
        if mode != self._mode:
            self.capture(mode)
        for graph in self._graphs[:-1]:
            graph.replay()

    def run(self, mode: str) -> list[Tensor | None]:
        if mode != self._mode:
            self.capture(mode)
        self._graphs[-1].replay()
        return self._results

    def release(self) -> None:
        self._graphs, self._results, self._mode = [], [], ""
        self.runner.release()
