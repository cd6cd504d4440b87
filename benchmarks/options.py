"""What the command lines share. What is wrong with the input is one line on stderr and exit code 2."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Number = TypeVar("Number", int, float)


class BadInput(ValueError):
    """A command was asked for what it cannot do; the message says why, in one line."""


@contextmanager
def files_named() -> Iterator[None]:
    """What the operating system refuses is BadInput that names the file."""
    try:
        yield
    except OSError as problem:
        raise BadInput(f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem)) from problem


def positive(kind: Callable[[str], Number]) -> Callable[[str], Number]:
    """For argparse's `type`: a positive number."""

    def convert(text: str) -> Number:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


def several(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse's `type`, beside action="extend": values with commas between them."""

    def convert(text: str) -> list[str]:
        found = [value for value in text.split(",") if value]
        for value in found:
            if value not in choices:
                raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(choices)}")
        return found

    return convert


def new_file(text: str) -> Path:
    """For argparse's `type`: a file in a folder that exists, or that folder; nothing shall be measured in vain."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    return path


def needs_compiled_kernels() -> None:
    """Raises BadInput where kernels cannot be compiled."""
    try:
        from fastblocks.kernels.runtime import INTERPRETED
    except ImportError as problem:
        raise BadInput(f"Triton cannot be imported: {problem}") from None
    if INTERPRETED:
        raise BadInput("TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled")
