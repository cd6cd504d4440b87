"""Result files: what they say about the machine, where they lie, how they are read."""

import hashlib
import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.kits import describe_device, processor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1


def environment(commit: str | None = None) -> dict[str, Any]:
    """Where and with what a measurement was made.

    Args:
        commit: of the source, where there is no git to ask.
    """
    cuda = torch.cuda.is_available()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or git_commit(),
        "source": source_digest(),
        "machine": describe_device(),
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "kind": device_kind(),
        "driver": driver() if cuda else None,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def device_kind() -> str:
    """The folder of a device's results: `nvidia-h200`, `cpu`."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def driver() -> str | None:
    """The GPU's driver, as nvidia-smi tells it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def git_commit() -> str:
    """The checkout's commit, with `+` behind it if files differ from it; `unknown` without git."""
    try:
        options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True, "timeout": 20}
        commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], **options).stdout.strip()
        source = ["fastblocks", "kernels", "benchmarks/*.py", "benchmarks/original"]
        changed = subprocess.run(["git", "status", "--porcelain", "--", *source], **options).stdout.strip()
        return commit + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def source_digest() -> str:
    """Twelve hexadecimal digits that name the measured source, whether or not it is committed."""
    digest = hashlib.sha256()
    kernels = ROOT / "kernels" if (ROOT / "kernels").is_dir() else ROOT / "fastblocks" / "kernels"
    for name, folder in (("fastblocks", ROOT / "fastblocks"), ("kernels", kernels)):
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder)
            if name == "fastblocks" and relative.parts[0] == "kernels":
                continue
            digest.update(f"{name}/{relative}".encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def default_path(document: dict[str, Any]) -> Path:
    """Where a result file is kept: results/<device>/<date>-<commit>.json."""
    return RESULTS / document["kind"] / f"{document['date'][:10]}-{document['commit'].rstrip('+')}.json"


def write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
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


def newest(kind_folder: Path, content: str) -> dict[str, Any] | None:
    """The newest file in a device's folder that holds `content`: "results" (cases) or "rows" (workloads)."""
    documents = [read(path) for path in sorted(kind_folder.glob("*.json"))]
    documents = [document for document in documents if document.get(content)]
    return max(documents, key=lambda document: document["date"], default=None)
