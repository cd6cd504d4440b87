"""What the machine is, and what is measured on it."""

import hashlib
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def environment(commit: str | None = None) -> dict[str, Any]:
    """Where and with what a measurement was made.

    Args:
        commit: of the source, where there is no git to ask.
    """
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or git_commit(),
        "source": source_digest(),
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "kind": device_kind(),
        "driver": driver() if cuda else None,
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def describe_device() -> str:
    """One line: processor or GPU, versions, threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({processor()})"
    return (
        f"{device}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        f"torch {torch.__version__}, triton {triton_version()}, Python {platform.python_version()}"
    )


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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
        source = ["fastblocks", "kernels", "benchmarks/*.py"]
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
