"""`python -m benchmarks report`: benchmarks/results/README.md and its plots, from each device's newest result files."""

import argparse
from pathlib import Path

from benchmarks.measure.environment import ROOT
from benchmarks.options import BadInput
from benchmarks.report import files, plots
from benchmarks.report.table import markdown, speedups
from benchmarks.workloads import ON_REQUEST

CONVERTED = ON_REQUEST["adapters"][1]  # how names of workloads begin that are models before and after `convert`
RESULTS = ROOT / "benchmarks" / "results"
HEAD = """# Results

Written by `python -m benchmarks report` from the newest files in each folder. How it is measured:
[Measure](../../README.md#measure).
"""
HEAD_OF_CONVERTED = """### Models that `fastblocks.convert` takes

The models of other packages, whole: `baseline` is the original, `fastblocks` what `convert` makes of it.
"""


def is_converted(row: dict) -> bool:
    """Whether a row is of a model before and after `convert`, not of the standard workloads."""
    return row["workload"].startswith(f"{CONVERTED}-")


def is_standard(row: dict) -> bool:
    return not is_converted(row)


def origin(document: dict) -> str:
    """What was measured where."""
    driver = f", driver {document['driver']}" if document["driver"] else ""
    threads = f", threads: {document['threads']}" if document["kind"] == "cpu" else ""
    return (
        f"{document['device']}{threads}{driver}, torch {document['torch']}, triton {document['triton']}, "
        f"commit {document['commit']}, {document['date'][:10]}; `--size {document['size']}`; "
        f"{', '.join(dict.fromkeys(row['dtype'] for row in document['rows']))}."
    )


def loaded(document: dict) -> str:
    """What else ran there."""
    return f" Beside {document['busy']} processes at full load." if document["busy"] else ""


def report(folder: Path) -> list[Path]:
    """Write README.md and the plots; returns them.

    Raises:
        BadInput: if there is no result file, or one that cannot be read.
    """
    kinds = sorted({path.parent for path in folder.glob("*/*.json")}, key=lambda p: (p.name == "cpu", p.name))
    if not kinds:
        raise BadInput(f"{folder} holds no result files, <device>/<date>-<commit>.json")
    parts, drawn = [HEAD], []
    (folder / "plots").mkdir(exist_ok=True)
    for kind in kinds:
        parts.append(f"## {kind.name}\n")
        for document in files.newest(kind, is_standard):
            if condition := document.get("condition"):
                parts.append(f"### {kind.name}: {', '.join(condition)}\n")
                parts.append(f"{origin(document)}{loaded(document)} {speedups(document['rows'])}\n")
            else:
                parts.append(f"{origin(document)} {markdown(document['rows'])}\n")
                drawn += _plots(folder, kind.name, document, parts)
        for converted in files.newest(kind, is_converted)[:1]:
            parts += [HEAD_OF_CONVERTED, f"{origin(converted)} {markdown(converted['rows'])}\n"]
    readme = folder / "README.md"
    readme.write_text("\n".join(parts))
    return [readme, *drawn]


def _plots(folder: Path, kind: str, document: dict, parts: list[str]) -> list[Path]:
    """Draw what there is to draw, and append it to the page."""
    drawn = []
    for name, draw in (("speedups", plots.speedups), ("windowed", plots.windowed), ("roofline", plots.roofline)):
        path = folder / "plots" / f"{kind}-{name}.svg"
        if draw(path, document):
            drawn.append(path)
            parts.append(f"![{path.stem}](plots/{path.name})\n")
    return drawn


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="holds <device>/<file>.json")
    results = parser.parse_args(arguments).results
    try:
        written = report(results)
    except OSError as problem:
        raise BadInput(str(problem)) from problem
    for path in written:
        print(f"written: {path}")
    return 0
