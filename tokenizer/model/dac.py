"""The DAC encoder and decoder: convolutions on the waveform itself, as in the published LM-SPT model.

Shapes: B items, S samples, C channels, T positions in time at some resolution, F code frames, D latent channels.
Inside this file tensors are (B, C, T), as torch's convolutions take them. `lengths` (B,) counts each item's valid
positions at the resolution at hand, None where all are; a stream is zero past them before every convolution, which
makes a padded item equal the item alone.

Source: the published configuration `lmspt_12d5hz_16384_4096_8vq` (arXiv 2506.16738 v2), whose blocks are those of DAC
(arXiv 2306.06546). Module names are the published ones, so that weights go over by name (`published.py`).
"""

from __future__ import annotations

import math
from itertools import count, pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.models.dac.modeling_dac import Snake1d

from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.cpu_kernels import snake
from tokenizer.model.layers import AttentionLayer, CheckpointedModule, StreamCache, apply_mask, with_past

DILATIONS = (1, 3, 9)
TAPS = 7  # of the first convolution and of the residual units'


def keep(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zeroes (B, C, T) past each item's length."""
    if lengths is None:
        return x
    return x.masked_fill((torch.arange(x.shape[-1], device=x.device) >= lengths[:, None])[:, None], 0.0)


class Snake(Snake1d):
    """DAC's activation, x + sin^2(alpha x) / alpha: in fp32, rounded at the end, in few passes over memory."""

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.alpha)


