"""What a compiled kernel needs of an SM, read from its machine code."""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Each SM: registers, warps, blocks. From NVIDIA's CUDA programming guide, table of compute capabilities; a
# block costs 1 KiB of shared memory more than it asks for, so one that asks for all it may have fills an SM.
LIMITS = {
    "sm_80": (65536, 64, 32),
    "sm_89": (65536, 48, 24),
    "sm_90": (65536, 64, 32),
    "sm_100": (65536, 64, 32),
}
LANES, RESERVED = 32, 1 << 10
REGISTER_UNIT = 256  # registers are given to a warp in portions of this many
# CDNA3: 512 vector registers a lane for each of four SIMDs, 8 waves each
VGPRS, VGPR_UNIT, SIMDS, WAVES = 512, 8, 4, 8

SASS_MATRIX = re.compile(r"\b(HMMA|HGMMA|QGMMA|IMMA|IGMMA|DMMA|QMMA|OMMA|UTC[A-Z]*MMA)\b")
AMD_MATRIX = re.compile(r"\b(v_mfma_[a-z0-9]+|v_smfmac_[a-z0-9]+)")


@dataclass(frozen=True)
class Resources:
    """Of one thread: registers, spilled bytes; of one block: shared bytes. None: no tool here can say."""

    registers: int | None
    spilled_bytes: int | None
    shared_bytes: int
    matrix: dict[str, int] | None  # instruction -> how often it stands in the code


@cache
def tool(name: str) -> str | None:
    """A CUDA tool: Triton brings its own, else the one on the PATH."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(own) if own.exists() else shutil.which(name)


def missing_tools() -> list[str]:
    """A line for each tool that is missing, and what is not known without it."""
    lacks = {"cuobjdump": "registers and spills", "nvdisasm": "matrix instructions"}
    return [f"{name} is absent: no {what} for NVIDIA's GPUs" for name, what in lacks.items() if not tool(name)]


def resources(compiled, backend: str) -> Resources:
    """Read what triton.compile returned; `backend` is "cuda" or "hip"."""
    shared = compiled.metadata.shared
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        spilled = _number(text, "private_segment_fixed_size")  # scratch of a lane; nothing else uses any
        registers = _number(text, "vgpr_count") + _number(text, "agpr_count") * ("vgpr_count" not in text)
        return Resources(registers, spilled, shared, _count(AMD_MATRIX, text))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", "-c", file.name)
    registers = spilled = None
    if usage and (match := re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)):
        registers, spilled = int(match[1]), int(match[2]) + int(match[3])
    return Resources(registers, spilled, shared, None if code is None else _count(SASS_MATRIX, code))


def _run(name: str, *arguments: str) -> str | None:
    path = tool(name)
    if path is None:
        return None
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def _number(text: str, name: str) -> int:
    match = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0


def _count(pattern: re.Pattern, text: str) -> dict[str, int]:
    return dict(Counter(pattern.findall(text)).most_common())


def resident_warps(need: Resources, num_warps: int, architecture: str) -> int:
    """How many warps (waves) fit on an SM (compute unit) at a time; 0 if not one block does."""
    from fastblocks.kernels.runtime import shared_memory

    shared = shared_memory(architecture)
    if need.shared_bytes > shared:
        return 0
    if architecture.startswith("gfx"):
        blocks = shared // need.shared_bytes if need.shared_bytes else SIMDS * WAVES
        granted = -(-max(need.registers or 1, 1) // VGPR_UNIT) * VGPR_UNIT
        waves = SIMDS * min(WAVES, VGPRS // granted)
        return min(waves // num_warps, blocks) * num_warps
    registers, warps, blocks = LIMITS[architecture]
    fitting = [blocks, warps // num_warps, (shared + RESERVED) // (need.shared_bytes + RESERVED)]
    if need.registers:
        portion = -(-need.registers * LANES // REGISTER_UNIT) * REGISTER_UNIT
        fitting.append(registers // portion // num_warps)
    return min(fitting) * num_warps
