"""Plots of result files, drawn by a command and never by hand."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.limits import LIMITS
from benchmarks.suite_table import OURS, comparison, groups

SUFFIXES = (".svg", ".png", ".pdf")
COLOURS = {"eager": "#7f7f7f", "compile": "#e6a03c", "fused": "#1f77b4", "fused-graph": "#17becf"}
OTHER = "#9467bd"
SWEEP = "att-sweep-"


def _save(figure: Figure, path: Path) -> None:
    metadata = {"Date": None} if path.suffix == ".svg" else None  # equal results give equal files
    figure.savefig(path, dpi=120, metadata=metadata)


def _subtitle(document: dict) -> str:
    return f"{document['device']}, torch {document['torch']}, {document['date'][:10]}, {document['commit']}"


def speedups(path: Path, document: dict) -> bool:
    """Bars of training speed against eager, for each workload (or of forward, where no training was measured).

    Returns:
        Whether there was anything to draw.
    """
    rows, bars = document["rows"], {}
    mode = next((m for m in ("training", "forward", "backward") if any(r["mode"] == m for r in rows)), "training")
    for (workload, dtype, each), members in groups(rows):
        compared = comparison(members)
        if each == mode and not workload.startswith(SWEEP) and "eager" in compared:
            ratios = {name: row["to_eager"] for name, row in compared.items() if name != "eager"}
            if ratios:
                bars[f"{workload} {dtype}"] = ratios
    if not bars:
        return False
    names = list(dict.fromkeys(name for ratios in bars.values() for name in ratios))
    title = {"training": "forward and backward", "forward": "forward", "backward": "backward alone"}[mode]
    _bars(path, bars, names, f"times as fast as eager: {title}\n{_subtitle(document)}")
    return True


def case_speedups(path: Path, document: dict) -> bool:
    """The same for the cases of the main job: this package against the original formulas."""
    bars = {
        result["name"]: {
            mode: result[mode]["original"]["quartiles"][1] / result[mode]["fastblocks"]["quartiles"][1]
            for mode in ("forward", "training")
        }
        for result in document["results"]
    }
    title = f"times as fast as the original formulas\n{_subtitle(document)}"
    _bars(path, bars, ["training", "forward"], title, {"training": COLOURS["fused"], "forward": "#9ecae1"})
    return True


def _bars(path: Path, bars: dict, names: list[str], title: str, colours: dict | None = None) -> None:
    colours = colours or COLOURS
    figure = Figure(figsize=(8, 1.2 + len(bars) * (0.16 + 0.12 * len(names))), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [y + (i - (len(names) - 1) / 2) * height for y, ratios in enumerate(bars.values()) if name in ratios]
        widths = [ratios[name] for ratios in bars.values() if name in ratios]
        drawn = axis.barh(places, widths, height, label=name, color=colours.get(name, OTHER))
        axis.bar_label(drawn, [f"{width:.2f}" for width in widths], padding=2, fontsize=6)
    axis.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    ticks = [2.0**k for k in range(-2, 8)]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.minorticks_off()
    largest = max(max(ratios.values()) for ratios in bars.values())
    axis.set_xlim(min(0.8, *(0.9 * min(ratios.values()) for ratios in bars.values())), 1.4 * largest)
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title(title, loc="left", fontsize=9)
    _save(figure, path)


def windowed(path: Path, document: dict) -> bool:
    """Time and memory of windowed attention against T, forward and backward together."""
    lines: dict[str, list[tuple[int, float, int | None]]] = {}
    for row in document["rows"]:
        if row["workload"].startswith(SWEEP) and row["mode"] == "training" and "median" in row:
            length = int(row["workload"].removeprefix(SWEEP))
            lines.setdefault(row["provider"], []).append((length, row["median"], row["peak_bytes"]))
    if not lines:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2)
    for name, points in lines.items():
        style = {"marker": "o", "markersize": 3, "label": name, "color": COLOURS.get(name, OTHER)}
        points.sort()
        time_axis.loglog([p[0] for p in points], [1000 * p[1] for p in points], **style)
        known = [p for p in points if p[2]]
        memory_axis.loglog([p[0] for p in known], [p[2] / 1e6 for p in known], **style)
    for axis, label in ((time_axis, "ms"), (memory_axis, "peak MB")):
        _lengths(axis, sorted({p[0] for points in lines.values() for p in points}))
        axis.set_ylabel(label)
        axis.grid(True, alpha=0.3)
    time_axis.legend(fontsize=8)
    figure.suptitle(f"windowed attention, forward and backward\n{_subtitle(document)}", fontsize=9)
    _save(figure, path)
    return True


def _lengths(axis: Axes, ticks: list[int]) -> None:
    axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("T in tokens")


def roofline(path: Path, document: dict) -> bool:
    """FLOP/s against FLOP a byte below the device's limits; only for a GPU whose limits are known."""
    limits = next((limit for name, limit in LIMITS.items() if name in document["device"]), None)
    points = [
        row for row in document["rows"]
        if row["provider"] in ("eager", *OURS) and row.get("floor") and row["flops"] and "median" in row
    ]  # fmt: skip
    if limits is None or not points:
        return False
    bandwidth, rate = limits
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in ("eager", *OURS):
        own = [row for row in points if row["provider"] == name]
        x = [row["flops"] / row["bytes"] for row in own]
        axis.loglog(x, [r["flops"] / r["median"] / 1e12 for r in own], "o", ms=4, label=name, color=COLOURS[name])
    reach = [0.5, rate / bandwidth, 5000]
    axis.loglog(reach, [min(rate, bandwidth * x) / 1e12 for x in reach], color="black", linewidth=1)
    axis.set_xlabel("FLOP a byte that must move")
    axis.set_ylabel("TFLOP/s")
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(f"roofline, {_subtitle(document)}", loc="left", fontsize=9)
    _save(figure, path)
    return True