class WaveConv(nn.Conv1d):
    """Convolution over (B, C, T) with DAC's padding: T stays, or is divided by the stride (rounded down).

    Causal, all padding stands in front, and T is rounded up.
    """

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, dilation: int = 1, causal: bool = False
    ) -> None:
        reach = (kernel - 1) * dilation + 1
        side = (reach - 1) // 2 if stride == 1 else math.ceil(stride / 2)
        super().__init__(channels, out, kernel, stride, 0 if causal else side, dilation)
        self.causal, self.past, self.shrinks_by = causal, reach - stride, reach - 2 * side

    def out_length(self, length: int | Tensor) -> int | Tensor:
        """T of the output for T of the input."""
        step = self.stride[0]
        return -(-length // step) if self.causal else (length - self.shrinks_by) // step + 1

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        if self.causal:
            x = nn.functional.pad(x, (0, -x.shape[-1] % self.stride[0]))
            if self.past:
                x = with_past(x.transpose(1, 2), self.past, cache, self).transpose(1, 2)
        return super().forward(x)


class WaveUp(nn.ConvTranspose1d):
    """Transposed convolution with DAC's padding: T * stride positions, one less where the stride is odd.

    Causal, an output reads its own input and the one before, and nothing is lost.
    """

    def __init__(self, channels: int, out: int, stride: int, causal: bool = False) -> None:
        super().__init__(channels, out, 2 * stride, stride, 0 if causal else math.ceil(stride / 2))
        self.causal = causal

    def out_length(self, length: int | Tensor) -> int | Tensor:
        """T of the output for T of the input."""
        step = self.stride[0]
        return length * step - (0 if self.causal else step % 2)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        if not self.causal:
            return super().forward(x)
        step = self.stride[0]
        return super().forward(with_past(x.transpose(1, 2), 1, cache, self).transpose(1, 2))[..., step:-step]


class ResidualUnit(nn.Module):
    """Snake, dilated convolution, snake, pointwise convolution, and the way around them: (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, dilation: int, causal: bool) -> None:
        super().__init__()
        convs = (WaveConv(channels, channels, TAPS, 1, dilation, causal), WaveConv(channels, channels, 1))
        self.block = nn.ModuleList([Snake(channels), convs[0], Snake(channels), convs[1]])

    def forward(self, x: Tensor, lengths: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        y = self.block[1](self.block[0](x), cache)
        return keep(x + self.block[3](self.block[2](y)), lengths)


class EncoderBlock(nn.Module):
    """Three residual units and a strided convolution: (B, C, T) -> (B, 2 C, T / stride)."""

    def __init__(self, channels: int, stride: int, causal: bool) -> None:
        super().__init__()
        units = [ResidualUnit(channels, dilation, causal) for dilation in DILATIONS]
        down = WaveConv(channels, 2 * channels, 2 * stride, stride, causal=causal)
        self.block = nn.ModuleList([*units, Snake(channels), down])

    def out_length(self, length: int | Tensor) -> int | Tensor:
        """T of the output for T of the input."""
        return self.block[-1].out_length(length)

    def forward(self, x: Tensor, lengths: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        for unit in self.block[:3]:
            x = unit(x, lengths, cache)
        x = self.block[4](self.block[3](x), cache)
        return keep(x, None if lengths is None else self.out_length(lengths))


class DecoderBlock(nn.Module):
    """A transposed convolution and three residual units: (B, C, T) -> (B, C / 2, T * stride)."""

    def __init__(self, channels: int, stride: int, causal: bool) -> None:
        super().__init__()
        units = [ResidualUnit(channels // 2, dilation, causal) for dilation in DILATIONS]
        self.block = nn.ModuleList([Snake(channels), WaveUp(channels, channels // 2, stride, causal), *units])

    def out_length(self, length: int | Tensor) -> int | Tensor:
        """T of the output for T of the input."""
        return self.block[1].out_length(length)

    def forward(self, x: Tensor, lengths: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        lengths = None if lengths is None else self.out_length(lengths)
        x = keep(self.block[1](self.block[0](x), cache), lengths)
        for unit in self.block[2:]:
            x = unit(x, lengths, cache)
        return x


def _attention(config: LMSPTConfig, layers: int) -> tuple[nn.ModuleList, nn.Module]:
    """Local-attention layers of width D at the frame rate, and the norm that ends a stack of them."""
    stack = nn.ModuleList(
        AttentionLayer(config.latent_dim, config.head_dim, config.attention_window, config.expansion, config.causal)
        for _ in range(layers)
    )
    return stack, nn.LayerNorm(config.latent_dim) if layers else nn.Identity()


class DacEncoder(CheckpointedModule):
    """Waveform to latents at the frame rate: one block per stride, width doubling, then local attention where asked.

    The published model has no attention; v1 of the paper has an 8-layer transformer after its convolutions.
    """

    def __init__(self, config: LMSPTConfig, part: str) -> None:
        super().__init__()
        width, causal = getattr(config, f"{part}_encoder_width"), config.causal
        blocks: list[nn.Module] = [WaveConv(1, width, TAPS, causal=causal)]
        for stride in config.strides:
            blocks.append(EncoderBlock(width, stride, causal))
            width *= 2
        blocks += [Snake(width), WaveConv(width, config.latent_dim, 3, causal=causal)]
        self.block = nn.ModuleList(blocks)
        self.layers, self.norm = _attention(config, getattr(config, f"{part}_encoder_layers"))
        if config.weight_norm:
            add_weight_norm(self)

    def out_length(self, length: int | Tensor) -> int | Tensor:
        """F for S samples."""
        for block in self.block[1:-2]:
            length = block.out_length(length)
        return length

    @property
    def min_length(self) -> int:
        """The fewest samples that give a frame."""
        return next(length for length in count(1) if self.out_length(length) > 0)

    def forward(self, samples: Tensor, lengths: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        """Encodes.

        Args:
            samples: (B, S).
            lengths: (B,) valid samples of each item, or None where all are.
            cache: of a stream whose next samples these are, whole frames of them (causal encoders only).

        Returns:
            Latents (B, F, D), zero past each item's last frame.
        """
        x = keep(samples[:, None], lengths)
        x = keep(self.block[0](x, cache), lengths)
        for block in self.block[1:-2]:
            x = self.run(block, x, lengths, cache)
            lengths = None if lengths is None else block.out_length(lengths)
        x = keep(self.block[-1](self.block[-2](x), cache), lengths).transpose(1, 2)
        x = x.to(self.block[-1].bias.dtype)  # the residual stream of the attention keeps the parameters' precision
        mask = None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        for layer in self.layers:
            x = self.run(layer, x, mask, cache)
        return apply_mask(self.norm(x), mask)


class DacDecoder(CheckpointedModule):
    """Quantized latents to a waveform: local attention where asked, one block per stride, width halving, tanh."""

    lookahead = 0  # samples that a stream holds back; only an inverse STFT does

    def __init__(self, config: LMSPTConfig, part: str) -> None:
        super().__init__()
        width, causal = getattr(config, f"{part}_width"), config.causal
        strides = config.auxiliary_strides if part == "auxiliary_decoder" else config.decoder_strides
        self.hop = math.prod(strides) if config.exact_lengths else None
        self.layers, self.norm = _attention(config, getattr(config, f"{part}_layers"))
        blocks: list[nn.Module] = [WaveConv(config.latent_dim, width, TAPS, causal=causal)]
        for stride in reversed(strides):
            blocks.append(DecoderBlock(width, stride, causal))
            width //= 2
        blocks += [Snake(width), WaveConv(width, 1, TAPS, causal=causal)]
        self.model = nn.ModuleList(blocks)
        if config.weight_norm:
            add_weight_norm(self)

    def forward(self, quantized: Tensor, mask: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        """Decodes.

        Args:
            quantized: (B, F, D).
            mask: (B, F) bool, or None where every frame is valid.
            cache: of a stream whose next frames these are (causal decoders only).

        Returns:
            Samples (B, F * hop) in fp32, zero past each item's end; without `exact_lengths` as many as the transposed
            convolutions give, a few less where strides are odd.
        """
        x = apply_mask(quantized.to(self.model[0].bias.dtype), mask)
        for layer in self.layers:
            x = self.run(layer, x, mask, cache)
        x = apply_mask(self.norm(x), mask).transpose(1, 2)
        lengths = None if mask is None else mask.sum(dim=1)
        x = keep(self.model[0](x, cache), lengths)
        for block in self.model[1:-2]:
            x = self.run(block, x, lengths, cache)
            lengths = None if lengths is None else block.out_length(lengths)
        samples = keep(self.model[-1](self.model[-2](x), cache).float().tanh(), lengths)[:, 0]
        if self.hop is None:
            return samples
        return nn.functional.pad(samples, (0, quantized.shape[1] * self.hop - samples.shape[-1]))


def add_weight_norm(module: nn.Module) -> None:
    """Puts weight norm on every waveform convolution and linear projection of a module that is not attention's."""
    inside_attention = {id(inner) for child in module.modules() if isinstance(child, AttentionLayer)
                        for inner in child.modules()}  # fmt: skip
    for child in list(module.modules()):
        if isinstance(child, (WaveConv, WaveUp, nn.Linear)) and id(child) not in inside_attention:
            weight_norm(child)


def encoder_receptive_field(config: LMSPTConfig, part: str) -> int:
    """Frames on each side beyond which a change of the input cannot reach a latent of a DAC encoder (an upper bound).

    Sums the reach of every convolution, in samples. A causal encoder reaches twice as far back, and not ahead.
    """
    sides = 2 if config.causal else 1
    step, reach = 1, sides * (TAPS // 2)
    for stride in config.strides:
        reach += sides * step * (TAPS // 2 * sum(DILATIONS))
        reach += step * (stride if config.causal else math.ceil(stride / 2))
        step *= stride
    reach += step * (sides + getattr(config, f"{part}_encoder_layers") * config.attention_window)
    return -(-reach // step)


def decoder_receptive_field(config: LMSPTConfig, part: str) -> int:
    """Frames on each side beyond which a change of a code cannot reach a frame's samples (an upper bound).

    `part` is `decoder` or `auxiliary_decoder`. A causal decoder reaches twice as far back, and not ahead.
    """
    strides = config.auxiliary_strides if part == "auxiliary_decoder" else config.decoder_strides
    sides = 2 if config.causal else 1
    steps = [math.prod(strides)]
    for stride in reversed(strides):
        steps.append(steps[-1] // stride)
    hop = steps[0]
    reach = hop * (sides * (TAPS // 2) + getattr(config, f"{part}_layers") * config.attention_window)
    for before, after in pairwise(steps):
        reach += before  # a transposed convolution reads one neighbour
        reach += sides * after * (TAPS // 2 * sum(DILATIONS))
    return -(-(reach + sides * (TAPS // 2)) // hop)
