"""Plots of result files, drawn by a command and never by hand."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.measure.floor import limits
from benchmarks.report.table import BASELINE, GRAPH, OURS, comparison, groups
from benchmarks.workloads.attention import SWEEP

COLOURS = {BASELINE: "#7f7f7f", "compile": "#e6a03c", OURS: "#1f77b4", GRAPH: "#17becf"}
OTHER = "#9467bd"


def _save(figure: Figure, title: str, document: dict, path: Path) -> bool:
    """Write it under a title that says what was measured; equal results give equal files."""
    about = f"{document['device']}, torch {document['torch']}, {document['date'][:10]}, {document['commit']}"
    figure.suptitle(f"{title}\n{about}", fontsize=9)
    with rc_context({"svg.hashsalt": "fastblocks"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def speedups(path: Path, document: dict) -> bool:
    """Bars of every provider's speed against the baseline, for each workload, from 1 to the left or right; a panel a
    mode.

    Returns:
        Whether there was anything to draw.
    """
    panels: dict[str, dict[str, dict[str, float]]] = {}  # mode -> workload -> provider -> ratio
    for (workload, dtype, mode), members in groups(document["rows"], "workload", "dtype", "mode"):
        compared = comparison(members).items()
        ratios = {name: row["speedup"] for name, row in compared if name != BASELINE and row.get("speedup")}
        if ratios and mode != "backward":
            panels.setdefault(mode, {})[f"{workload} {dtype}"] = ratios
    if not panels:
        return False
    everything = [item for bars in panels.values() for item in bars.items()]
    places = {workload: y for y, workload in enumerate(dict.fromkeys(workload for workload, _ in everything))}
    names = list(dict.fromkeys(name for _, ratios in everything for name in ratios))
    height = 0.8 / len(names)
    size = (1 + 4 * len(panels), 1.2 + len(places) * (0.12 + 0.12 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (mode, bars) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            own = {places[w] + (i - (len(names) - 1) / 2) * height: r[name] for w, r in bars.items() if name in r}
            widths = [ratio - 1 for ratio in own.values()]
            drawn = axis.barh(list(own), widths, height, 1, label=name, color=COLOURS.get(name, OTHER))
            axis.bar_label(drawn, [f"{ratio:.2f}" for ratio in own.values()], padding=2, fontsize=6)
        ratios = [ratio for each in bars.values() for ratio in each.values()]
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlim(min(0.7, 0.7 * min(ratios)), 1.6 * max(ratios))
        ticks = [2.0**k for k in range(-6, 10) if axis.get_xlim()[0] <= 2.0**k <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, [f"{t:g}×" for t in ticks], fontsize=7)
        axis.minorticks_off()
        axis.set_title(mode, fontsize=9)
    axes[0].set_yticks(list(places.values()), list(places), fontsize=8)
    axes[0].invert_yaxis()
    axes[0].margins(y=0.01)
    axis.legend(loc="lower right", fontsize=8)
    return _save(figure, f"times as fast as the {BASELINE}", document, path)


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
        ticks = sorted({p[0] for points in lines.values() for p in points})
        axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
        axis.minorticks_off()
        axis.set_xlabel("T in tokens")
        axis.set_ylabel(label)
        axis.grid(True, alpha=0.3)
    time_axis.legend(fontsize=8)
    return _save(figure, "windowed attention, forward and backward", document, path)


def roofline(path: Path, document: dict) -> bool:
    """FLOP/s against FLOP a byte below the device's limits; only for a GPU whose limits are known."""
    points = [row for row in document["rows"] if "median" in row and row["floor"] and row["flops"]]
    found = limits(document["device"])
    if found is None or not points:
        return False
    bandwidth, rate = found
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in (BASELINE, OURS, GRAPH):
        own = [row for row in points if row["provider"] == name]
        x = [row["flops"] / row["bytes"] for row in own]
        axis.loglog(x, [r["flops"] / r["median"] / 1e12 for r in own], "o", ms=4, label=name, color=COLOURS[name])
    reach = [0.5, rate / bandwidth, 5000]
    axis.loglog(reach, [min(rate, bandwidth * x) / 1e12 for x in reach], color="black", linewidth=1)
    axis.set_xlabel("FLOP a byte that must move")
    axis.set_ylabel("TFLOP/s")
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=8)
    return _save(figure, "roofline", document, path)
