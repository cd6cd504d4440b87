"""The rivals of the grouped recurrences: layers with the baseline's weights in their own layout."""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.providers.skipped import Skipped


class BlockDiagonal(nn.Module):
    """All groups as one nn.GRU or nn.LSTM, whose weights are zero between groups.

    Args:
        layers_only: a `GroupedRNN` of the original; its weights are copied.
        channels, layers, groups, kind, both: of it.
    """

    def __init__(self, layers_only: nn.Module, channels: int, layers: int, groups: int, kind: str, both: bool):
        super().__init__()
        self.groups, self.directions = groups, 1 + both
        hidden = channels // groups // self.directions
        make = {"gru": nn.GRU, "lstm": nn.LSTM}[kind]
        self.rnn = make(channels, groups * hidden, layers, bias=False, batch_first=True, bidirectional=both)
        with torch.no_grad():
            for name, dense in self.rnn.named_parameters():
                parts = [getattr(rnn, name) for rnn in layers_only.rnns]
                dense.zero_()
                deep = name.startswith("weight_ih") and "_l0" not in name  # reads all groups of each direction
                lanes = self.directions if deep else 1
                width = parts[0].shape[1] // lanes
                blocks = dense.view(-1, groups, hidden, lanes, groups, width)
                for g, part in enumerate(parts):
                    blocks[:, g, :, :, g] = part.view(-1, hidden, lanes, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        if self.directions == 1:
            return y
        return y.unflatten(-1, (self.directions, self.groups, -1)).transpose(-3, -2).flatten(-3)


class FlashRNN(nn.Module):
    """FlashRNN's Triton backend with the input's product in front of it, one layer of LSTM.

    Source: Pöppel et al., "FlashRNN: I/O-Aware Optimization of Traditional RNNs on modern hardware", 2024.
    """

    def __init__(self, layers_only: nn.Module, channels: int, groups: int, **_):
        super().__init__()
        width = channels // groups
        inputs = torch.stack([rnn.weight_ih_l0.detach().view(4, width, width) for rnn in layers_only.rnns], 1)
        hidden = torch.stack([rnn.weight_hh_l0.detach().view(4, width, width) for rnn in layers_only.rnns], 1)
        self.weight_ih = nn.Parameter(inputs)  # (gates i f g o, groups, out, in)
        self.weight_hh = nn.Parameter(hidden)

    @staticmethod
    def check(device: torch.device, kind: str, width: int) -> None:
        """Raises Skipped if it cannot run."""
        if find_spec("flashrnn") is None:
            raise Skipped("flashrnn is not installed")
        if device.type != "cuda":
            raise Skipped("FlashRNN needs a GPU")
        if kind != "lstm":
            raise Skipped("its GRU multiplies the reset gate in another place")
        if width > 64:
            raise Skipped(f"its Triton backend takes heads of up to 64, these have {width}")

    def forward(self, x: Tensor) -> Tensor:
        from flashrnn import flashrnn

        gates, groups, width, _ = self.weight_ih.shape
        pre = torch.einsum("btgi,kgoi->btkgo", x.unflatten(-1, (groups, -1)), self.weight_ih)
        bias = pre.new_zeros(gates, groups, width)
        states, _ = flashrnn(pre, self.weight_hh.to(pre.dtype), bias, function="lstm", backend="triton_fused")
        return states[0].flatten(-2)
