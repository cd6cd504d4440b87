"""Result files: how they are written, joined, found and read."""

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 2


def write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"schema": SCHEMA} | document, indent=1) + "\n")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    """A result file's document.

    Raises:
        ValueError: if it is none.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} cannot be read as JSON: {problem}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no result file of this version")
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


def newest(folder: Path) -> dict[str, Any]:
    """The newest document in a device's folder."""
    return max((read(path) for path in folder.glob("*.json")), key=lambda document: document["date"])
