"""The table of the standard workloads, from the rows of a result file."""

from collections.abc import Iterable
from itertools import groupby

from rich.markup import escape
from rich.table import Table

OURS = ("fused", "fused-graph")
REFERENCE = "eager"


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            scaled = value * scale
            return f"{scaled:.{max(0, 2 - len(str(int(scaled))) + 1)}f} {unit}"
    raise AssertionError


def comparison(rows: Iterable[dict]) -> dict[str, dict]:
    """Of one workload, mode and dtype: provider -> row, the timed ones, with `to_eager` and `to_rival` added.

    Both say how many times faster; the rival is the fastest that is neither eager nor this package.
    """
    timed = {row["provider"]: dict(row) for row in rows if "median" in row}
    eager = timed.get(REFERENCE, {}).get("median")
    rivals = [row["median"] for name, row in timed.items() if name not in (*OURS, REFERENCE)]
    for name, row in timed.items():
        row["to_eager"] = eager / row["median"] if eager else None
        row["to_rival"] = min(rivals) / row["median"] if rivals and name in OURS else None
    return timed


def throughput(row: dict) -> str:
    """GB/s where moving the bytes takes longer than the products would at 100 FLOP a byte, else TFLOP/s."""
    if row["flops"] > 100 * row["bytes"]:
        return f"{row['flops'] / row['median'] / 1e12:.3g} TFLOP/s"
    return f"{row['bytes'] / row['median'] / 1e9:.3g} GB/s"


def times(value: float | None) -> str:
    if value is None:
        return ""
    colour = "green" if value >= 1.05 else "red" if value < 0.95 else "default"
    return f"[{colour}]{value:.2f}×[/{colour}]"


def groups(rows: list[dict]) -> list[tuple[tuple, list[dict]]]:
    """Rows of one workload, mode and dtype together, in the order of the file."""

    def key(row: dict) -> tuple:
        return row["workload"], row["dtype"], row["mode"]

    order: dict[tuple, list[dict]] = {}
    for row in rows:
        order.setdefault(key(row), []).append(row)
    return list(order.items())


def make_table(rows: list[dict], on_gpu: bool) -> Table:
    """One line a provider."""
    table = Table(
        title="standard workloads",
        caption="median \\[lower, upper quartile]; ratios: how many times faster; rival: the fastest that is neither "
        "eager nor this package; floor: least time for the bytes and products; error: the worst tensor against "
        "float64, relative to its largest value",
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )
    names = ["workload", "mode", "provider", "median", "quartiles", "× eager", "× rival"]
    names += ["% of floor"] if on_gpu else []
    names += ["rate", "peak MB", "error"] + (["host"] if on_gpu else [])
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < 3 else "right", no_wrap=name != "quartiles")
    for _, several in groupby(groups(rows), key=lambda group: group[0][:2]):
        table.add_section()
        shown = ""
        for (workload, dtype, mode), members in several:
            compared = comparison(members)
            for row in members:
                title = f"{workload} {dtype}"
                head = ["" if title == shown else title, mode, row["provider"]]
                shown = title
                if row["provider"] in compared:
                    table.add_row(*head, *_cells(compared[row["provider"]], on_gpu))
                else:
                    table.add_row(*head, "[yellow]–[/yellow]", f"[yellow]{escape(row['refused'])}[/yellow]")
    return table


def _cells(row: dict, on_gpu: bool) -> list[str]:
    low, high = row["quartiles"]
    cells = [seconds(row["median"]), f"[dim][{seconds(low)}, {seconds(high)}][/dim]".replace("[dim][", "[dim]\\[")]
    cells += [times(row["to_eager"]), times(row["to_rival"])]
    cells += [f"{100 / row['floor_ratio']:.0f}" if row["floor_ratio"] else ""] if on_gpu else []
    peak = row["peak_bytes"]
    cells += [throughput(row), "" if peak is None else f"{peak / 1e6:.3g}"]
    cells += ["" if row["error"] is None else f"{row['error']:.0e}"]
    host = row["host_seconds"]
    return cells + ([seconds(host) if host else ""] if on_gpu else [])
