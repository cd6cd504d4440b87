"""Launches of the attention kernels: which ones, how large, in what order. Nothing here differentiates anything.

What follows from shapes alone is worked out once a shape (`_plan`, cached): a call then allocates and launches.
"""

import math
from functools import lru_cache, wraps

import torch
from torch import Tensor

from fastblocks.kernels import launch, runtime
from fastblocks.kernels.attention import config
from fastblocks.kernels.attention.long import (
    _blocks_forward_kernel,
    _grad_key_kernel,
    _grad_query_kernel,
    _rotate_kernel,
)
from fastblocks.kernels.attention.registers import (
    _register_backward_kernel,
    _register_forward_kernel,
    _register_gradient_kernel,
    _register_join_kernel,
)
from fastblocks.kernels.attention.short import _whole_backward_kernel, _whole_forward_kernel
from fastblocks.kernels.launch import CompileCase
from fastblocks.kernels.runtime import triton

MIN_TILE = 16  # what tl.dot takes
ROTATE_FROM = 1024  # from here on, without a window, q and k are rotated once, in a pass of their own (a prediction)
CHUNK = 512  # keys a program of the registers' output: 16 programs a head at T = 8192, 128 at 65536 (a prediction)
JOIN_ROWS = 4  # registers a program that joins chunks: few, because there are only B·H·R of them
PARTIAL_TILE = 8192  # elements of partial sums a program adds at a time: 64 registers of 128 threads


def _tile(rows: int) -> int:
    return max(MIN_TILE, 1 << (rows - 1).bit_length())


