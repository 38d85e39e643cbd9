"""The short-time Fourier transform of losses and discriminators: which frames a waveform is cut into.

What lies beyond both ends is zeros (`zeros`), or the waveform mirrored there (`reflect`), which needs more samples than
half a window has.

Shapes: B batch, S samples, T = S // hop + 1 frames, W = n_fft // 2 + 1 bins. Everything is in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from tokenizer.model.cpu_kernels import spectra, spectral_magnitudes

Padding = Literal["zeros", "reflect"]


def stft(waveform: Tensor, window: Tensor) -> Tensor:
    """Complex spectra (B, T, W) of waveforms (B, S): centred frames, zeros beyond both ends, hop a quarter window.

    Args:
        waveform: (B, S) in fp32.
        window: (n_fft,), its length a multiple of 4.
    """
    return spectra(waveform, window)


def stft_by_hops(waveform: Tensor, window: Tensor) -> Tensor:
    """Complex spectra (B, ceil(S / hop), W): one frame around each hop, the waveform mirrored at both ends.

    The framing of the published discriminators (audiotools' `match_stride`); arguments as of `stft`.
    """
    hop, side = len(window) // 4, (len(window) - len(window) // 4) // 2
    return _inner(spectra, waveform, window, side, side + -waveform.shape[-1] % hop)


def magnitudes(waveform: Tensor, window: Tensor, padding: Padding = "zeros") -> Tensor:
    """Square root of power, with a floor under it, of centred frames: (B, T, W)."""
    if padding == "reflect":
        return _inner(spectral_magnitudes, waveform, window, len(window) // 2, len(window) // 2)
    return spectral_magnitudes(waveform, window)


def _inner(
    transform: Callable[[Tensor, Tensor], Tensor], waveform: Tensor, window: Tensor, left: int, right: int
) -> Tensor:
    """Frames that begin `left` samples before the first one, over mirrored ends and no zeros."""
    padded = nn.functional.pad(waveform, (left, right), mode="reflect")
    return transform(padded, window)[:, 2:-2]  # the two at each end that reach into zeros
