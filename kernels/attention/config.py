"""Launch configurations of the attention kernels: tile sizes, warps and stages, and why.

Nothing was timed yet: the sizes are predictions, checked against the compiler's report of registers per thread and
spills.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastblocks.eager.attention import sides_of
from fastblocks.kernels import runtime
from fastblocks.kernels.launch import LaunchConfig, config

MIN_TILE = 16  # smallest dimension that tl.dot takes
# Tokens from which on a kernel of its own rotates q and k, once, and they are kept for backward: 2·T·C elements beside
# the 4·T·C of qkv and out. A prediction (H100, us): of 8192 tokens of 8 heads of 64 channels, window 128, forward 121
# without it and 85 + 45 with it, backward 309 and 218; of 282 tokens of 4 heads of 32, 71 and 55 + 34, 191 and 168.
ROTATE_FROM = 1024
SPLIT = 512  # keys per program, register tokens' output: 16 programs per head at T = 8192, 128 at 65536 (a prediction)
UNLIMITED = 2**30  # tokens before or after a row that sees all of them: adds up with a position in 32 bits
COMBINE_ROWS = 4  # register tokens per program that combines splits: few, because there are only B·H·R
PARTIAL_TILE = 8192  # elements of partial sums that a program adds per step: 64 registers per thread at 128 threads

# Tensor cores read operands from shared memory here; elsewhere (sm_80, sm_89, gfx942) operands take registers.
OPERANDS_IN_SHARED_MEMORY = ("sm_90", "sm_100", "sm_103")


def is_short(n_rows: int, block_d: int, element_size: int, architecture: str) -> bool:
    """Whether one program holds all keys of a head (`short`). Past 128 rows the operands of the loop over queries no
    longer fit: 282 rows in backward spill 1 to 7 kB per thread in every shape tried, 4 to 16 warps; 128 rows of 64
    channels with a window spill 216 bytes on sm_90, and their 96 kB would not fit an sm_89."""
    if element_size == 4:  # products without tensor cores keep their operands in registers
        return n_rows <= 64 and block_d <= 32
    return n_rows <= 128 and n_rows * block_d <= 128 * 32


def is_rotated(n_tokens: int, window: int | Sequence[int], element_size: int) -> bool:
    """Whether a kernel of its own rotates q and k, for the kernels that are not `short`. Not in a float32 window:
    rotated TF32 operands of 64 channels spill 8 to 16 bytes per thread."""
    return n_tokens >= ROTATE_FROM and (sides_of(window) == (-1, -1) or element_size == 2)


MOST_TF32 = 128  # largest padded head size for TF32: above, its operands spill 0.5 kB per thread, float32 0.2


def most_registers(head_dim: int, architecture: str) -> int:
    """How many register tokens the kernels take. Their keys and values are two tiles that a program holds beside its
    own: more of them spill up to 5 kB per thread, and some need more shared memory than sm_80 and sm_89 have. Within
    this limit the kernels need 86 kB at most on sm_80 and sm_89, 147 kB on sm_90, 32 kB on gfx942. Where operands take
    registers, 64 of 64 channels spill 0.7 kB in 16 bits and 1.6 in 32."""
    block_d = tile(head_dim)
    if block_d <= 64:
        return 64 if block_d <= 32 or architecture in OPERANDS_IN_SHARED_MEMORY else 32
    return 16 if block_d <= 128 else 0


def launch_config(
    kernel: str, n_rows: int, block_d: int, element_size: int, architecture: str, tf32: bool = False,
    streams: bool = False, gated: bool = False, n_registers: int = 0,
) -> LaunchConfig:  # fmt: skip
    """The launch of one attention kernel; block_d is the padded head size. streams: all keys pass by, as they are in
    memory, one block after the other: many rotated tokens without a window or register tokens.

    Predictions (H100, bfloat16): small programs of 4 warps in one stage, of which 4 to 8 are resident on a
    multiprocessor, hide each other's latencies, at the start of a program above all. With 8 warps, 128 queries and two
    stages (1 or 2 resident) att-long takes 189 us forward instead of 121, att-time 109 instead of 71, although keys are
    read from L2 half as often; a second stage costs att-time 40 % (it holds the rope table in shared memory, too).
    """
    if kernel == "short_backward" and element_size == 4 and not tf32:
        # 4 warps, or 64 queries under a mask, spill 1 to 7 kB per thread with Triton 3.6 or 3.7. From 3.8 on operands
        # stay in registers, and 32 queries spill 0.3 to 0.6 kB.
        return config(8, 1, BLOCK_M=32 if runtime.VERSION < (3, 8) else 16)
    if kernel.startswith("short"):  # a warpgroup for every 64 rows
        # In float32 a part of 64 spills 56 bytes in one, and with gates all of them 80.
        one = n_rows <= 64 if element_size == 2 else n_rows == 64 and (tf32 or not gated)
        return config(4 if one else 8, 1, BLOCK_M=128)
    roomy = architecture in OPERANDS_IN_SHARED_MEMORY
    if kernel.startswith("register"):  # tiles of 16 rows: more warps would only duplicate operands
        if block_d > 64:  # 4 warps spill 0.3 kB per thread
            return config(8, 1, BLOCK_N=16)
        if element_size == 4 and block_d > 32 and n_registers > 16:  # 4 warps spill 0.2 kB per thread
            return config(8, 1, BLOCK_N=32)
        # 64 rotated keys of 32 channels spill 8 bytes per thread. SPLIT must be a multiple of it.
        return config(4, 1, BLOCK_N=64 if element_size == 2 and block_d > 32 else 32)
    if element_size == 4 and kernel == "long_forward" and block_d <= 32:
        # 8 warps spill 8 bytes at 64 registers on sm_90, as do 32 keys of 16 channels with register tokens
        return config(4, 1, BLOCK_M=32, BLOCK_N=16 if block_d == 16 else 32)
    if element_size == 4 and block_d <= 32 and (kernel == "grad_key" or gated):
        return config(4, 1, BLOCK_M=32, BLOCK_N=32)  # with 8 warps ptxas spills: grad_key at 64 registers on sm_80
    if element_size == 4 and block_d == 64:  # 32 queries spill 16 bytes on sm_80, 8 on sm_90 beside 32 register tokens
        if (kernel == "grad_key" and not roomy) or (kernel == "grad_query" and n_registers > 16):
            return config(8, 1, BLOCK_M=16, BLOCK_N=32)
    if element_size == 4:  # no tensor cores: 4 warps spill 300 bytes per thread at D = 64
        return config(8, 1, BLOCK_M=32, BLOCK_N=32) if block_d <= 64 else config(8, 1, BLOCK_M=16, BLOCK_N=16)
    if block_d > 128:  # 32 queries spill 0.6 kB per thread, 64 up to 5.6
        return config(8, 1, BLOCK_M=16, BLOCK_N=16)
    if block_d > 64:
        if kernel == "grad_key":
            return config(8, 1, BLOCK_M=32, BLOCK_N=32)
        if not roomy:  # 64 queries spill 0.6 kB per thread with register tokens
            return config(4, 1, BLOCK_M=32, BLOCK_N=16)
        return config(8, 1, BLOCK_M=64, BLOCK_N=32)
    if streams and roomy and block_d == 64:
        # Copies run ahead of the products. Predictions (H100, 4096 tokens of 8 heads of 64 channels): forward 83 us
        # instead of 102, grad_query 72 instead of 158, grad_key less by a fifth.
        return config(4, 3, BLOCK_M=64, BLOCK_N=64) if kernel == "grad_key" else config(8, 3, BLOCK_M=128, BLOCK_N=64)
    if block_d > 32 and not roomy:  # 4 warps or one stage spill up to 56 bytes
        if kernel == "grad_key":
            return config(8, 2, BLOCK_M=32, BLOCK_N=64)
        if kernel == "grad_query" and n_registers > 16:  # 64 queries beside 32 register tokens spill up to 104 bytes
            return config(8, 1, BLOCK_M=32, BLOCK_N=64)
        if kernel == "grad_query":
            return config(8, 2, BLOCK_M=64, BLOCK_N=64)
    if kernel == "grad_key":  # keys are its rows: 128 of 32 channels leave 2 programs resident
        return config(4, 1, BLOCK_M=32, BLOCK_N=64)
    return config(4, 1, BLOCK_M=64, BLOCK_N=32)


# ---- what follows from shapes ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that a launch needs and that follows from shapes; computed once per shape, and hashed as an object:
    prepared launches are cached by it."""

    short: bool  # the `short` kernels run: all keys of a head on chip
    rotated: bool  # a separate kernel rotates q and k; the others find them rotated
    n_tokens: int
    n_registers: int
    window: dict[str, int]  # window_left and window_right: tokens before and after itself that a token sees
    scale: float  # of the scores, with log2(e) for a base-2 exponential
    configs: dict[str, LaunchConfig]  # by kernel


