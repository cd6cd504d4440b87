"""Which rows see which: token s sees the tokens s − window_left … s + window_right. Masks, and the bounds of loops.

For a block of keys and the queries that see it, the two change places. A side without an end is config.UNLIMITED.
"""

from fastblocks.kernels.runtime import tl, triton

FAR = tl.constexpr(2**31 - 1)  # a position that no token sees


@triton.jit
def near(offs_q, offs_k, window_left, window_right):
    """Mask [queries, keys]: −window_right ≤ offs_q − offs_k ≤ window_left, in one subtraction and one comparison: what
    is below becomes, unsigned, a large number."""
    shifted = (offs_q + window_right)[:, None] - offs_k[None, :]
    return shifted.to(tl.uint32, bitcast=True) <= window_left + window_right


@triton.jit
def visible(
    offs_q, offs_k, n_registers, n_rows, window_left, window_right,
    HAS_WINDOW: tl.constexpr, HAS_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Mask [queries, keys]: whether row offs_q of the whole sequence sees row offs_k."""
    mask = (offs_k < n_rows)[None, :]
    if HAS_WINDOW:
        seen = near(offs_q, offs_k, window_left, window_right)
        if HAS_REGISTERS:
            seen = seen | (offs_k < n_registers)[None, :] | (offs_q < n_registers)[:, None]
        mask = mask & seen
    return mask


@triton.jit
def visible_tokens(offs_m, offs_n, n_tokens, window_left, window_right, HAS_WINDOW: tl.constexpr):
    """Mask [offs_m, offs_n]: whether token offs_m sees token offs_n; without a window [1, offs_n]."""
    mask = (offs_n < n_tokens)[None, :]
    if HAS_WINDOW:
        mask = near(offs_m, tl.where(offs_n < n_tokens, offs_n, FAR), window_left, window_right)
    return mask


@triton.jit
def visible_blocks(
    start, n_tokens, window_left, window_right,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Which tokens the rows start … start + ROWS - 1 see, in blocks of BLOCK: the first token, and the number of blocks
    before the interior (where every row sees every token), in it, and after it."""
    if not HAS_WINDOW:
        full = n_tokens // BLOCK
        return 0, 0, full, tl.cdiv(n_tokens, BLOCK) - full
    low = tl.maximum(start - window_left, 0)
    high = tl.minimum(start + ROWS + window_right, n_tokens)
    before = tl.cdiv(tl.maximum(tl.minimum(start + ROWS - 1 - window_left, high) - low, 0), BLOCK)
    interior = tl.maximum(tl.minimum(start + window_right + 1, n_tokens) - low - before * BLOCK, 0) // BLOCK
    after = tl.maximum(tl.cdiv(high - low, BLOCK) - before - interior, 0)
    return low, before, interior, after


@triton.jit
def start_of_block(i, low, before, interior, BLOCK: tl.constexpr, INTERIOR: tl.constexpr):
    """The first token of block i, counted within the interior's blocks or those around it."""
    start = low + i * BLOCK
    if not INTERIOR:
        start += tl.where(i >= before, interior * BLOCK, 0)
    return start
