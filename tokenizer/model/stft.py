"""The short-time Fourier transform of losses and discriminators, with a backward pass that costs what the forward does.

torch.stft's own backward pass is a complex transform of twice the work, and puts samples back one by one.

What lies beyond both ends is zeros (`zeros`), or the waveform mirrored there (`reflect`), which needs more samples than
half a window has.

Shapes: B batch, S samples, T = S // hop + 1 frames, W = n_fft // 2 + 1 bins. Everything is in fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

POWER_FLOOR = 1e-9  # the square root's gradient is infinite at silence
Padding = Literal["zeros", "reflect"]


def stft(waveform: Tensor, window: Tensor) -> Tensor:
    """Complex spectra (B, T, W) of waveforms (B, S): centred frames, zeros beyond both ends, hop a quarter window.

    Args:
        waveform: (B, S) in fp32.
        window: (n_fft,), its length a multiple of 4.
    """
    return _Spectrum.apply(waveform, window)


def stft_by_hops(waveform: Tensor, window: Tensor) -> Tensor:
    """Complex spectra (B, ceil(S / hop), W): one frame around each hop, the waveform mirrored at both ends.

    The framing of the published discriminators (audiotools' `match_stride`); arguments as of `stft`.
    """
    hop, side = len(window) // 4, (len(window) - len(window) // 4) // 2
    return _inner(_Spectrum, waveform, window, side, side + -waveform.shape[-1] % hop)


def magnitudes(waveform: Tensor, window: Tensor, padding: Padding = "zeros") -> Tensor:
    """Square root of power, with a floor under it, of centred frames: (B, T, W)."""
    if padding == "reflect":
        return _inner(_Magnitude, waveform, window, len(window) // 2, len(window) // 2)
    return _Magnitude.apply(waveform, window)


def _inner(function: type[torch.autograd.Function], waveform: Tensor, window: Tensor, left: int, right: int) -> Tensor:
    """Frames that begin `left` samples before the first one, over mirrored ends and no zeros."""
    padded = nn.functional.pad(waveform, (left, right), mode="reflect")
    return function.apply(padded, window)[:, 2:-2]  # the two at each end that reach into zeros


def _spectrum(waveform: Tensor, window: Tensor) -> Tensor:
    size = len(window)
    padded = nn.functional.pad(waveform, (size // 2, size // 2))
    return torch.fft.rfft(padded.unfold(-1, size, size // 4) * window)


def _to_waveform(gradient: Tensor, window: Tensor, samples: int) -> Tensor:
    """What a gradient of the spectra (B, T, W) says of the samples (B, S); `gradient` is overwritten.

    The adjoint of the real transform is the inverse one, but for its scale and the bins that it counts twice.
    """
    size, (batch, length, _) = len(window), gradient.shape
    gradient[..., 1:-1] *= 0.5
    frames = torch.fft.irfft(gradient, n=size, norm="forward") * window
    total = frames.new_zeros(batch, length + 3, size // 4)
    for part, quarter in enumerate(frames.unflatten(-1, (4, size // 4)).unbind(2)):
        total[:, part : part + length] += quarter
    # the frames reach past the last sample, by a quarter window or more
    return total.flatten(1)[:, size // 2 : size // 2 + samples]


class _Spectrum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, waveform: Tensor, window: Tensor) -> Tensor:
        ctx.save_for_backward(window)
        ctx.samples = waveform.shape[-1]
        return _spectrum(waveform, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (window,) = ctx.saved_tensors
        return _to_waveform(gradient.clone(), window, ctx.samples), None


class _Magnitude(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, waveform: Tensor, window: Tensor) -> Tensor:
        spectrum = _spectrum(waveform, window)
        magnitude = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag).add_(POWER_FLOOR).sqrt_()
        ctx.save_for_backward(spectrum, magnitude, window)
        ctx.samples = waveform.shape[-1]
        return magnitude

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        spectrum, magnitude, window = ctx.saved_tensors
        return _to_waveform(spectrum * (gradient / magnitude), window, ctx.samples), None
