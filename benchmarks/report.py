"""`python -m benchmarks report`: the README's table and the plots, from the newest result files."""

import argparse
import os
from pathlib import Path

from rich.console import Console

from benchmarks import plots, results
from benchmarks.suite_table import OURS, comparison, groups

START, END = "<!-- results -->", "<!-- /results -->"
NOTHING = "Not measured yet: there are no result files."


def markdown(header: list[str], lines: list[list[str]], left: int = 1) -> str:
    """A table, of which the first `left` columns are text."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def milliseconds(value: float) -> str:
    """Three significant digits, without an exponent."""
    text = f"{1000 * value:#.3g}"
    return (f"{float(text):.0f}" if "e" in text else text).rstrip(".")


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def origin(document: dict) -> str:
    """One line: what was measured where."""
    driver = f", driver {document['driver']}" if document.get("driver") else ""
    threads = f", {document['threads']} threads" if document["kind"] == "cpu" else ""
    return (
        f"{document['device']}{threads}{driver}, torch {document['torch']}, triton {document['triton']}, "
        f"commit {document['commit']}, {document['date'][:10]}"
    )


def cases(document: dict) -> str:
    """The main job's table: this package beside the original formulas."""
    header = ["float32, the same weights", "shape", "forward ms: old", "new", "", "training ms: old", "new", ""]
    header += ["training MB: old", "new", "error: old", "new"]
    lines = []
    for result in document["results"]:
        cells = [result["name"], result["shape"]]
        for mode in ("forward", "training"):
            old, new = (result[mode][name]["quartiles"][1] for name in ("original", "fastblocks"))
            cells += [milliseconds(old), milliseconds(new), ratio(old / new)]
        cells += [f"{result['peak_bytes'][name] / 1e6:.3g}" for name in ("original", "fastblocks")]
        cells += [f"{result['error'][name]:.0e}" for name in ("original", "fastblocks")]
        lines.append(cells)
    note = "Old: the original formulas; new: this package; medians of interleaved runs; MB: peak of a training step."
    return f"{origin(document)}. {note}\n\n{markdown(header, lines, 2)}"


def workloads(document: dict) -> str:
    """The standard workloads: eager, this package, and the best rival, for every mode."""
    on_gpu = document["kind"] != "cpu"
    header = ["workload", "mode", "eager ms", "fused ms", "× eager"]
    header += ["in a graph ms", "× eager", "% of floor"] if on_gpu else []
    header += ["best rival ms", "fused × rival", "MB: eager", "fused", "error: eager", "fused"]
    lines = []
    for (workload, dtype, mode), members in groups(document["rows"]):
        timed = comparison(members)
        if workload.startswith(plots.SWEEP) or not set(timed) & {"eager", "fused"}:
            continue
        eager, fused, graph = (timed.get(name, {}) for name in ("eager", *OURS))
        rivals = {name: row["median"] for name, row in timed.items() if name not in ("eager", *OURS)}
        best = min(rivals, key=rivals.get, default=None)
        refused = {row["provider"]: row["refused"] for row in members if "refused" in row}

        def time(row: dict, name: str, refused=refused) -> str:
            return milliseconds(row["median"]) if row else refused.get(name, "").partition(":")[0][:40]

        cells = [f"{workload} {dtype}", mode, time(eager, "eager"), time(fused, "fused"), ratio(fused.get("to_eager"))]
        if on_gpu:
            floors = [row["floor_ratio"] for row in (fused, graph) if row.get("floor_ratio")]
            cells += [time(graph, "fused-graph"), ratio(graph.get("to_eager"))]
            cells += [f"{100 / min(floors):.0f}" if floors else ""]
        cells += [f"{milliseconds(rivals[best])} ({best})" if best else "", ratio(fused.get("to_rival"))]
        peaks = [row.get("peak_bytes") for row in (eager, fused)]
        cells += ["" if peak is None else f"{peak / 1e6:.3g}" for peak in peaks]
        cells += ["" if row.get("error") is None else f"{row['error']:.0e}" for row in (eager, fused)]
        lines.append(cells)
    note = "Medians; training is forward and backward together, of a model a whole step."
    if on_gpu:
        note += " Floor: the least time for the bytes and products; % of it that the faster of the two reaches."
    return f"{origin(document)}; {document['size']} size. {note}\n\n{markdown(header, lines, 2)}"


def draw(folder: Path, kind: str, documents: dict[str, dict]) -> list[Path]:
    """The plots of one device."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    if main := documents.get("results"):
        jobs.append((plots.case_speedups, f"{kind}-cases.svg", main))
    if suite := documents.get("rows"):
        jobs.append((plots.speedups, f"{kind}-speedups.svg", suite))
        jobs += [(plots.windowed, f"{kind}-windowed.svg", suite), (plots.roofline, f"{kind}-roofline.svg", suite)]
    return [folder / name for make, name, document in jobs if make(folder / name, document)]


def write_between(path: Path, text: str) -> None:
    """Replace what stands between the markers.

    Raises:
        ValueError: if the markers are not there, once each, in order.
    """
    old = path.read_text()
    if old.count(START) != 1 or old.count(END) != 1 or old.index(START) > old.index(END):
        raise ValueError(f"{path} needs the lines {START} and {END}, once each and in this order")
    head, _, rest = old.partition(START)
    path.write_text(f"{head}{START}\n{text}\n{END}{rest.partition(END)[2]}")


def report(readme: Path, folder: Path) -> list[Path]:
    """Write table and plots; returns the plots.

    Raises:
        ValueError: for a result file that cannot be read, or a README without markers.
    """
    parts, drawn = [], []
    kinds = sorted((p for p in folder.glob("*") if p.is_dir() and p.name != "plots"), key=lambda p: p.name == "cpu")
    for place in kinds:
        found = {content: results.newest(place, content) for content in ("rows", "results")}
        found = {content: document for content, document in found.items() if document}
        parts += [workloads(found["rows"])] if "rows" in found else []
        parts += [cases(found["results"])] if "results" in found else []
        pictures = draw(folder / "plots", place.name, found)
        base = readme.resolve().parent
        parts += [f"![{p.stem}]({Path(os.path.relpath(p.resolve(), base)).as_posix()})" for p in pictures]
        drawn += pictures
    write_between(readme, "\n\n".join(parts) if parts else NOTHING)
    return drawn


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("--readme", type=Path, default=results.ROOT / "README.md", metavar="FILE")
    parser.add_argument("--results", type=Path, default=results.RESULTS, metavar="DIR", help="<device>/<file>.json")
    options = parser.parse_args(arguments)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        drawn = report(options.readme, options.results)
    except (ValueError, OSError) as problem:
        errors.print(f"error: {problem}", markup=False, soft_wrap=True)
        return 2
    for path in (options.readme, *drawn):
        console.print(f"written: {path}", markup=False, soft_wrap=True)
    return 0
