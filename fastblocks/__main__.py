"""`python -m fastblocks`: what runs here, and whether it computes the right numbers."""

import platform
import sys

import torch
from torch import Tensor, nn

import fastblocks
from fastblocks import backend


def environment() -> list[str]:
    """A line each on versions, devices and the backend."""
    runtime, problem = backend._kernel_runtime()
    triton = problem if runtime is None else runtime.triton.__version__
    lines = [
        f"fastblocks {fastblocks.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"Triton: {triton}" + (", interpreted" if runtime is not None and runtime.INTERPRETED else ""),
        f"backend: {backend.selected()}",
    ]
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        name = "" if runtime is None else f" ({runtime.architecture(device)})"
        lines.append(f"GPU {i}: {torch.cuda.get_device_name(device)}{name}")
    return lines if torch.cuda.is_available() else [*lines, "GPU: none"]


def blocks() -> dict[str, tuple[nn.Module, Tensor]]:
    """A small block of each kind, and what it is fed."""
    return {
        "RoFormerBlock": (fastblocks.RoFormerBlock(32, 2, 40), torch.randn(2, 40, 32)),
        "AttentionRegisterRoFormerBlock": (
            fastblocks.AttentionRegisterRoFormerBlock(32, 2, 150, num_register_tokens=2, window_size=16),
            torch.randn(1, 150, 32),
        ),
        "RNNBlock, GRU": (fastblocks.RNNBlock(32, 1, 2), torch.randn(2, 6, 32)),
        "RNNBlock, LSTM": (fastblocks.RNNBlock(32, 1, 2, "lstm", True), torch.randn(2, 6, 32)),
        "ConvNeXt1DBlock": (fastblocks.ConvNeXt1DBlock(7, 1, 32, 32), torch.randn(2, 32, 50)),
        "ConvNeXt2DBlock": (fastblocks.ConvNeXt2DBlock(3, 2, 8, 16), torch.randn(1, 8, 9, 7)),
    }


def error(block: nn.Module, x: Tensor) -> float:
    """‖difference‖ / ‖reference‖ of the output and all gradients, against plain PyTorch in float64."""
    found = []
    for dtype, name in ((torch.float64, "eager"), (torch.float32, None)):
        twin, leaf = block.to(dtype), x.to(dtype).detach().requires_grad_()
        with backend.use_backend(name or backend.selected()):
            y = twin(leaf)
            grads = torch.autograd.grad(y.square().sum(), [leaf, *twin.parameters()])
        found.append([y.detach(), *grads])
    return max(float((b - a).norm() / a.norm().clamp(min=1e-30)) for a, b in zip(*found, strict=True))


def main() -> int:
    """Returns the exit code: 1 if a block is wrong."""
    print("\n".join(environment()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    wrong = 0
    for name, (block, x) in blocks().items():
        block, x = block.to(device), x.to(device)
        off = error(block, x)
        right = off < 1e-3 if torch.cuda.is_available() else off < 1e-4  # a GPU may multiply in TF32
        wrong += not right
        print(f"\n{name}: {'right' if right else 'WRONG'} (off by {off:.0e})")
        print("  " + fastblocks.explain(block, x).replace("\n", "\n  "))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
