"""The fused operations as functions: each checks its arguments, asks `backend` who runs it, and calls that one.

Below this file everything may assume that shapes fit together. B is the batch, T the sequence length, C the channels,
H heads or hidden units, D = C / H, R registers, G groups. Floating-point inputs are float32, bfloat16, float16 or
float64; the statistics of norms, softmax and recurrent states are kept in float32 (float64 for float64).
"""

from fastblocks.functional.activations import bias_leaky_relu
from fastblocks.functional.attention import rope_attention, rope_table
from fastblocks.functional.bands import band_split, band_unsplit
from fastblocks.functional.blocks import rnn_block, roformer_block
from fastblocks.functional.convnext import convnext_mlp, depthwise_conv_layer_norm
from fastblocks.functional.losses import adversarial_loss, discriminator_loss, feature_matching
from fastblocks.functional.recurrent import grouped_gru, grouped_lstm
from fastblocks.functional.rows import rms_norm, swiglu, swiglu_mlp
from fastblocks.functional.weights import spectral_norm, spectral_norms, weight_norms

__all__ = [
    "adversarial_loss",
    "band_split",
    "band_unsplit",
    "bias_leaky_relu",
    "convnext_mlp",
    "depthwise_conv_layer_norm",
    "discriminator_loss",
    "feature_matching",
    "grouped_gru",
    "grouped_lstm",
    "rms_norm",
    "rnn_block",
    "roformer_block",
    "rope_attention",
    "rope_table",
    "spectral_norm",
    "spectral_norms",
    "swiglu",
    "swiglu_mlp",
    "weight_norms",
]
