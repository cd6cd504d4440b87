"""The least time that a workload can take on a device, from bytes that must move and products that must be made."""

from dataclasses import dataclass

import torch

# Measured on the device: a large copy (bytes read and written, per second), a large bf16 product (FLOP/s). The float32
# rate without TF32 is lower, so there the floor is a bound, but a loose one.
LIMITS = {"H100": (3.0e12, 798e12), "H200": (4.3e12, 790e12)}


@dataclass(frozen=True)
class Work:
    """What one call must move and multiply."""

    bytes: int
    flops: int

    def floor(self, device_name: str) -> float | None:
        """Seconds; None for a device whose limits were not measured."""
        for part, (bandwidth, rate) in LIMITS.items():
            if part in device_name:
                return max(self.bytes / bandwidth, self.flops / rate)
        return None


def work(mode: str, inputs: list[torch.Tensor], weights: list, outputs: list, flops: int) -> Work:
    """Each tensor read or written once.

    Forward reads inputs and weights and writes outputs. Backward reads inputs, weights and the outputs' gradients, and
    writes a gradient for each that wants one; its products are twice forward's. Training is both.
    """

    def size(tensors: list[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    read = size(inputs) + size(weights)
    forward = Work(read + size(outputs), flops)
    gradients = size([t for t in (*inputs, *weights) if t.requires_grad])
    backward = Work(read + size(outputs) + gradients, 2 * flops)
    both = Work(forward.bytes + backward.bytes, 3 * flops)
    return {"forward": forward, "backward": backward, "training": both}[mode]
