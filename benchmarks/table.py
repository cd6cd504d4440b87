"""The table of results."""

from rich.table import Table

from benchmarks.measure import FUSED, ORIGINAL, Result
from benchmarks.timing import Timing


def duration(timing: Timing) -> str:
    """Median, and half the distance of the quartiles, in ms."""
    low, median, high = (1000 * value for value in timing.quartiles)
    digits = max(0, 2 - len(str(int(median))) + 1)
    return f"{median:.{digits}f} [dim]±{(high - low) / 2:.{digits}f}[/dim]"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}" if count >= 1e7 else f"{count / 1e6:.1f}"


def ratio(timings: dict[str, Timing]) -> str:
    """How many times faster the package is."""
    value = timings[ORIGINAL].median / timings[FUSED].median
    colour = "green" if value >= 1.05 else "red" if value < 0.95 else "default"
    return f"[{colour}]{value:.2f}×[/{colour}]"


def make_table(results: list[Result]) -> Table:
    """One row a case, the original beside this package."""
    table = Table(
        title="this package (new) beside the original formulas (old), the same weights",
        caption="ms: median ± half the distance of the quartiles; MB: peak of a training step; "
        "error: worst output against float64, relative to its largest value",
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("case", no_wrap=True)
    table.add_column("shape", overflow="fold", style="dim", max_width=30)
    for kind in ("forward", "training"):
        table.add_column(f"{kind}\nold ms", justify="right", no_wrap=True)
        table.add_column("\nnew ms", justify="right", no_wrap=True)
        table.add_column("\nratio", justify="right", no_wrap=True)
    table.add_column("MB\nold", justify="right", no_wrap=True)
    table.add_column("\nnew", justify="right", no_wrap=True)
    table.add_column("error\nold", justify="right", no_wrap=True)
    table.add_column("\nnew", justify="right", no_wrap=True)
    what = None
    for result in results:
        if what not in (None, result.case.what):
            table.add_section()
        what = result.case.what
        cells = [result.case.name, result.case.shape]
        for timings in (result.forward, result.training):
            cells += [duration(timings[ORIGINAL]), duration(timings[FUSED]), ratio(timings)]
        cells += [megabytes(result.peak[name]) for name in (ORIGINAL, FUSED)]
        cells += [f"{result.error[name]:.0e}" for name in (ORIGINAL, FUSED)]
        table.add_row(*cells)
    return table
