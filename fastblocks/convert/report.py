"""What `convert` did."""

import weakref
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Row:
    """A block: where it is, its class, whether it was swapped, and why or how; `speed`: why it is no faster now."""

    path: str
    name: str
    swapped: bool
    reason: str
    speed: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """A row a block of a known name; printed as a table, and below it where converting does not pay."""

    rows: tuple[Row, ...]

    @property
    def swapped(self) -> list[str]:
        """Paths of the blocks that were swapped."""
        return [row.path for row in self.rows if row.swapped]

    @property
    def left(self) -> dict[str, str]:
        """Paths of the blocks that were left alone, and why."""
        return {row.path: row.reason for row in self.rows if not row.swapped}

    def __str__(self) -> str:
        cells = [("block", "class", "", "")]
        cells += [
            (row.path or "(itself)", row.name, "swapped" if row.swapped else "left", row.reason) for row in self.rows
        ]
        widths = [max(len(row[column]) for row in cells) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in cells
        ]
        lines += dict.fromkeys(f"no faster here, {row.name}: {row.speed}" for row in self.rows if row.speed)
        return "\n".join(lines) if self.rows else "no block of a known name"


_reports: "weakref.WeakKeyDictionary[nn.Module, ConversionReport]" = weakref.WeakKeyDictionary()


def remember(model: nn.Module, report: ConversionReport) -> None:
    _reports[model] = report


def conversion_report(model: nn.Module) -> ConversionReport:
    """What the last `convert` of this model swapped, what it left alone, and why; print it for a table.

    Args:
        model: what `convert` returned.

    Raises:
        ValueError: if it was not converted in this process.
    """
    if model not in _reports:
        raise ValueError(f"this {type(model).__name__} is not the result of fastblocks.convert in this process")
    return _reports[model]
