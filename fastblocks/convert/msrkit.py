"""Blocks of MSRKit, of the models derived from it, and of `benchmarks.original`."""

from itertools import product

import torch
from torch import Tensor, nn

from fastblocks import functional
from fastblocks.convert.adapter import Adapter, Arguments, Block, Call, Foreign, Refused, torch_computes
from fastblocks.discriminator.MultiFrequencyDiscriminator import MultiFrequencyDiscriminator
from fastblocks.discriminator.MultiPeriodDiscriminator import MultiPeriodDiscriminator
from fastblocks.discriminator.MultiResolutionDiscriminator import MultiResolutionDiscriminator
from fastblocks.discriminator.MultiScaleDiscriminator import MultiScaleDiscriminator
from fastblocks.generator.AttentionRegisterRoFormerBlock import AttentionRegisterRoFormerBlock
from fastblocks.generator.ConvNeXt1DBlock import ConvNeXt1DBlock
from fastblocks.generator.ConvNeXt2DBlock import ConvNeXt2DBlock
from fastblocks.generator.RNNBlock import RNNBlock
from fastblocks.generator.RoFormerBlock import RoFormerBlock
from fastblocks.spectral_ops import Band, Fourier, linear_filterbank, mel_filterbank

# --- RoFormerBlock and its register block


def rope_table_of(attention: nn.Module) -> Tensor | None:
    """The rotary table (positions, D / 2, 2) that an attention holds."""
    tables = (getattr(attention, name, None) for name in ("rope_cache", "rope"))
    return next((table for table in tables if isinstance(table, Tensor) and table.dim() == 3), None)


def rope_base_of(table: Tensor) -> float:
    """The base that gives a table again; a number of few digits where one does.

    Raises:
        Refused: if none does: other frequencies, positions or layout.
    """
    positions, half, _ = table.shape
    if positions < 2 or half < 2:
        candidates = [10000.0]  # nothing depends on it
    else:
        angle = torch.atan2(table[1, -1, 1].double(), table[1, -1, 0].double())
        if not angle > 0:
            raise Refused("its rotary table does not begin with position 0 and growing angles")
        base = float(angle ** (-half / (half - 1)))
        candidates = [float(f"{base:.{digits}g}") for digits in range(1, 9)] + [base]
    have = table.detach().cpu().double()
    # two roundings of the table's dtype, and float32's of the frequency, times the position
    position = torch.arange(positions, dtype=torch.float64)[:, None, None]
    allowed = 2 * torch.finfo(table.dtype).eps + (4 + 2 * position) * torch.finfo(torch.float32).eps
    for base in candidates:
        if ((functional.rope_table(positions, 2 * half, base).double() - have).abs() <= allowed).all():
            return int(base) if base == int(base) else base
    raise Refused("its rotary table is not that of any base")


