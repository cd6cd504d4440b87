"""The table of the standard workloads, from the rows of a result file: on a terminal, and as Markdown."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table, box
from rich.text import Text

from benchmarks.report.units import digits

BASELINE, COMPILE, OURS, OURS_COMPILED, GRAPH = OWN = (
    "baseline", "compile", "fastblocks", "fastblocks-compile", "fastblocks-graph"
)  # fmt: skip
TIE = 1.03  # times as fast, up to which nobody has won
ARROW = f"{BASELINE}→{OURS}"
NOTE = (
    f"{ARROW}: medians of runs in turn; ×: how many times faster. Training: forward and backward together, of a "
    "network a whole step; MB: the peak of a training step; error: of the worst output against float64, relative to "
    "its largest value."
)
RIVAL_NOTE = f" Rival: the fastest that is neither {BASELINE} nor this package."


def comparison(rows: list[dict]) -> dict[str, dict]:
    """Of one workload, mode and dtype: provider -> row; a timed one gets `speedup`, how many times faster than the
    baseline it is, and one of ours `to_rival` and `rival`, the fastest that is neither the baseline nor this package.
    """
    found = {row["provider"]: dict(row) for row in rows}
    medians = {name: row["median"] for name, row in found.items() if "median" in row}
    rival = min(medians.keys() - {BASELINE, OURS, OURS_COMPILED, GRAPH}, key=medians.get, default=None)
    for name, median in medians.items():
        found[name]["speedup"] = medians[BASELINE] / median if BASELINE in medians else None
        if rival and name in (OURS, GRAPH):
            found[name] |= {"to_rival": medians[rival] / median, "rival": rival}
    return found


def groups(rows: list[dict], *keys: str) -> list[tuple[tuple, list[dict]]]:
    """Rows with the same values under `keys` together, in the order of the file."""
    order: dict[tuple, list[dict]] = {}
    for row in rows:
        order.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(order.items())


def columns(rows: list[dict], everything: bool) -> list[tuple[str, Callable[[dict[str, dict]], str]]]:
    """Header and content of each column; the content comes from a workload's `comparison`s, by mode.

    Args:
        rows: of a result file.
        everything: also shapes, backward alone beside two other modes, CUDA graphs and floors; else what fits 80
            characters.
    """
    timed = [row for row in rows if "median" in row]
    rivals = any(row["provider"] not in (BASELINE, OURS, OURS_COMPILED, GRAPH) for row in timed)
    graphs = everything and any(row["provider"] == GRAPH for row in timed)
    floors = everything and any(row["floor_ratio"] is not None for row in timed)
    modes = [mode for mode in ("forward", "backward", "training") if any(row["mode"] == mode for row in rows)]
    shown = modes if everything or len(modes) < 3 else ["forward", "training"]
    found: list = []
    for mode in shown:
        found.append((f"{mode} ms", partial(_both, mode, "median", lambda seconds: digits(1000 * seconds))))
        found.append(("×", partial(_one, mode, OURS)))
        if graphs:
            found.append(("in a graph ×", partial(_one, mode, GRAPH)))
        if floors:
            found.append(("% of floor", partial(_one, mode, OURS, "floor_ratio", lambda ratio: f"{100 / ratio:.0f}")))
        if rivals:
            found.append(("× rival", partial(_rival, mode, everything)))
    if everything or not rivals:
        found.append(("MB", partial(_both, shown[-1], "peak_bytes", lambda count: digits(count / 1e6))))
        found.append(("error", partial(_both, shown[0], "error", lambda error: f"{error:.0e}")))
    return found


def _both(mode: str, key: str, text: Callable, by: dict[str, dict]) -> str:
    """The baseline's and ours, or in a word why there is none; once if neither is there for the same reason."""
    pair = [by[mode].get(name, {}) for name in (BASELINE, OURS)]
    reasons = [row.get("refused") for row in pair]
    cells = [
        text(row[key]) if row.get(key) else (why or "–").partition(":")[0]
        for row, why in zip(pair, reasons, strict=True)
    ]
    return cells[0] if reasons[0] and reasons[0] == reasons[1] else "→".join(cells)


def _one(mode: str, provider: str, key: str = "speedup", text: Callable = "{:.2f}".format, *, by: dict) -> str:
    value = by[mode].get(provider, {}).get(key)
    return text(value) if value else ""


def _rival(mode: str, named: bool, by: dict[str, dict]) -> str:
    ratio, name = _one(mode, OURS, "to_rival", by=by), by[mode].get(OURS, {}).get("rival")
    return f"{ratio} ({name})" if named and ratio else ratio


