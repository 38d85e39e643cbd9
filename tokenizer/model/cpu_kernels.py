"""Operations written by hand because a CPU computes them faster so, each beside the plain torch that it must equal.

A `plain_*` function is what its neighbour computes, in as few words as torch allows; a test compares values and
gradients. Where no such function stands, the fast path itself falls back on torch's own operation. Those without a
condition on the device run on GPUs too.

Shapes: B items, T positions or frames in time, C channels, S samples, N or W spectral bins.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokenizer.precision import without_autocast, working_dtype

LOUDEST = 100.0  # the largest magnitude of a bin
POWER_FLOOR = 1e-9  # the square root's gradient is infinite at silence
PIECE = 1 << 18  # values that fit into a cache: a megabyte in fp32
EAGER_FRAMES = 500  # up to 10 s of a Whisper encoder
WIDE = 512  # channels from which a CPU needs another layout or length
TIME_MULTIPLE = 16  # positions that a wide bf16 layer makes a multiple of


def depthwise(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Depthwise convolution over the middle axis of (B, T, C), by a (1, k) Conv2d: -> (B, T', C).

    (B, T, C) seen as a channels-last image of height 1: several times faster on CPU than Conv1d on (B, C, T). In bf16
    on a CPU the library's own backward pass takes three times as long as the one written here.
    """
    dtype = working_dtype(x, convolution.weight)
    if dtype != torch.bfloat16 or x.device.type != "cpu" or not torch.is_grad_enabled():
        return convolution(x.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
    return _Depthwise.apply(x.to(dtype), convolution.weight.to(dtype), convolution.bias.to(dtype), convolution.padding)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding[1]
        return _convolve(x, weight, bias, padding[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        kernel, length = weight.shape[-1], gradient.shape[1]
        # the input's gradient is a convolution with the reversed kernel
        to_x = _convolve(gradient, weight.flip(-1), None, kernel - 1 - ctx.padding)
        padded = F.pad(x, (0, 0, ctx.padding, ctx.padding))
        products = [(padded[:, i : i + length] * gradient).sum(dim=(0, 1)) for i in range(kernel)]
        return to_x, torch.stack(products, dim=-1).view_as(weight), gradient.sum(dim=(0, 1)), None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    image = x.transpose(1, 2).unsqueeze(2)
    return F.conv2d(image, weight, bias, padding=(0, padding), groups=len(weight)).squeeze(2).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention of q, k (fp32) and v (any, H, T, head_dim) under a mask.

    On a CPU in fp32: bf16 is no faster there, and its backward pass takes some ten times as long.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, allowed)
    with without_autocast(q):
        return F.scaled_dot_product_attention(q, k, v.float(), allowed)


def attention_implementation(device: torch.device, frames: int, default: str) -> str:
    """Which attention of transformers a Whisper encoder of so many frames (50 Hz) is to use: `eager`, or the default.

    Up to `EAGER_FRAMES` a CPU attends faster without the fused kernel, most of all backward.
    """
    return "eager" if device.type == "cpu" and frames <= EAGER_FRAMES else default


def convolution_weight(weight: Tensor) -> Tensor:
    """A channels-last weight (out, in, H, W) in the layout that its convolution is fastest with.

    That is channels-last, except for wide fp32 weights on a CPU, whose gradients take up to twice as long that way.
    """
    wide = weight.shape[1] >= WIDE and weight.dtype == torch.float32 and weight.device.type == "cpu"
    return weight.contiguous() if wide and weight.requires_grad else weight


def convolve_over_time(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """`conv2d` of channels-last (B, C, 1, T) with a weight (out, C, 1, k) along the last axis.

    Wide layers in bf16 take up to four times as long on a CPU where they make an odd number of positions: there zeros
    are added at the end until a multiple of `TIME_MULTIPLE` comes out, and what comes of them is dropped.
    """
    length = (x.shape[-1] + 2 * padding - weight.shape[-1]) // stride + 1
    wide = weight.shape[1] >= WIDE and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    if missing := -length % TIME_MULTIPLE if wide else 0:
        x = F.pad(x, (0, missing * stride))
    y = F.conv2d(x, weight, bias, (1, stride), (0, padding))
    return y[..., :length].contiguous(memory_format=torch.channels_last) if missing else y


def first_largest(scores: Tensor) -> Tensor:
    """`scores.argmax(dim=-1)` with the first index among equals, (..., N) -> (...) int64, faster than it on a CPU.

    There argmax reads value by value while amax reads vectors: the largest of each group of entries first, then the
    entry within the first group that has it.
    """
    size = math.gcd(scores.shape[-1], 64)
    if scores.device.type != "cpu" or size == 1:
        return scores.argmax(dim=-1)
    groups = scores.unflatten(-1, (-1, size))
    group = groups.amax(dim=-1).argmax(dim=-1, keepdim=True)
    inside = groups.gather(-2, group[..., None].expand(*group.shape, size)).squeeze(-2)
    return (group * size + inside.argmax(dim=-1, keepdim=True)).squeeze(-1)


def magnitude(spectrum: Tensor) -> Tensor:
    """Absolute values of a complex tensor. Those that need no gradient skip `abs`, which guards against overflow."""
    if spectrum.requires_grad:  # the square root's gradient is infinite at zero
        return spectrum.abs()
    return (spectrum.real.square() + spectrum.imag.square()).sqrt()


def plain_overlap_add(frames: Tensor, window: Tensor, hop: int) -> Tensor:
    """What `overlap_add` computes."""
    total = frames.new_zeros(len(frames), (frames.shape[1] - 1) * hop + len(window))
    for index, frame in enumerate(frames.unbind(1)):
        total = total + F.pad(frame * window, (index * hop, total.shape[1] - index * hop - len(window)))
    return total


def overlap_add(frames: Tensor, window: Tensor, hop: int) -> Tensor:
    """Frames (B, T, n_fft) times a window (n_fft,), added at a distance of hop: (B, (T - 1) * hop + n_fft).

    Its gradient is the same window over overlapping views; autograd would fill a whole tensor for each piece.
    """
    return _OverlapAdd.apply(frames, window, hop)


class _OverlapAdd(torch.autograd.Function):
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
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (window,) = ctx.saved_tensors
        return gradient.unfold(-1, len(window), ctx.hop) * window, None, None


def plain_polar_spectrum(values: Tensor) -> Tensor:
    """What `polar_spectrum` computes."""
    log_magnitude, phase = values.float().chunk(2, dim=-1)
    return torch.polar(log_magnitude.exp().clamp(max=LOUDEST), phase)


def polar_spectrum(values: Tensor) -> Tensor:
    """exp(a) (cos b + i sin b), the magnitude at most `LOUDEST`, of (..., 2 N) holding a and b: complex (..., N).

    The gradient takes the spectrum itself and two products; autograd would compute exp, cos and sin anew.
    """
    return _PolarSpectrum.apply(values)


class _PolarSpectrum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        log_magnitude, phase = values.float().chunk(2, dim=-1)
        magnitude = log_magnitude.exp().clamp_(max=LOUDEST)
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        ctx.save_for_backward(values, spectrum)
        return spectrum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        values, spectrum = ctx.saved_tensors
        turned = gradient * spectrum.conj()
        moves = values.chunk(2, dim=-1)[0] <= math.log(LOUDEST)
        return torch.cat([turned.real * moves, turned.imag], dim=-1).to(values.dtype)


def plain_spectra(waveform: Tensor, window: Tensor) -> Tensor:
    """What `spectra` computes."""
    size = len(window)
    options = {"window": window, "pad_mode": "constant", "return_complex": True}
    return torch.stft(waveform, size, size // 4, **options).transpose(1, 2)


def spectra(waveform: Tensor, window: Tensor) -> Tensor:
    """Complex spectra (B, T, W) of waveforms (B, S) in fp32: centred frames, zeros beyond both ends.

    The hop is a quarter of the window (n_fft,), so that T = S // hop + 1 and W = n_fft // 2 + 1. torch.stft's own
    backward pass is a complex transform of twice the work, and puts samples back one by one.
    """
    return _Spectrum.apply(waveform, window)


def plain_spectral_magnitudes(waveform: Tensor, window: Tensor) -> Tensor:
    """What `spectral_magnitudes` computes."""
    return (torch.view_as_real(plain_spectra(waveform, window)).square().sum(-1) + POWER_FLOOR).sqrt()


def spectral_magnitudes(waveform: Tensor, window: Tensor) -> Tensor:
    """Square root of the power of `spectra`, with a floor under it: (B, T, W)."""
    return _Magnitude.apply(waveform, window)


def _spectrum(waveform: Tensor, window: Tensor) -> Tensor:
    size = len(window)
    padded = F.pad(waveform, (size // 2, size // 2))
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
    def forward(ctx: Any, waveform: Tensor, window: Tensor) -> Tensor:
        ctx.save_for_backward(window)
        ctx.samples = waveform.shape[-1]
        return _spectrum(waveform, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (window,) = ctx.saved_tensors
        return _to_waveform(gradient.clone(), window, ctx.samples), None


class _Magnitude(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, waveform: Tensor, window: Tensor) -> Tensor:
        spectrum = _spectrum(waveform, window)
        magnitude = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag).add_(POWER_FLOOR).sqrt_()
        ctx.save_for_backward(spectrum, magnitude, window)
        ctx.samples = waveform.shape[-1]
        return magnitude

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        spectrum, magnitude, window = ctx.saved_tensors
        return _to_waveform(spectrum * (gradient / magnitude), window, ctx.samples), None


def plain_snake(x: Tensor, alpha: Tensor) -> Tensor:
    """What `snake` computes."""
    wide = alpha.float()
    return (x.float() + (x.float() * wide).sin().square() / (wide + 1e-9)).to(x.dtype)


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """DAC's activation, x + sin^2(alpha x) / alpha, of x (B, C, T) and alpha (1, C, 1): in fp32, rounded at the end.

    Few passes over memory, and the slope is computed anew in the backward pass instead of keeping its parts.
    """
    return _Snake.apply(x, alpha)


class _Snake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        alpha = alpha.float()
        sine = (x.float() * alpha).sin_()
        return torch.addcdiv(x.float(), sine.square_(), alpha + 1e-9).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        kept, given = ctx.saved_tensors
        x, alpha, gradient = kept.float(), given.float(), gradient.float()
        scale = 1 / (alpha + 1e-9)
        # the slope of sin^2(alpha x) is sin(2 alpha x), times alpha for x and times x for alpha
        angle = x * (2 * alpha)
        slope = angle.sin().mul_(gradient)
        to_alpha = torch.linalg.vecdot(slope, x).sum(0)[:, None] * scale
        squares = angle.cos_().neg_().add_(1)  # twice sin^2
        to_alpha -= torch.linalg.vecdot(squares, gradient).sum(0)[:, None] * (scale.square() / 2)
        return slope.mul_(alpha * scale).add_(gradient).to(kept.dtype), to_alpha.to(given.dtype)


def plain_mean_absolute_difference(made: Tensor, wanted: Tensor) -> Tensor:
    """What `mean_absolute_difference` computes."""
    return F.l1_loss(made.float(), wanted.float())


def mean_absolute_difference(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 loss in fp32 of tensors of any precision and one shape; only `made` takes a gradient.

    About half of the plain one's passes over memory: signs are kept in the input's own precision for the backward pass.
    """
    return _MeanAbsoluteDifference.apply(made, wanted)


class _MeanAbsoluteDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, wanted: Tensor) -> Tensor:
        ctx.save_for_backward((made - wanted).sign_())  # exact in any precision
        total = made.new_zeros((), dtype=torch.float32)
        for one, other in zip(_pieces(made), _pieces(wanted), strict=True):
            total += (one.float() - other.float()).abs_().sum()
        return total / made.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors
        return signs * (gradient / signs.numel()).to(signs.dtype), None


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """A tensor's values in pieces that a CPU's cache holds; whole elsewhere."""
    flat = (x.movedim(1, -1) if x.ndim > 1 else x).reshape(-1)  # no copy where channels come last
    return flat.split(PIECE if x.device.type == "cpu" else max(1, flat.numel()))
