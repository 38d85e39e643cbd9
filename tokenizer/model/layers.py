"""Building blocks shared by encoders and decoders.

Shapes: B items, T or F positions in time, C channels, H heads, W attention window, S samples, M mel bands.
Inside the model everything is (B, T, C): linear layers and channels-last depthwise convolutions are what CPUs do fast.
`mask` is (B, T) bool, True where valid, or None where all is. A stream is zero past its mask before and after each
block, which makes a padded item equal the item alone.
With `causal` nothing reads what comes later: what a symmetric layer pads on both sides is padded in front alone. A
causal layer given a `StreamCache` goes on where the push before ended, as if the stream had come in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.model.cpu_kernels import attend, depthwise
from tokenizer.precision import working_dtype


def apply_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeroes (B, T, C) where the mask (B, T) is False."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


def stretch_mask(mask: Tensor | None, ratio: int) -> Tensor | None:
    """Repeats each entry of a mask (B, T) `ratio` times: (B, T * ratio)."""
    return None if mask is None else mask.repeat_interleave(ratio, dim=1)


class StreamCache(dict):
    """What the causal layers of one stream remember between pushes: layer -> the last positions it still reads."""


def with_past(x: Tensor, amount: int, cache: StreamCache | None, owner: object) -> Tensor:
    """Puts `amount` positions in front of x (B, T, C): what `owner` saw before, or zeros at a stream's start."""
    past = None if cache is None else cache.get(owner)
    x = F.pad(x, (0, 0, amount, 0)) if past is None else torch.cat([past, x], dim=1)
    if cache is not None:
        cache[owner] = x[:, x.shape[1] - amount :]
    return x