def summary(rows: list[dict], everything: bool) -> tuple[list[str], list[list[str]], str]:
    """Header, cells, a line a workload and dtype, and what they mean; `everything` as for `columns`."""
    contents, one_dtype, lines = columns(rows, everything), len({row["dtype"] for row in rows}) == 1, []
    for (name, dtype, shape), members in groups(rows, "workload", "dtype", "shape"):
        by = defaultdict(dict, {mode: comparison(few) for (mode,), few in groups(members, "mode")})
        head = [name if one_dtype else f"{name} {dtype}", *([shape] if everything else [])]
        lines.append([*head, *(content(by=by) for _, content in contents)])
    header = ["workload", *(["shape"] if everything else []), *(header for header, _ in contents)]
    return header, lines, NOTE + (RIVAL_NOTE if "× rival" in header else "")


def markdown(rows: list[dict]) -> str:
    """The whole summary."""
    header, lines, note = summary(rows, everything=True)
    rule = ["---"] * 2 + ["--:"] * (len(header) - 2)
    return note + "\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def speedups(rows: list[dict]) -> str:
    """A short table, how many times as fast as the baseline the others are, and who is beaten by `compile`."""
    modes = [mode for mode in ("forward", "backward", "training") if any(row["mode"] == mode for row in rows)]
    others = [n for n in dict.fromkeys(row["provider"] for row in rows) if n != BASELINE]
    header = ["workload", *(f"{mode} × {name}" for mode in modes for name in others)]
    if others == [OURS]:
        header = ["workload", *(f"{mode} ×" for mode in modes)]
    lines, lost = [], defaultdict(list)
    for (name,), members in groups(rows, "workload"):
        line = [name]
        for mode in modes:
            found = comparison([row for row in members if row["mode"] == mode])
            ratios = {other: found.get(other, {}).get("speedup") for other in others}
            line += [f"{r:.2f}" if r else refusal(found.get(other, {})) for other, r in ratios.items()]
            theirs, ours = ratios.get(COMPILE), ratios.get(OURS)
            if theirs and ours and theirs > TIE * ours:
                lost[mode].append(f"{name} ({theirs:.2f} to {ours:.2f})")
        lines.append(line)
    cells = (header, ["---", *["--:"] * (len(header) - 1)], *lines)
    text = f"×: as many times as fast as {BASELINE}.\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells)
    if COMPILE in others:
        won = "; ".join(f"{mode}: {', '.join(lost[mode]) or 'nowhere'}" for mode in modes)
        text += f"\n\nWhere `torch.compile` of the originals is faster than {OURS}, by more than 3 %: {won}."
    return text


def refusal(row: dict) -> str:
    """Why there is no time, in a word."""
    return row.get("refused", "–").partition(":")[0]


def fitted(header: list[str], lines: list[list[str]], console: Console, title: str | None = None) -> Table:
    """A table of as many columns, from the left, as fit the console whole; its caption names the others.

    Args:
        header: of the columns; the first is left-aligned, the others are right-aligned.
        lines: cells, with Rich's markup; an empty line draws a gap.
        console: where it will be printed.
        title: above the table.
    """
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.pad_edge, room = False, console.width - 1  # both edges and the gaps take a character each
    for i, name in enumerate(header):
        room -= 1 + max(cell_len(name), *(cell_len(Text.from_markup(line[i]).plain) for line in lines if line))
        if room < 0:
            table.caption = f"left out, {console.width} characters are too few: {', '.join(header[i:])}"
            break
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        if line:
            table.add_row(*line[: len(table.columns)])
        else:
            table.add_section()
    return table


def show(rows: list[dict]) -> None:
    """Print what fits the terminal, or 80 columns, and below it why somebody has no time."""
    header, lines, note = summary(rows, everything=False)
    cells: list[list[str]] = []
    for _, family in groupby(lines, key=lambda line: line[0].partition("-")[0]):
        cells += [[colour(cell) if "×" in header[i] else cell for i, cell in enumerate(line)] for line in family]
        cells.append([])
    console = Console(highlight=False)
    console.print(fitted(header, cells, console))
    console.print(note)
    for row in rows:
        if "refused" in row and row["provider"] in (BASELINE, OURS):
            print(f"{row['workload']} {row['dtype']} {row['mode']}, {row['provider']}: {row['refused']}")


def colour(ratio: str) -> str:
    if not ratio or 0.95 <= float(ratio) < 1.05:
        return ratio
    return f"[green]{ratio}[/green]" if float(ratio) > 1 else f"[red]{ratio}[/red]"
