"""Between waveform and spectrum: the fixed log-mel front end, and the inverse STFT that ends a decoder.

Shapes: B items, S samples, T spectral frames, M mel bands, C channels, N spectral bins.
Everything here computes in fp32 whatever the autocast state.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from tokenizer.model.cpu_kernels import magnitude, overlap_add, polar_spectrum
from tokenizer.model.layers import StreamCache, apply_mask, with_past
from tokenizer.precision import full_precision, without_autocast


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
            spectrum = magnitude(torch.fft.rfft(frames * hann_window(self.n_fft, samples.device)))
            mel = spectrum @ mel_filters(self.n_fft, self.n_mels, self.sampling_rate, samples.device)
            return (mel.clamp(min=1e-5).log() - self.mean) / self.std


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
        with without_autocast(x):  # no exact_fp32 here: an FFT has no TF32, and torch.compile cannot trace it
            window = hann_window(self.n_fft, x.device)
            frames = apply_mask(torch.fft.irfft(polar_spectrum(y), n=self.n_fft), mask)
            envelope = apply_mask(window.expand(x.shape[0] if mask is not None else 1, x.shape[1], -1), mask)
            trim = self.lookahead
            total, weight = (overlap_add(part, window, self.hop) for part in (frames, envelope))
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
