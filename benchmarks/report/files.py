"""Result files: how they are written, joined, found and read."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.options import BadInput

SCHEMA = 2


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that shall be there whole or not at all, whatever happens meanwhile."""
    temporary = path.with_suffix(".tmp")
    yield temporary
    os.replace(temporary, path)


def write(path: Path, document: dict[str, Any]) -> None:
    """A result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_text(json.dumps({"schema": SCHEMA} | document, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A result file's document.

    Raises:
        BadInput: if it is none.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise BadInput(f"{path} cannot be read as JSON: {problem}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise BadInput(f"{path} is no result file of this version")
    return document


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """Rows of two runs; where both have one, a row that was timed wins, the newer first."""

    def key(row: dict) -> tuple:
        return tuple(row[name] for name in ("workload", "mode", "dtype", "provider"))

    rows = {key(row): row for row in old}
    for row in new:
        if "median" in row or "median" not in rows.get(key(row), {}):
            rows[key(row)] = row
    return list(rows.values())


def newest(folder: Path, wanted: Callable[[dict], bool]) -> list[dict[str, Any]]:
    """The newest document in a device's folder of each condition (`run.condition`), that of the defaults first; only
    those that have rows of the kind that is wanted, with no others."""
    found = {}
    for document in sorted((read(path) for path in folder.glob("*.json")), key=lambda document: document["date"]):
        if rows := [row for row in document["rows"] if wanted(row)]:
            found[tuple(document.get("condition", ()))] = document | {"rows": rows}
    return [found[condition] for condition in sorted(found)]
