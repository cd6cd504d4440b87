"""One small case a block: how it is made, what it is fed, and its reference. The tests of what all blocks share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import fastblocks
from tests.modules.harness import randomized
from tests.reference import blocks


def tokens(reference: Callable) -> Callable:
    """Of (tokens, registers) the tokens."""
    return lambda *arguments: reference(*arguments)[0]


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    reference: Callable
    terms: int
    keywords: dict = field(default_factory=dict)  # of forward

    def module(self) -> nn.Module:
        return randomized(self.make())

    def input(self, *leading: int, batch: int | None = None, **options) -> Tensor:
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        return torch.randn(*leading, *shape, **options)

    def call(self, module: nn.Module) -> Callable:
        return partial(module, **self.keywords)


def _convnext(cls, kernel, stride, dims, mode, variant, sizes, original_shape=None, batch=2) -> Case:
    spatial = len(sizes)
    per_dim = (stride,) * spatial if isinstance(stride, int) else stride
    name = f"convnext{spatial}d-{variant}-{mode}-s{stride}-{'keep' if dims[0] == dims[1] else 'change'}"
    reference = partial(
        blocks.convnext_block, stride=per_dim, mode=mode, variant=variant, original_shape=original_shape
    )
    rows = batch * int(torch.Size(original_shape or sizes).numel())
    keywords = {} if original_shape is None else {"original_shape": original_shape}
    return Case(
        name,
        partial(cls, kernel, stride, *dims, mode, variant=variant),
        (batch, dims[0], *sizes),
        reference,
        max(rows * 4, 4 * dims[0] * 9),
        keywords,
    )


ConvNeXt1D, ConvNeXt2D = fastblocks.ConvNeXt1DBlock, fastblocks.ConvNeXt2DBlock

ROFORMER = [
    Case(
        "roformer",
        lambda: fastblocks.RoFormerBlock(16, 2, 12),
        (2, 11, 16),
        tokens(partial(blocks.roformer_block, n_head=2)),
        64,
    ),
    Case(
        "roformer-base",
        lambda: fastblocks.RoFormerBlock(24, 2, 40, rope_base=500),
        (1, 40, 24),
        tokens(partial(blocks.roformer_block, n_head=2, base=500)),
        96,
    ),
    Case(
        "registers",
        lambda: fastblocks.AttentionRegisterRoFormerBlock(16, 2, 50, num_register_tokens=3, window_size=6),
        (2, 45, 16),
        tokens(partial(blocks.roformer_block, n_head=2, window=6)),
        128,
    ),
    Case(
        "window",
        lambda: fastblocks.AttentionRegisterRoFormerBlock(16, 4, 70, window_size=9),
        (2, 70, 16),
        tokens(partial(blocks.roformer_block, n_head=4, window=9)),
        160,
    ),
]

RNN = [
    Case(
        f"{kind}-{'both' if both else 'one'}-{layers}",
        partial(fastblocks.RNNBlock, 16, layers, groups, kind, both),
        (2, 9, 16),
        partial(blocks.rnn_block, n_groups=groups, n_layer=layers, rnn_type=kind, bidirectional=both),
        64,
    )
    for kind in ("gru", "lstm")
    for both, layers, groups in ((False, 1, 2), (False, 2, 4), (True, 2, 2), (True, 1, 1))
]

CONVNEXT = [
    _convnext(ConvNeXt1D, 7, 1, (8, 8), "normal", "convnext", (19,)),
    _convnext(ConvNeXt1D, 5, 1, (8, 12), "normal", "convnext", (17,)),
    _convnext(ConvNeXt1D, 5, 3, (8, 8), "normal", "convnext", (17,)),
    _convnext(ConvNeXt1D, 5, 3, (8, 6), "transposed", "convnext", (6,), (18,)),
    _convnext(ConvNeXt1D, 3, 1, (8, 8), "transposed", "convnext", (9,)),
    _convnext(ConvNeXt2D, 7, 1, (8, 8), "normal", "convnext", (6, 5), batch=1),
    _convnext(ConvNeXt2D, (3, 5), (2, 3), (8, 10), "normal", "convnext", (7, 8)),
    _convnext(ConvNeXt2D, (5, 3), (2, 2), (10, 8), "transposed", "convnext", (4, 3), (8, 5)),
    _convnext(ConvNeXt1D, 5, 2, (8, 8), "normal", "msrkit", (11,)),
    _convnext(ConvNeXt1D, 5, 2, (8, 6), "transposed", "msrkit", (6,), (12,)),
    _convnext(ConvNeXt2D, 3, 1, (8, 6), "normal", "msrkit", (5, 4)),
    _convnext(ConvNeXt2D, (3, 5), (2, 1), (6, 8), "transposed", "msrkit", (3, 4)),
]

BLOCKS = ROFORMER + RNN + CONVNEXT
