"""Between waveform and spectrum: the fixed log-mel front end, and the inverse STFT that ends a decoder.

Shapes: B items, S samples, T spectral frames, M mel bands, C channels, N spectral bins.
Everything here computes in fp32 whatever the autocast state.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from tokenizer.model.layers import StreamCache, apply_mask, full_precision, with_past, without_autocast

LOUDEST = 100.0  # where the magnitude of a bin is held


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


def magnitude(spectrum: Tensor) -> Tensor:
    """Absolute values of a complex tensor. Those that need no gradient skip `abs`, which guards against overflow."""
    if spectrum.requires_grad:  # the square root has none at zero
        return spectrum.abs()
    return (spectrum.real.square() + spectrum.imag.square()).sqrt()


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
            spectrum = magnitude(torch.fft.rfft(frames * hann_window(self.n_fft, samples.device)))
            mel = spectrum @ mel_filters(self.n_fft, self.n_mels, self.sampling_rate, samples.device)
            return (mel.clamp(min=1e-5).log() - self.mean) / self.std


class _OverlapAdd(torch.autograd.Function):
    """Frames (B, T, n_fft) times a window (n_fft,), added at a distance of hop: (B, (T - 1) * hop + n_fft).

    Its gradient is the same window over overlapping views; autograd would fill a whole tensor for each piece.
    """

    @staticmethod
    def forward(ctx: Any, frames: Tensor, window: Tensor, hop: int) -> Tensor:
        ctx.save_for_backward(window)
        ctx.hop = hop
        (batch, length, size), n = frames.shape, frames.shape[-1] // hop
        total = frames.new_zeros(batch, length + n - 1, hop)
        parts, weights = frames.view(batch, length, n, hop), window.view(n, hop)
        for i in range(n):
            total[:, i : i + length].addcmul_(parts[:, :, i], weights[i])
        return total.view(batch, (length - 1) * hop + size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (window,) = ctx.saved_tensors
        return gradient.unfold(-1, len(window), ctx.hop) * window, None, None


class _Spectrum(torch.autograd.Function):
    """exp(a) (cos b + i sin b), the magnitude held at `LOUDEST`, of (..., 2 N) holding a and b: complex (..., N).

    The gradient takes the spectrum itself and two products; autograd would compute exp, cos and sin anew.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        log_magnitude, phase = values.float().chunk(2, dim=-1)
        magnitude = log_magnitude.exp().clamp_(max=LOUDEST)
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        ctx.save_for_backward(values, spectrum)
        return spectrum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        values, spectrum = ctx.saved_tensors
        turned = gradient * spectrum.conj()
        moves = values.chunk(2, dim=-1)[0] <= math.log(LOUDEST)
        return torch.cat([turned.real * moves, turned.imag], dim=-1).to(values.dtype)


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
        with without_autocast(x):  # the transform knows no TF32, and torch.compile no switches
            window = hann_window(self.n_fft, x.device)
            frames = apply_mask(torch.fft.irfft(_Spectrum.apply(y), n=self.n_fft), mask)
            envelope = apply_mask(window.expand(x.shape[0] if mask is not None else 1, x.shape[1], -1), mask)
            trim = self.lookahead
            total, weight = (_OverlapAdd.apply(part, window, self.hop) for part in (frames, envelope))
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