def tile(rows: int) -> int:
    return max(MIN_TILE, 1 << (rows - 1).bit_length())


def key_tiles(n_rows: int, element_size: int = 2) -> tuple[int, int]:
    """Two powers of two that hold n_rows keys: 282 -> (256, 32), 60 -> (64, 0). Float32 takes one: two spill."""
    one = tile(n_rows)
    if n_rows == one or one == MIN_TILE or element_size == 4:
        return one, 0
    rest = tile(n_rows - one // 2)
    return (one, 0) if rest * 2 >= one else (one // 2, rest)


def runs_short(qkv: Tensor, n_head: int, n_registers: int) -> bool:
    """Whether the kernels for short sequences run; sizes may be symbolic."""
    block_d = tile(qkv.shape[2] // (3 * n_head))
    return is_short(n_registers + qkv.shape[1], block_d, qkv.element_size(), runtime.architecture(qkv.device))


def plan_of(
    qkv: Tensor,
    n_head: int,
    window: int | Sequence[int],
    register_qkv: Tensor | None,
    registers_out: bool,
    gated: bool = False,
) -> Plan:
    return _plan(
        qkv.shape[1],
        0 if register_qkv is None else register_qkv.shape[1],
        qkv.shape[2] // (3 * n_head),
        sides_of(window),
        qkv.dtype,
        registers_out,
        qkv.dtype == torch.float32 and runtime.allows_tf32(),
        gated,
        runtime.architecture(qkv.device),
    )


@lru_cache(maxsize=4096)
def _plan(
    n_tokens: int, n_registers: int, head_dim: int, window: tuple[int, int], dtype: torch.dtype,
    registers_out: bool, tf32: bool, gated: bool, architecture: str,
) -> Plan:  # fmt: skip
    n_rows = n_registers + n_tokens
    block_d, size = tile(head_dim), dtype.itemsize
    shared = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    tf32 = tf32 and dtype == torch.float32 and block_d <= MOST_TF32
    products = {"PRECISION": "tf32" if tf32 else "ieee"}
    # TF32 operands of 17 to 64 register tokens of 64 channels as queries spill 16 to 88 bytes in every shape tried.
    register_products = {"PRECISION": "tf32" if tf32 and (n_registers <= 16 or block_d <= 32) else "ieee"}
    has_window = any(0 <= side < n_tokens - 1 for side in window)
    configs = {
        "register_gradient": config(4, **shared, BLOCK_S=PARTIAL_TILE // block_d, REGISTERS_OUT=registers_out),
    }
    short = is_short(n_rows, block_d, size, architecture)
    rotated = not short and is_rotated(n_tokens, window, size)
    streams = rotated and not has_window and n_registers == 0

    def complete(kernel: str, **constants) -> LaunchConfig:
        tiles = launch_config(kernel, n_rows, block_d, size, architecture, tf32, streams, gated, n_registers)
        return tiles.with_(**(shared | products | constants))

    if short:
        block_a, block_b = key_tiles(n_rows, size)
        n_queries = n_rows if registers_out else n_tokens
        for name in ("short_forward", "short_backward"):
            block_m = min(complete(name)["BLOCK_M"], tile(n_queries))
            one = block_m >= n_queries
            configs[name] = complete(
                name,
                HAS_WINDOW=has_window,
                HAS_REGISTERS=n_registers > 0,
                REGISTERS_OUT=registers_out,
                BLOCK_A=block_a,
                BLOCK_B=block_b,
                BLOCK_M=block_m,
                ONE_BLOCK=one,
                # Without a loop att-freq's backward takes fewer registers and 51 us instead of 67 (a prediction).
                # Float32 and 128 rows spill up to 88 bytes per thread so on sm_80.
                NO_LOOP=one and block_m <= 64 and size == 2,
                EVEN=one and block_m == block_a == n_rows and n_registers == 0,
            )
    else:
        block_r = tile(max(1, n_registers))
        flags = {"BLOCK_R": block_r, "HAS_WINDOW": has_window, "ROTATED": rotated}
        has_registers = {"HAS_REGISTERS": n_registers > 0}
        registers = {"BLOCK_R": block_r, "SPLIT": SPLIT, "ROTATED": rotated, **register_products}
        configs |= {
            "rotate": config(4, **shared, BLOCK_M=max(MIN_TILE, 4096 // block_d)),
            "long_forward": complete("long_forward", **flags, **has_registers),
            "grad_query": complete("grad_query", **flags, **has_registers),
            "grad_key": complete("grad_key", **flags, REGISTERS_OUT=registers_out),
            "register_forward": complete("register", **registers),
            "register_backward": complete("register", **registers),
            "register_combine": config(1, **shared, BLOCK_R=COMBINE_ROWS),
        }
    scale = head_dim**-0.5 / math.log(2)
    left, right = (UNLIMITED if side < 0 else side for side in window)
    sides = {"window_left": left, "window_right": right}
    return Plan(short, rotated, n_tokens, n_registers, sides, scale, configs)
