"""Models as the public kit builds them: its class names, attributes, buffers and state_dicts, where those of
`benchmarks.original` differ. In plain formulas, float32 where the kit computes in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import original
from benchmarks.original.discriminator._layers import activations, spectrogram


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.scale * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps))


class MLP(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        hidden = int(2 * 4 * n_embd / 3)
        self.c_fc1, self.c_fc2 = nn.Linear(n_embd, hidden, bias=False), nn.Linear(n_embd, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_fc1(x)) * self.c_fc2(x))


class SelfAttention(nn.Module):
    def __init__(self, n_embd, n_head, max_seq_len, rope_base=10000):
        super().__init__()
        self.n_head, self.n_embd, self.head_dim = n_head, n_embd, n_embd // n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
        table = original.functional.rope_table(max_seq_len, self.head_dim, rope_base)
        self.register_buffer("rope_cache", table, persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        pairs, table = x.float().unflatten(-1, (-1, 2)), self.rope_cache[: x.shape[1], None]
        cos, sin = table[..., 0], table[..., 1]
        a, b = pairs[..., 0], pairs[..., 1]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3).type_as(x)

    def mask(self, length):
        return None

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)) for part in self.c_attn(x).chunk(3, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in (self.rotate(q), self.rotate(k), v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x.shape[1]))
        return self.c_proj(y.transpose(1, 2).flatten(2))


class RoFormerBlock(nn.Module):
    def __init__(self, n_embd, n_head, max_seq_len, rope_base=10000):
        super().__init__()
        self.att_norm = RMSNorm(n_embd)
        self.att = SelfAttention(n_embd, n_head, max_seq_len, rope_base)
        self.ffn_norm = RMSNorm(n_embd)
        self.mlp = MLP(n_embd)

    def forward(self, x):
        x = x + self.att(self.att_norm(x))
        return x + self.mlp(self.ffn_norm(x))


class RegisterAttention(SelfAttention):
    """Its mask is True where attention is meant to be forbidden, which is where it then is allowed."""

    def __init__(self, n_embd, n_head, max_seq_len, rope_base, num_register_tokens, window_size):
        super().__init__(n_embd, n_head, max_seq_len, rope_base)
        self.num_register_tokens, self.window_size = num_register_tokens, window_size
        allowed = original.functional.window_mask(
            max_seq_len - num_register_tokens, num_register_tokens, window_size, torch.device("cpu")
        )
        self.register_buffer("attn_mask", ~allowed, persistent=False)

    def mask(self, length):
        return self.attn_mask[:length, :length]


def register_block(n_embd, n_head, max_seq_len, rope_base=10000, num_register_tokens=0, window_size=-1):
    """The kit's register block: a class of the name RoFormerBlock, too."""
    block = RoFormerBlock(n_embd, n_head, max_seq_len, rope_base)
    block.att = RegisterAttention(n_embd, n_head, max_seq_len, rope_base, num_register_tokens, window_size)
    return block


class Band(original.Band):
    def __init__(self, sr, n_fft, bands_num, in_channels, out_channels, scale="mel"):
        super().__init__(sr, n_fft, bands_num, in_channels, out_channels, scale)
        self.sr, self.n_fft, self.out_channels, self.scale = sr, n_fft, out_channels, scale


class MultiFrequencyDiscriminator(original.MultiFrequencyDiscriminator):
    """Its spectra are float32 in every dtype."""

    def __init__(self, nch, window_sizes, hidden_channels=8, sample_rate=48000, norm=True):
        super().__init__(nch, window_sizes, hidden_channels, sample_rate, norm)
        self.nch, self.window_sizes, self.sample_rate = nch, window_sizes, sample_rate

    def forward(self, x):
        energy = x.pow(2).sum((1, 2), keepdim=True)
        x = x / (energy + torch.finfo(torch.float32).eps).sqrt()
        scores, fmaps = [], []
        for sub in self.discriminators:
            spectrum = spectrogram(x.float(), sub.window, sub.window // 2).type_as(x)
            fmaps.append(activations(sub.layers, spectrum[..., : sub.bins]))
            scores.append(sub.output_conv(fmaps[-1][-1]))
        return scores, fmaps


class MelRoFormer(nn.Module):
    """(B, samples) -> (B, samples)."""

    def __init__(self, channels=16, layers=2, heads=2, n_fft=256, hop=64, sr=16000, bands=10, frames=40):
        super().__init__()
        self.fourier = original.Fourier(n_fft, hop)
        self.band = Band(sr, n_fft, bands, 2, channels)
        self.freq_blocks = nn.ModuleList(RoFormerBlock(channels, heads, bands) for _ in range(layers))
        self.time_blocks = nn.ModuleList(RoFormerBlock(channels, heads, frames) for _ in range(layers))

    def forward(self, waveform):
        spectrum = self.fourier.stft(waveform)
        x = self.band.split(spectrum).permute(0, 2, 3, 1)
        for along_bands, along_time in zip(self.freq_blocks, self.time_blocks, strict=True):
            x = along_bands(x.flatten(0, 1)).view_as(x).transpose(1, 2)
            x = along_time(x.flatten(0, 1)).view_as(x).transpose(1, 2)
        return self.fourier.istft(spectrum * self.band.unsplit(x.permute(0, 3, 1, 2)), waveform.shape[-1])
