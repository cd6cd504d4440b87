"""What the machine is, and what is measured on it."""

import contextlib
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
from torch.utils.collect_env import get_nvidia_driver_version, run

ROOT = Path(__file__).resolve().parents[2]


def environment(commit: str | None = None) -> dict[str, Any]:
    """Where and with what a measurement was made.

    Args:
        commit: of the source, where there is no git to ask.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or git_commit(),
        "source": source_digest(),
        "device": device_name(),
        "kind": device_kind(),
        "driver": get_nvidia_driver_version(run) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def describe_device() -> str:
    """One line: processor or GPU, versions, threads."""
    device = device_name() if torch.cuda.is_available() else f"CPU ({device_name()})"
    return (
        f"{device}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        f"torch {torch.__version__}, triton {triton_version()}, Python {platform.python_version()}"
    )


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def device_name() -> str:
    """The GPU's name, or the CPU's, as far as the system tells."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def device_kind() -> str:
    """The folder of a device's results: `nvidia-h200`, `cpu`."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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
    for folder in (ROOT / "fastblocks", kernels):
        for path in sorted(folder.rglob("*.py")):
            if folder == kernels or kernels not in path.parents:
                digest.update(f"{folder.name}/{path.relative_to(folder)}".encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