class CheckpointedModule(nn.Module):
    """A stack whose blocks may be recomputed in the backward pass instead of keeping their activations.

    `PreTrainedModel.activation_checkpointing_enable` (earlier `gradient_checkpointing_enable`) finds the flag and sets
    it together with the function that runs a block.
    """

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Any]

    def run(self, block: nn.Module, *arguments: Any) -> Any:
        """Runs a block; in training with checkpointing on, without keeping what is inside it."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(block.__call__, *arguments)
        return block(*arguments)


class FrameConv(nn.Module):
    """Convolution over (B, T, C) as one linear layer over stacked neighbours; T must be a multiple of the stride.

    Output position t reads kernel inputs around its own `stride` inputs (causal: these and those before), zero padded
    so that T / stride positions come out. The kernel is a multiple of the stride too.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride, self.causal = kernel, stride, causal
        self.linear = nn.Linear(kernel * channels, out_channels)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        spare = self.kernel - self.stride
        x = x.to(working_dtype(x, self.linear.weight))
        x = with_past(x, spare, cache, self) if self.causal else F.pad(x, (0, 0, spare // 2, spare - spare // 2))
        # `stride` positions side by side are one run of memory: the fewest, longest pieces to put together
        runs = x.reshape(x.shape[0], x.shape[1] // self.stride, -1)
        n_runs, last = self.kernel // self.stride, runs.shape[1] - self.kernel // self.stride + 1
        taps = torch.cat([runs[:, i : i + last] for i in range(n_runs)], dim=-1)
        # the residual stream keeps the parameters' precision under autocast
        return self.linear(taps).to(self.linear.weight.dtype)


class Upsample(nn.Module):
    """Transposed convolution with kernel = stride (nothing leaks to a neighbour): (B, T, C) -> (B, T * stride, C')."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.linear = nn.Linear(channels, stride * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).to(self.linear.weight.dtype)
        return y.view(x.shape[0], x.shape[1] * self.stride, -1)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, feed-forward, residual (as in Vocos): (B, T, C) -> (B, T, C).

    Vocos's layer scale is folded into the last linear layer: `scale` only makes its first weights smaller.
    """

    def __init__(self, width: int, kernel: int, expansion: int, scale: float, causal: bool = False) -> None:
        super().__init__()
        padding = 0 if causal else kernel // 2
        self.depthwise = nn.Conv2d(width, width, (1, kernel), padding=(0, padding), groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)
        self.scale, self.kernel, self.causal = scale, kernel, causal

    def forward(self, x: Tensor, mask: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        y = with_past(x, self.kernel - 1, cache, self) if self.causal else x
        y = depthwise(y, self.depthwise)
        # the norm computes in fp32 whatever it reads, and what follows it would round its output to bf16 anyway
        y = self.down(F.gelu(self.up(self.norm(y))))
        return x + apply_mask(y.to(x.dtype), mask)


@lru_cache(maxsize=64)
def rotations(first: int, length: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, half) of rotary positions first, first + 1, ..., in fp32."""
    with torch.inference_mode(False):  # kept for a later backward pass too
        rates = torch.exp(torch.arange(half, device=device) * (-math.log(10_000.0) / half))
        angles = torch.arange(first, first + length, device=device)[:, None] * rates
        return angles.cos(), angles.sin()


def rotate(x: Tensor, first: int) -> Tensor:
    """Rotary positions first, first + 1, ... along the second last axis of x (..., T, head_dim): fp32."""
    cos, sin = rotations(first, x.shape[-2], x.shape[-1] // 2, x.device)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@lru_cache(maxsize=64)
def band(window: int, ahead: int, device: torch.device) -> Tensor:
    """Which of its block's 2 W + ahead keys a query may see, (W, span) bool: W before itself, itself, those ahead."""
    with torch.inference_mode(False):
        span = 2 * window + ahead
        offset = torch.arange(span, device=device) - torch.arange(window, device=device)[:, None]
        return (offset >= 0) & (offset <= window + ahead)


class LocalAttention(nn.Module):
    """Self-attention within `window` positions on each side; cost grows with T, not with T squared.

    Queries are cut into blocks of W; each block sees itself and both neighbours (3 W keys), banded to exactly W on each
    side. Rotary positions count from the block's start: only differences matter, so they stay exact in long audio.
    Causal attention sees itself and the W positions before: no block after its own.
    """

    def __init__(self, width: int, head_dim: int, window: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.window, self.causal = width // head_dim, window, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        batch, length, width = x.shape
        window = self.window
        blocks = -(-length // window)
        tail = blocks * window - length
        ahead = 0 if self.causal else window
        reach = 2 + ahead // window  # a block's keys lie in the block before it, in itself, and in those ahead
        q, kv = self.qkv(x).split([width, 2 * width], dim=-1)
        kv = F.pad(with_past(kv, window, cache, self), (0, 0, 0, tail + ahead))

        def neighbours(y: Tensor) -> Tensor:  # (B, (N + reach - 1) * W, ...) -> (B * N, span, ...)
            y = y.reshape(batch, blocks + reach - 1, window, *y.shape[2:])
            return torch.cat([y[:, i : i + blocks] for i in range(reach)], dim=2).flatten(0, 1)

        def split(y: Tensor) -> Tensor:  # (B * N, T, C) -> (B * N, H, T, head_dim)
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        valid = torch.ones(batch, length, dtype=torch.bool, device=x.device) if mask is None else mask
        # what is padded in front of a start must not be attended to
        known = with_past(valid[..., None], window, cache, (self, "valid"))
        key_valid = neighbours(F.pad(known, (0, 0, 0, tail + ahead)))  # (B * N, span, 1)
        query_valid = F.pad(valid, (0, tail)).view(batch * blocks, window, 1)
        # a query past the mask may see anything: a row with no key at all would be NaN, and its output is zeroed anyway
        allowed = (key_valid.transpose(1, 2) & band(window, ahead, x.device)) | ~query_valid
        k, v = neighbours(kv).chunk(2, dim=-1)
        q = rotate(split(F.pad(q, (0, 0, 0, tail)).reshape(batch * blocks, window, width)), window)
        y = attend(q, rotate(split(k), 0), split(v), allowed[:, None])
        y = y.transpose(1, 2).reshape(batch, blocks * window, width)[:, :length].to(self.out.weight.dtype)
        return self.out(y)


class AttentionLayer(nn.Module):
    """Pre-norm local-attention layer with a feed-forward part: (B, T, C) -> (B, T, C)."""

    def __init__(self, width: int, head_dim: int, window: int, expansion: int, causal: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = LocalAttention(width, head_dim, window, causal)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        x = x + apply_mask(self.attention(self.attention_norm(x), mask, cache).to(x.dtype), mask)
        return x + apply_mask(self.down(F.gelu(self.up(self.norm(x)))).to(x.dtype), mask)