def _roformer(block: Block, registers: int = 0) -> Arguments:
    n_embd = block.says("n_embd", block.shape("att_norm.scale")[0])
    attention = block.module.att
    holders = (attention,)
    n_head = block.attribute("n_head", "n_heads", "num_heads", "heads", holders=holders)
    table = rope_table_of(attention)
    if table is None:
        max_seq_len = block.attribute("max_seq_len", "max_len", "max_seq_length", holders=holders)
    else:
        max_seq_len = block.says("max_seq_len", table.shape[0] - registers)
    if table is None or table.is_meta:
        rope_base = block.attribute("rope_base", "rope_theta", "base", holders=holders)
    else:
        rope_base = block.says("rope_base", rope_base_of(table))
        if n_head is not None and tuple(table.shape[1:]) != (n_embd // n_head // 2, 2):
            raise Refused(f"its rotary table is {tuple(table.shape)}, not (positions, channels of a head / 2, 2)")
    return {"n_embd": n_embd, "n_head": n_head, "max_seq_len": max_seq_len, "rope_base": rope_base}


def _register_roformer(block: Block) -> Arguments:
    registers = block.shape("registers")[0] if "registers" in block.state else 0
    window = block.attribute("window_size", "window", holders=(block.module.att,))
    arguments = _roformer(block, registers)
    return {**arguments, "num_register_tokens": block.says("num_register_tokens", registers), "window_size": window}


def _masks_in_reverse(module: nn.Module) -> bool:
    """The kit's register block, which is called RoFormerBlock, too: its attention knows registers and a window."""
    return hasattr(getattr(module, "att", None), "num_register_tokens")


def _kit_register_roformer(block: Block) -> Arguments:
    arguments = _roformer(block)
    attention, decided = block.module.att, ("num_register_tokens", "window_size")
    if any(name not in block.given for name in decided):
        registers, window = attention.num_register_tokens, attention.window_size
        raise Refused(
            f"this is the kit's register block (num_register_tokens={registers}, window_size={window}). Its mask is "
            "inverted: a token sees what is outside its window, and no register; and its registers are the sequence's "
            "first positions, not learnt. No block of fastblocks computes that. To have what was meant, in other "
            "numbers, pass num_register_tokens (0 where the sequence brings its own; more are learnable, new, and not "
            "yet in an optimizer) and window_size by the block's path in arguments; or leave it alone by skip"
        )
    return {**arguments, **{name: block.given[name] for name in decided}}


def _adopt_rope(original: nn.Module, replacement: nn.Module) -> None:
    """The original's own table: every angle stays what it was."""
    table = rope_table_of(original.att)
    if table is not None and table.shape == replacement.att.rope.shape:
        replacement.att.rope = table.float()


def _sequence(arguments: Arguments) -> list[Call]:
    length = min(arguments.get("max_seq_len", 11), max(11, arguments.get("window_size", -1) // 2 + 3))
    return [("forward", (2, length, arguments["n_embd"]))]


# --- RNNBlock


def _rnn(block: Block) -> Arguments:
    rows, hidden = block.shape("rnn.rnns.0.weight_hh_l0")
    if rows not in (3 * hidden, 4 * hidden):
        raise Foreign(f"its weight_hh_l0 has {rows} rows for {hidden} channels: neither 3 times (GRU) nor 4 (LSTM)")
    weights = [key.split(".")[2:] for key in block.state if key.startswith("rnn.rnns.") and "weight_hh" in key]
    return {
        "n_embd": block.says("n_embd", block.shape("rnn_norm.scale")[0]),
        "n_layer": block.says("n_layer", sum(g == "0" and "_reverse" not in weight for g, weight in weights)),
        "n_groups": block.says("n_groups", len({group for group, _ in weights})),
        "rnn_type": block.says("rnn_type", "gru" if rows == 3 * hidden else "lstm"),
        "bidirectional": block.says("bidirectional", any("_reverse" in weight for _, weight in weights)),
    }


def _lstm(arguments: Arguments, kernels: bool) -> str:
    return torch_computes("LSTM layers")(arguments, kernels) if arguments["rnn_type"] == "lstm" else ""


# --- ConvNeXt blocks


def _convnext(block: Block) -> Arguments:
    conv = block.module.dwconv
    transposed = isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d)
    told = {
        "kernel_size": tuple(conv.kernel_size),
        "stride": tuple(conv.stride),
        "input_dim": conv.in_channels,
        "output_dim": block.shape("pwconv2.weight")[0],
        "mode": "transposed" if transposed else "normal",
        "variant": "msrkit" if "norm.scale" in block.state else "convnext",
    }
    return {name: block.says(name, value) for name, value in told.items()}


def _image(arguments: Arguments) -> list[Call]:
    sizes = (k + s + 1 for k, s in zip(arguments["kernel_size"], arguments["stride"], strict=True))
    return [("forward", (1, arguments["input_dim"], *sizes))]


# --- discriminators


def _judge(block: Block, first: str) -> tuple[torch.Size, Arguments]:
    """The shape of the first convolution's weight (out, in, …), and whether all are normed."""
    endings = {"_orig": True, "_v": "weight", "": False}  # spectral norm also has a weight_v
    end = next(end for end in endings if f"discriminators.0.{first}conv.weight{end}" in block.state or not end)
    return block.shape(f"discriminators.0.{first}conv.weight{end}"), {"norm": block.says("norm", endings[end])}


def _multi_period(block: Block) -> Arguments:
    shape, norm = _judge(block, "layers.0.")
    return {
        "nch": block.says("nch", shape[1]),
        "sample_rate": block.attribute("sample_rate", default=48000),
        "periods": block.each("periods", block.module.discriminators, "period"),
        **norm,
    }


def _multi_scale(block: Block) -> Arguments:
    shape, norm = _judge(block, "layers.0.")
    return {
        "sample_rate": block.attribute("sample_rate", default=48000),
        "downsample_rates": block.each("downsample_rates", block.module.discriminators, "downsample_rate", "rate"),
        "nch": block.says("nch", shape[1]),
        **norm,
    }


def _multi_resolution(block: Block) -> Arguments:
    shape, norm = _judge(block, "band_discriminators.0.0.")
    return {
        "nch": block.says("nch", shape[1] // 2),
        "sample_rate": block.attribute("sample_rate", default=48000),
        "window_lengths": block.each("window_lengths", block.module.discriminators, "window_length", "window", "n_fft"),
        "hop_factor": block.attribute("hop_factor"),
        "bands": block.attribute("bands"),
        "hidden_channels": block.says("hidden_channels", shape[0]),
        **norm,
    }


def _multi_frequency(block: Block) -> Arguments:
    shape, norm = _judge(block, "layers.0.")
    subs = block.module.discriminators
    return {
        "nch": block.says("nch", shape[1] // 2),
        "window_sizes": block.each("window_sizes", subs, "window_size", "window_length", "window", "n_fft"),
        "hidden_channels": block.says("hidden_channels", shape[0]),
        "sample_rate": block.attribute("sample_rate", holders=(subs[0],)),
        **norm,
    }


def _clip(arguments: Arguments) -> list[Call]:
    """An odd number of samples, so that there is something to pad, and enough for two frames."""
    windows = arguments.get("window_lengths") or arguments.get("window_sizes") or [300]
    return [("forward", (1, arguments["nch"], 2 * max(windows) + 101))]


# --- spectral_ops


def _fourier(block: Block) -> Arguments:
    return {"n_fft": block.says("n_fft", block.shape("window")[0]), "hop_length": block.attribute("hop_length", "hop")}


def _there_and_back(arguments: Arguments) -> list[Call]:
    n_fft, hop = arguments["n_fft"], arguments["hop_length"]
    return [("stft", (2, 2 * n_fft + 3 * hop + 1)), ("istft", (2, n_fft // 2 + 1, 5, 2), 4 * hop)]


RATES = (48000, 44100, 32000, 24000, 22050, 16000, 11025, 8000, 88200, 96000, 192000)


def _band(block: Block) -> Arguments:
    bands, bins = block.shape("filterbanks")
    n_fft = block.attribute("n_fft", default=2 * (bins - 1))
    sr, scale = _scale_of(block, n_fft)
    return {
        "sr": sr,
        "n_fft": n_fft,
        "bands_num": block.says("bands_num", bands),
        "in_channels": block.says(
            "in_channels", block.shape("pre_bandnet.weight")[1] * bands // block.shape("f_idxes")[0]
        ),
        "out_channels": block.says("out_channels", block.shape("pre_bandnet.weight")[2]),
        "scale": scale,
    }


def _scale_of(block: Block, n_fft: int) -> tuple[int | None, str | None]:
    """Sample rate and scale: as told, or the usual ones that give the block's filters again, bit by bit."""
    sr, scale = block.attribute("sr", "sample_rate", default=None), block.attribute("scale", default=None)
    if sr is not None and scale is not None:
        return sr, scale
    filters = block.state["filterbanks"]
    for known, rate in product((scale,) if scale else ("linear", "mel"), (sr,) if sr else RATES):
        bands = filters.shape[0]
        built = mel_filterbank(rate, n_fft, bands) if known == "mel" else linear_filterbank(n_fft, bands)
        if not filters.is_meta and torch.equal(filters.cpu(), torch.from_numpy(built)):
            return rate, known
    block.missing += [name for name, value in (("sr", sr), ("scale", scale)) if value is None]
    return None, None


def _split_and_join(arguments: Arguments) -> list[Call]:
    bins = arguments["n_fft"] // 2 + 1
    return [
        ("split", (2, bins, 3, arguments["in_channels"])),
        ("unsplit", (2, arguments["out_channels"], 3, arguments["bands_num"])),
    ]


# --- the list

_CONVOLUTIONS = torch_computes("convolutions and matrix products")
_TRANSFORMS = torch_computes("Fourier transforms", with_kernels=True)

_REGISTERS = Adapter(AttentionRegisterRoFormerBlock, _register_roformer, _sequence, adopt=_adopt_rope)
_KIT_REGISTERS = Adapter(
    AttentionRegisterRoFormerBlock,
    _kit_register_roformer,
    _sequence,
    claims=_masks_in_reverse,
    adopt=_adopt_rope,
    changes="not compared: the mask is what was meant, not the original's",
    new_keys=frozenset({"registers"}),
)

ADAPTERS: dict[str, list[Adapter]] = {
    "AttentionRegisterRoFormerBlock": [_KIT_REGISTERS, _REGISTERS],
    "Band": [Adapter(Band, _band, _split_and_join)],
    "ConvNeXt1DBlock": [Adapter(ConvNeXt1DBlock, _convnext, _image, no_gain=_CONVOLUTIONS)],
    "ConvNeXt2DBlock": [Adapter(ConvNeXt2DBlock, _convnext, _image, no_gain=_CONVOLUTIONS)],
    "Fourier": [Adapter(Fourier, _fourier, _there_and_back, no_gain=_TRANSFORMS)],
    "MultiFrequencyDiscriminator": [
        Adapter(MultiFrequencyDiscriminator, _multi_frequency, _clip, no_gain=_CONVOLUTIONS)
    ],
    "MultiPeriodDiscriminator": [Adapter(MultiPeriodDiscriminator, _multi_period, _clip, no_gain=_CONVOLUTIONS)],
    "MultiResolutionDiscriminator": [
        Adapter(MultiResolutionDiscriminator, _multi_resolution, _clip, no_gain=_CONVOLUTIONS)
    ],
    "MultiScaleDiscriminator": [Adapter(MultiScaleDiscriminator, _multi_scale, _clip, no_gain=_CONVOLUTIONS)],
    "RNNBlock": [Adapter(RNNBlock, _rnn, _sequence, no_gain=_lstm)],
    "RoFormerBlock": [_KIT_REGISTERS, Adapter(RoFormerBlock, _roformer, _sequence, adopt=_adopt_rope)],
}