def whole_tiles(n_rows: int) -> tuple[int, int]:
    """Two powers of two that hold n_rows keys: 282 -> (256, 32), 60 -> (64, 0)."""
    one = _tile(n_rows)
    if n_rows == one or one == MIN_TILE:
        return one, 0
    rest = _tile(n_rows - one // 2)
    return (one, 0) if rest * 2 >= one else (one // 2, rest)


@lru_cache(maxsize=4096)
def _plan(
    n_tokens: int, n_registers: int, n_head: int, head_dim: int, window: int, dtype: torch.dtype,
    registers_out: bool, tf32: bool, architecture: str,
):  # fmt: skip
    """Everything a launch needs that follows from shapes: which kernels, and their constexprs by kernel name."""
    n_rows = n_registers + n_tokens
    block_d = _tile(head_dim)
    shared = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    products = {"PRECISION": "tf32" if tf32 and dtype == torch.float32 else "ieee"}
    has_window = window >= 0 and window // 2 < n_tokens - 1
    scalars = (n_tokens, n_registers, window // 2, n_head, head_dim**-0.5 / math.log(2))
    size = torch.finfo(dtype).bits // 8
    sums = {**shared, "BLOCK_S": PARTIAL_TILE // block_d, "REGISTERS_OUT": registers_out, "num_warps": 4}
    if config.is_short(n_rows, block_d, size, architecture):
        block_a, block_b = whole_tiles(n_rows)
        n_queries = n_rows if registers_out else n_tokens
        flags = {
            "HAS_WINDOW": has_window,
            "HAS_REGISTERS": n_registers > 0,
            "REGISTERS_OUT": registers_out,
            "BLOCK_A": block_a,
            "BLOCK_B": block_b,
        }
        plans = {"whole": True, "register_gradient": sums}
        for name in ("whole_forward", "whole_backward"):
            chosen = config.launch_config(name, n_rows, block_d, size, architecture)
            block_m = min(chosen["BLOCK_M"], _tile(n_queries))
            one = block_m >= n_queries
            even = one and block_m == block_a == n_rows and n_registers == 0
            plans[name] = {
                **shared, **products, **flags, **chosen.keywords(), "BLOCK_M": block_m, "ONE_BLOCK": one, "EVEN": even,
            }  # fmt: skip
        return scalars, plans

    rotate = window >= 0 or n_tokens < ROTATE_FROM
    block_r = _tile(max(1, n_registers))
    plans = {"whole": False, "rotated": not rotate, "register_gradient": sums}
    flags = {"BLOCK_R": block_r, "HAS_WINDOW": has_window, "ROTATE": rotate}
    for name in ("blocks_forward", "grad_query", "grad_key"):
        chosen = config.launch_config(name, n_rows, block_d, size, architecture)
        plans[name] = {**shared, **products, **flags, **chosen.keywords()}
    plans["blocks_forward"]["HAS_REGISTERS"] = plans["grad_query"]["HAS_REGISTERS"] = n_registers > 0
    plans["grad_key"]["REGISTERS_OUT"] = registers_out
    plans["rotate"] = {**shared, "BLOCK_M": max(MIN_TILE, 4096 // block_d), "num_warps": 4}
    chosen = config.launch_config("register", n_rows, block_d, size, architecture)
    plans["register_forward"] = plans["register_backward"] = {
        **shared, **products, "BLOCK_R": block_r, "CHUNK": CHUNK, "ROTATE": rotate, **chosen.keywords(),
    }  # fmt: skip
    plans["register_join"] = {**shared, "BLOCK_R": JOIN_ROWS, "num_warps": 1}
    return scalars, plans


def is_whole(qkv: Tensor, n_head: int, n_registers: int) -> bool:
    block_d, size = _tile(qkv.shape[2] // (3 * n_head)), qkv.element_size()
    return config.is_short(n_registers + qkv.shape[1], block_d, size, runtime.architecture(qkv.device))


def _plan_of(qkv: Tensor, n_head: int, window: int, register_qkv: Tensor | None, registers_out: bool):
    return _plan(
        qkv.shape[1],
        0 if register_qkv is None else register_qkv.shape[1],
        n_head,
        qkv.shape[2] // (3 * n_head),
        window,
        qkv.dtype,
        registers_out,
        torch.backends.cuda.matmul.allow_tf32,
        runtime.architecture(qkv.device),
    )


def lse_size(n_heads: int, n_tokens: int, n_registers: int, registers_out: bool) -> int:
    return n_heads * (n_tokens + n_registers if registers_out else n_tokens)


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _register_arguments(qkv: Tensor, register_qkv: Tensor | None) -> tuple[Tensor, int, int]:
    """The registers' tensor, its stride of a batch (0 if all share them) and of a row; qkv itself if there are none."""
    if register_qkv is None:
        return qkv, 0, 0
    return register_qkv, register_qkv.stride(0) if register_qkv.shape[0] > 1 else 0, register_qkv.stride(1)


def _rotated(qkv: Tensor, rope: Tensor, n_registers: int, n_head: int, plan: dict) -> Tensor:
    batch, n_tokens, width = qkv.shape
    rotated = torch.empty((batch, n_tokens, width // 3 * 2), dtype=qkv.dtype, device=qkv.device)
    grid = (batch * 2 * n_head * triton.cdiv(n_tokens, plan["BLOCK_M"]),)
    _rotate_kernel[grid](qkv, rope, rotated, qkv.stride(0), qkv.stride(1), n_tokens, n_registers, n_head, **plan)
    return rotated


def _on_its_device(launch_kernels):
    """Triton launches on the current device, which need not be the tensors'."""

    @wraps(launch_kernels)
    def launch_there(x: Tensor, *arguments):
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return launch_kernels(x, *arguments)
        with torch.cuda.device(x.device):
            return launch_kernels(x, *arguments)

    return launch_there


@_on_its_device
def forward(
    qkv: Tensor, rope: Tensor, register_qkv: Tensor | None, n_head: int, window: int, registers_out: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, T, C); what the registers see (B, R, C) or empty; statistics or empty."""
    qkv, rope = _readable(qkv), rope.contiguous()
    register_qkv = None if register_qkv is None else _readable(register_qkv)
    (n_tokens, n_registers, half_window, _, scale), plans = _plan_of(qkv, n_head, window, register_qkv, registers_out)
    batch, _, width = qkv.shape
    registers, stride_register_b, stride_register_r = _register_arguments(qkv, register_qkv)
    out = torch.empty((batch, n_tokens, width // 3), dtype=qkv.dtype, device=qkv.device)
    shape = (batch, n_registers, width // 3) if registers_out else (0,)
    register_out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(
        lse_size(batch * n_head, n_tokens, n_registers, registers_out) if keep and not plans["whole"] else 0,
        dtype=torch.float32,
        device=qkv.device,
    )

    if plans["whole"]:
        _whole_forward_kernel[(batch * n_head,)](
            qkv, rope, registers, out, register_out,
            qkv.stride(0), qkv.stride(1), stride_register_b, stride_register_r,
            n_tokens, n_registers, half_window, n_head, scale, **plans["whole_forward"],
        )  # fmt: skip
        return out, register_out, lse

    v = qkv[..., 2 * (width // 3) :]
    qk = _rotated(qkv, rope, n_registers, n_head, plans["rotate"]) if plans["rotated"] else qkv
    strides = (
        qk.stride(0), qk.stride(1), qkv.stride(0), qkv.stride(1), stride_register_b, stride_register_r,
    )  # fmt: skip
    plan = plans["blocks_forward"]
    grid = (batch * n_head * triton.cdiv(n_tokens, plan["BLOCK_M"]),)
    _blocks_forward_kernel[grid](
        qk, v, rope, registers, out, lse, *strides,
        n_tokens, n_registers, half_window, n_head, scale, KEEP_LSE=keep, **plan,
    )  # fmt: skip
    if registers_out:
        n_chunks = triton.cdiv(n_tokens, CHUNK)
        rows = (batch, n_head, n_chunks, n_registers)
        m = torch.empty(rows, dtype=torch.float32, device=qkv.device)
        total = torch.empty(rows, dtype=torch.float32, device=qkv.device)
        acc = torch.empty((*rows, width // (3 * n_head)), dtype=torch.float32, device=qkv.device)
        _register_forward_kernel[(batch * n_head * n_chunks,)](
            qk, v, rope, registers, m, total, acc, *strides,
            n_tokens, n_registers, n_head, scale, n_chunks, **plans["register_forward"],
        )  # fmt: skip
        _register_join_kernel[(batch * n_head * triton.cdiv(n_registers, JOIN_ROWS),)](
            m, total, acc, register_out, lse[batch * n_head * n_tokens :] if keep else lse,
            n_registers, n_head, n_chunks, scale,
            KEEP_LSE=keep, **plans["register_join"],
        )  # fmt: skip
    return out, register_out, lse


@_on_its_device
def backward(
    grad_out: Tensor, grad_register_out: Tensor | None, qkv: Tensor, rope: Tensor, register_qkv: Tensor | None,
    out: Tensor, register_out: Tensor, lse: Tensor, n_head: int, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad_qkv (B, T, 3C) and grad_register_qkv (B or 1, R, 3C) or empty."""
    qkv, rope, grad_out = _readable(qkv), rope.contiguous(), _readable(grad_out)
    registers_out = grad_register_out is not None
    if registers_out:
        grad_register_out = _readable(grad_register_out)
    else:
        grad_register_out = grad_out
    register_qkv = None if register_qkv is None else _readable(register_qkv)
    (n_tokens, n_registers, half_window, _, scale), plans = _plan_of(qkv, n_head, window, register_qkv, registers_out)
    batch, _, width = qkv.shape
    registers, stride_register_b, stride_register_r = _register_arguments(qkv, register_qkv)
    grads = (grad_out.stride(0), grad_out.stride(1), grad_register_out.stride(0), grad_register_out.stride(1))
    grad_qkv = torch.empty((batch, n_tokens, width), dtype=qkv.dtype, device=qkv.device)

    if plans["whole"]:
        n_slots, first_slot, last_slot_q, last_slot = 1, 0, 1, 1
        partial = _partials(qkv, n_slots, n_registers)
        _whole_backward_kernel[(batch * n_head,)](
            qkv, rope, registers, grad_out, grad_register_out, grad_qkv, partial,
            qkv.stride(0), qkv.stride(1), stride_register_b, stride_register_r, *grads,
            n_tokens, n_registers, half_window, n_head, scale, **plans["whole_backward"],
        )  # fmt: skip
    else:
        v = qkv[..., 2 * (width // 3) :]
        qk = _rotated(qkv, rope, n_registers, n_head, plans["rotate"]) if plans["rotated"] else qkv
        strides = (
            qk.stride(0), qk.stride(1), qkv.stride(0), qkv.stride(1), stride_register_b, stride_register_r,
        )  # fmt: skip
        plan_q, plan_k = plans["grad_query"], plans["grad_key"]
        blocks_q, blocks_k = triton.cdiv(n_tokens, plan_q["BLOCK_M"]), triton.cdiv(n_tokens, plan_k["BLOCK_N"])
        n_chunks = triton.cdiv(n_tokens, CHUNK) if registers_out else 0
        n_slots = max(1 + blocks_q, n_chunks)
        first_slot, last_slot_q, last_slot = 0 if registers_out else 1, n_chunks, 1 + blocks_q
        partial = _partials(qkv, n_slots, n_registers)
        delta = torch.empty((batch, n_head, n_tokens), dtype=torch.float32, device=qkv.device)
        _grad_query_kernel[(batch * n_head * blocks_q,)](
            qk, v, rope, registers, out, grad_out, lse, delta, grad_qkv, partial, *strides, *grads[:2],
            n_tokens, n_registers, half_window, n_head, scale, n_slots, **plan_q,
        )  # fmt: skip
        register_lse = lse[batch * n_head * n_tokens :] if registers_out else lse
        _grad_key_kernel[(batch * n_head * blocks_k,)](
            qk, v, rope, registers, register_out, grad_out, grad_register_out, lse, register_lse,
            delta, grad_qkv, *strides, *grads, n_tokens, n_registers, half_window, n_head, scale, **plan_k,
        )  # fmt: skip
        if registers_out:
            _register_backward_kernel[(batch * n_head * n_chunks,)](
                qk, v, rope, registers, register_out, grad_register_out, register_lse, partial, *strides, *grads[2:],
                n_tokens, n_registers, n_head, scale, n_chunks, n_slots, **plans["register_backward"],
            )  # fmt: skip

    if register_qkv is None:
        return grad_qkv, qkv.new_empty((0,))
    grad_register = torch.empty(register_qkv.shape, dtype=qkv.dtype, device=qkv.device)
    groups = register_qkv.shape[0]
    n_batches = batch // groups
    if n_slots == 1:  # one partial sum a batch: as if all were of one
        n_slots, last_slot_q, last_slot, n_batches = n_batches, n_batches, n_batches, 1
    _register_gradient_kernel[(groups * n_registers * 3 * n_head,)](
        partial, rope, grad_register, n_registers, n_head, n_slots, n_batches,
        first_slot, last_slot_q, last_slot, **plans["register_gradient"],
    )  # fmt: skip
    return grad_qkv, grad_register


def _partials(qkv: Tensor, n_slots: int, n_registers: int) -> Tensor:
    if n_registers == 0:
        return qkv  # not written
    return torch.empty((qkv.shape[0], n_slots, n_registers, qkv.shape[2]), dtype=torch.float32, device=qkv.device)


# ---- ahead of time ---------------------------------------------------------------------------------------------------

WORKLOADS = {  # tokens, heads, head size, window, registers
    "att-freq": (64, 4, 32, -1, 0),
    "att-time": (282, 4, 32, -1, 0),
    "att-long": (8192, 8, 64, 128, 4),
    "att-huge": (65536, 8, 32, 256, 8),
    "full": (4096, 8, 64, -1, 0),
}
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNELS = {
    "whole_forward": _whole_forward_kernel,
    "whole_backward": _whole_backward_kernel,
    "rotate": _rotate_kernel,
    "blocks_forward": _blocks_forward_kernel,
    "grad_query": _grad_query_kernel,
    "grad_key": _grad_key_kernel,
    "register_forward": _register_forward_kernel,
    "register_backward": _register_backward_kernel,
    "register_join": _register_join_kernel,
    "register_gradient": _register_gradient_kernel,
}
# Float32 whatever the inputs are.
STATISTICS = {
    "rope_ptr",
    "lse_ptr",
    "register_lse_ptr",
    "delta_ptr",
    "partial_ptr",
    "m_ptr",
    "total_ptr",
    "acc_ptr",
}


def _type_of(name: str, element: str) -> str:
    if name.endswith("_ptr"):
        return "*fp32" if name in STATISTICS else f"*{element}"
    return "fp32" if name == "scale" else "i32"


def aot_cases(architecture: str = "sm_90", dtypes: tuple = (torch.bfloat16, torch.float32)):
    """Every kernel of the standard workloads as a `CompileCase`, as an architecture would launch it."""
    for workload, (n_tokens, n_head, head_dim, window, n_registers) in WORKLOADS.items():
        for dtype, registers_out in [(dtype, out) for dtype in dtypes for out in {False, n_registers > 0}]:
            _, plans = _plan(n_tokens, n_registers, n_head, head_dim, window, dtype, registers_out, False, architecture)
            for name, kernel in KERNELS.items():
                if name not in plans or (name == "rotate" and not plans["rotated"]):
                    continue
                if name.startswith("register") and not (registers_out or (name == "register_gradient" and n_registers)):
                    continue
                constants = dict(plans[name])
                keywords = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
                if "KEEP_LSE" in kernel.arg_names:
                    constants["KEEP_LSE"] = True
                signature = {
                    name: "constexpr" if name in constants else _type_of(name, ELEMENTS[dtype])
                    for name in kernel.arg_names
                }
                label = f"{workload} {ELEMENTS[dtype]}{' registers out' if registers_out else ''}: {name}"
                strides = tuple(argument for argument in signature if argument.startswith("stride_"))
                yield CompileCase(label, kernel, signature, constants, launch.config(**keywords), strides)
