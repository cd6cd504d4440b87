"""The least time that a workload can take on a device, from bytes that must move and products that must be made."""

import torch

# Measured on the device: a large copy (bytes read and written, per second), a large bf16 product (FLOP/s). The float32
# rate without TF32 is lower, so there the floor is a bound, but a loose one.
LIMITS = {"H100": (3.0e12, 798e12), "H200": (4.3e12, 790e12)}


def limits(device_name: str) -> tuple[float, float] | None:
    """Of `LIMITS`; None for a device that was not measured."""
    return next((limit for name, limit in LIMITS.items() if name in device_name), None)


def floor(row: dict, device_name: str) -> float | None:
    """Seconds for a row's `bytes` and `flops`; None where the limits are not known."""
    found = limits(device_name)
    return found and max(row["bytes"] / found[0], row["flops"] / found[1])


def work(mode: str, inputs: list[torch.Tensor], weights: list, outputs: int, flops: int) -> dict[str, int]:
    """`bytes` and `flops` of one call, each tensor read or written once; `outputs` is the bytes of those.

    Forward reads inputs and weights and writes outputs. Backward reads inputs, weights and the outputs' gradients, and
    writes a gradient for each that wants one; its products are twice forward's. Training is both.
    """
    forward = size([*inputs, *weights]) + outputs
    backward = forward + size([t for t in (*inputs, *weights) if t.requires_grad])
    moved = {"forward": forward, "backward": backward, "training": forward + backward}[mode]
    return {"bytes": moved, "flops": {"forward": 1, "backward": 2, "training": 3}[mode] * flops}


def size(tensors: list[torch.Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)
