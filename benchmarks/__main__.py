"""`python -m benchmarks`: this package beside the formulas that it replaces; its commands are in COMMANDS."""

import os
import sys
from importlib import import_module

from benchmarks.options import BadInput

# before PyTorch is loaded: the profiler that measures memory on a CPU would talk on stderr
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

COMMANDS = {  # name -> module, and what it does
    "train": ("benchmarks.train.cli", "train a small restoration model"),
    "compile": ("benchmarks.aot.compiling", "compile every kernel, without a GPU: registers, spills, …"),
    "tune": ("benchmarks.aot.tuning", "measure launch configurations on the GPU that is there"),
    "host": ("benchmarks.measure.host", "what an operation costs the CPU that launches it, without a GPU"),
    "kept": ("benchmarks.measure.kept", "what a training step keeps for its backward pass, without a GPU"),
    "report": ("benchmarks.report.cli", "draw the tables and plots in benchmarks/results from result files"),
}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    try:
        return run(arguments)
    except BadInput as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


def run(arguments: list[str]) -> int:
    """Find the command and run it; returns the exit code."""
    if arguments and arguments[0] in COMMANDS:
        return import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return import_module("benchmarks.measure.distributed").main(arguments)
    commands = "\n".join(f"  {name:9} {what}" for name, (_, what) in COMMANDS.items())
    commands = f"commands (each takes --help):\n{commands}\nunder torchrun: distributed training steps of the models"
    return import_module("benchmarks.run").main(arguments, commands)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
