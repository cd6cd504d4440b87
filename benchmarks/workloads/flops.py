"""FLOPs of one forward pass: two for each multiply-add of a product; pointwise work is not counted."""


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def attention(batch: int, length: int, channels: int, window: int = -1, registers: int = 0) -> int:
    """q·k and p·v of the pairs that a mask lets through; registers are keys, and queries for nobody."""
    if window == -1:
        pairs = length * length
    else:
        half = min(window // 2, length - 1)
        pairs = length * (2 * half + 1) - half * (half + 1)
    return 4 * batch * channels * (pairs + length * registers)


def swiglu_mlp(rows: int, channels: int, hidden: int | None = None) -> int:
    return 3 * linear(rows, channels, hidden or int(8 * channels / 3))


def roformer(batch: int, length: int, channels: int, window: int = -1, registers: int = 0) -> int:
    """A whole block; the registers' keys and values are counted once."""
    rows = batch * length
    products = linear(rows + registers, channels, 3 * channels) + linear(rows, channels, channels)
    return products + attention(batch, length, channels, window, registers) + swiglu_mlp(rows, channels)


def grouped_rnn(rows: int, inputs: int, hidden: int, groups: int, gates: int, directions: int = 1) -> int:
    """One layer; `inputs` and `hidden` are those of one group."""
    return directions * groups * linear(rows, inputs + hidden, gates * hidden)


def rnn_block(rows: int, channels: int, layers: int, groups: int, gates: int, directions: int) -> int:
    width = channels // groups
    layer = grouped_rnn(rows, width, width // directions, groups, gates, directions)
    return layers * layer + swiglu_mlp(rows, channels)


def convnext(rows_in: int, rows_out: int, taps: int, inputs: int, outputs: int, transposed: bool = False) -> int:
    """A block; the residual's 1×1 convolution where sizes or channels change."""
    total = 2 * (rows_in if transposed else rows_out) * taps * inputs
    total += linear(rows_out, inputs, 4 * inputs) + linear(rows_out, 4 * inputs, outputs)
    if rows_in != rows_out or inputs != outputs:
        total += linear(rows_in if transposed else rows_out, inputs, outputs)
    return total
