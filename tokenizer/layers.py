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
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank


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


def full_precision(x: Tensor) -> torch.autocast:
    """Context in which autocast is off on x's device: mel, quantizers and inverse STFT stay in fp32."""
    return torch.autocast(x.device.type, enabled=False)


@lru_cache(maxsize=16)
def hann_window(length: int, device: torch.device) -> Tensor:
    """Periodic Hann window (length,) in fp32."""
    # a tensor born in inference mode could not be saved for a later backward pass
    with torch.inference_mode(False):
        return torch.hann_window(length, device=device)


@lru_cache(maxsize=16)
def mel_filters(n_fft: int, n_mels: int, sampling_rate: int, device: torch.device) -> Tensor:
    """Slaney mel filters (n_fft // 2 + 1, M) in fp32."""
    with torch.inference_mode(False):
        bins = n_fft // 2 + 1
        filters = mel_filter_bank(
            bins, n_mels, 0.0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney"
        )
        return torch.tensor(filters, dtype=torch.float32, device=device)


class LogMel(nn.Module):
    """Fixed log-mel front end: (B, S) samples -> (B, S / hop, M), fp32 whatever the autocast state.

    Zero padding, no reflection, a fixed affine normalisation: no value depends on the utterance's length or level.
    A frame's window is centred on its hop; causal, it ends where its hop ends.
    """

    def __init__(
        self, sampling_rate: int, n_fft: int, hop: int, n_mels: int, mean: float, std: float, causal: bool = False
    ) -> None:
        super().__init__()
        self.sampling_rate, self.n_fft, self.hop, self.n_mels = sampling_rate, n_fft, hop, n_mels
        self.mean, self.std, self.causal = mean, std, causal

    def forward(self, samples: Tensor, cache: StreamCache | None = None) -> Tensor:
        with full_precision(samples):
            spare = self.n_fft - self.hop
            if self.causal:
                padded = with_past(samples.float()[..., None], spare, cache, self)[..., 0]
            else:
                padded = F.pad(samples.float(), (spare // 2, spare // 2))
            frames = padded.unfold(-1, self.n_fft, self.hop)
            spectrum = torch.fft.rfft(frames * hann_window(self.n_fft, samples.device)).abs()
            mel = spectrum @ mel_filters(self.n_fft, self.n_mels, self.sampling_rate, samples.device)
            return (mel.clamp(min=1e-5).log() - self.mean) / self.std


class FrameConv(nn.Module):
    """Convolution over (B, T, C) as one linear layer over stacked neighbours; T must be a multiple of the stride.

    Output position t reads kernel inputs around its own `stride` inputs (causal: these and those before), zero padded
    so that T / stride positions come out.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride, self.causal = kernel, stride, causal
        self.linear = nn.Linear(kernel * channels, out_channels)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        spare = self.kernel - self.stride
        x = x.to(self.linear.weight.dtype)
        x = with_past(x, spare, cache, self) if self.causal else F.pad(x, (0, 0, spare // 2, spare - spare // 2))
        last = x.shape[1] - self.kernel + 1
        taps = [x[:, i : i + last : self.stride] for i in range(self.kernel)]
        # the residual stream keeps the parameters' precision under autocast
        return self.linear(torch.cat(taps, dim=-1)).to(self.linear.weight.dtype)


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
        # (B, T, C) seen as a channels-last image of height 1: several times faster on CPU than Conv1d on (B, C, T)
        y = self.depthwise(y.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        y = self.down(F.gelu(self.up(self.norm(y.to(x.dtype)))))
        return x + apply_mask(y.to(x.dtype), mask)


def rotate(x: Tensor, first: int) -> Tensor:
    """Rotary positions first, first + 1, ... along the second last axis of x (..., T, head_dim), in fp32."""
    half = x.shape[-1] // 2
    rates = torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000.0) / half))
    angles = torch.arange(first, first + x.shape[-2], device=x.device)[:, None] * rates
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


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
        span = 2 * window + ahead  # keys of a block: W before it, its own W, and those ahead
        valid = torch.ones(batch, length, dtype=torch.bool, device=x.device) if mask is None else mask
        query_valid = F.pad(valid, (0, tail)).view(batch, blocks, window)
        q, kv = self.qkv(x).split([width, 2 * width], dim=-1)
        kv = with_past(kv, window, cache, self)
        valid = with_past(valid[..., None], window, cache, (self, "valid"))[..., 0]  # the zeros at a start are no keys
        k, v = F.pad(kv, (0, 0, 0, tail + ahead)).chunk(2, dim=-1)

        def split(y: Tensor) -> Tensor:  # (B, N * W, C) -> (B * N, H, W, head_dim)
            y = y.reshape(batch * blocks, window, self.heads, width // self.heads)
            return y.transpose(1, 2)

        def neighbours(y: Tensor) -> Tensor:  # (B, W + N * W + ahead, C) -> (B * N, H, span, head_dim)
            y = y.unfold(1, span, window)  # (B, N, C, span)
            y = y.reshape(batch * blocks, self.heads, width // self.heads, span)
            return y.transpose(2, 3)

        key_valid = F.pad(valid, (0, tail + ahead)).unfold(1, span, window)  # (B, N, span)
        offset = torch.arange(span, device=x.device) - torch.arange(window, device=x.device)[:, None]
        allowed = key_valid[:, :, None, :] & (offset >= 0) & (offset <= window + ahead)
        # a query past the mask may see anything: a row with no key at all would be NaN, and its output is zeroed anyway
        allowed = (allowed | ~query_valid[..., None]).view(batch * blocks, 1, window, span)
        q = rotate(split(F.pad(q, (0, 0, 0, tail))), window)
        y = F.scaled_dot_product_attention(q, rotate(neighbours(k), 0), neighbours(v), allowed)
        y = y.transpose(1, 2).reshape(batch, blocks * window, width)[:, :length]
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


def overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Adds windowed frames (B, T, n_fft) at a distance of hop samples: (B, (T - 1) * hop + n_fft)."""
    batch, length, size = frames.shape
    parts = frames.view(batch, length, size // hop, hop)
    total = sum(F.pad(parts[:, :, i], (0, 0, i, size // hop - 1 - i)) for i in range(size // hop))
    return total.reshape(batch, -1)


class ISTFTHead(nn.Module):
    """Magnitude and phase per frame, then inverse STFT (as in Vocos): (B, T, C) -> (B, T * hop), fp32 inside.

    The overlap-add is normalised by the window envelope of valid frames only, so padded equals unpadded. A frame's
    window is centred on its hop, so the last `lookahead` samples of a frame wait for the next one, in causal models
    too: windows that began at their hop would have to foretell what comes.
    """

    def __init__(self, width: int, n_fft: int, hop: int) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.linear = nn.Linear(width, n_fft + 2)

    @property
    def lookahead(self) -> int:
        """Samples by which a frame's window reaches beyond its hop."""
        return (self.n_fft - self.hop) // 2

    def forward(self, x: Tensor, mask: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        """Samples (B, T * hop); with a cache those that are final, `lookahead` samples late."""
        y = self.linear(x)
        with full_precision(x):
            magnitude, phase = y.float().chunk(2, dim=-1)
            magnitude = magnitude.exp().clamp(max=100.0)
            window = hann_window(self.n_fft, x.device)
            spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
            frames = apply_mask(torch.fft.irfft(spectrum, n=self.n_fft) * window, mask)
            envelope = apply_mask(window.square().expand(x.shape[0] if mask is not None else 1, x.shape[1], -1), mask)
            trim = self.lookahead
            total, weight = overlap_add(frames, self.hop), overlap_add(envelope, self.hop)
            if cache is not None:
                return self._next(total, weight, cache)
            samples = total[:, trim:-trim] / weight[:, trim:-trim].clamp(min=1e-4)
            if mask is not None:
                samples = samples.masked_fill(~mask.repeat_interleave(self.hop, dim=1), 0.0)
            return samples

    def _next(self, total: Tensor, weight: Tensor, cache: StreamCache) -> Tensor:
        """Adds what the frames before left over, keeps what these leave over, and returns the samples between."""
        if self in cache:
            total, weight = (
                new + F.pad(old, (0, new.shape[1] - old.shape[1]))
                for new, old in zip((total, weight), cache[self], strict=True)
            )
        keep = 2 * self.lookahead
        cache[self] = (total[:, -keep:], weight[:, -keep:])
        return total[:, :-keep] / weight[:, :-keep].clamp(min=1e-4)

    def rest(self, cache: StreamCache) -> Tensor:
        """The last `lookahead` samples (B, lookahead) of a stream: no frame follows."""
        total, weight = (kept[:, : self.lookahead] for kept in cache[self])
        return total / weight.clamp(min=1e-4)
