"""Multi-period and multi-band complex STFT discriminators.

Shapes: B batch, S samples, P period, T frames, W frequency bins of a band.

Source: the published code (kakaocorp/lmspt; periods 2, 3, 5, 7, 11; STFT 2048, 1024, 512; input DC-removed, peak 0.8),
whose discriminators are those of the Descript Audio Codec (arXiv 2306.06546). Ours are half as wide in the bands and
see zeros beyond a crop's ends; docs/as-published.md lists every such difference and the key that undoes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tokenizer.model.cpu_kernels import convolution_weight, convolve_over_time
from tokenizer.training.losses import Features
from tokenizer.training.stft import Padding, stft, stft_by_hops

SMALLEST_FFT = 16
BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


@dataclass
class DiscriminatorConfig:
    """Which discriminators judge, how wide they are, and from which step on."""

    enabled: bool = field(default=True, metadata={"help": "false: no adversarial training"})
    start_step: int = field(default=0, metadata={"help": "the generator trains alone before this step"})
    periods: list[int] = field(
        default_factory=lambda: [2, 3, 5, 7, 11], metadata={"help": "multi-period discriminators"}
    )
    fft_sizes: list[int] = field(
        default_factory=lambda: [2048, 1024, 512], metadata={"help": "multi-band STFT discriminators"}
    )
    period_channels: int = field(
        default=32, metadata={"help": "channels of the first period layer, x4 x4 x2 after it (published: 32)"}
    )
    band_channels: int = field(default=32, metadata={"help": "channels of every band layer (published: 64)"})
    padding: Padding = field(
        default="zeros",
        metadata={
            "help": "beyond a crop's ends: zeros, or reflect: mirrored, with frames and borders of bands as published"
        },
    )

    def __post_init__(self) -> None:
        problems = [f"periods={self.periods}: each must be at least 1"] if min(self.periods, default=1) < 1 else []
        if any(size < SMALLEST_FFT or size % 4 for size in self.fft_sizes):
            problems.append(
                f"fft_sizes={self.fft_sizes}: each must be a multiple of 4, and at least {SMALLEST_FFT} for every band "
                "to have a bin"
            )
        least = {"start_step": 0, "period_channels": 1, "band_channels": 1}
        problems += [
            f"{n}={getattr(self, n)}: must be at least {low}" for n, low in least.items() if getattr(self, n) < low
        ]
        if self.enabled and not (self.periods or self.fft_sizes):
            problems.append("no periods and no fft_sizes; set discriminator.enabled=false to train without")
        if problems:
            raise ValueError("discriminator: " + "; ".join(problems))


class Conv(nn.Conv2d):
    """A convolution that runs channels-last, in the precision of autocast.

    Args:
        n_in, n_out, kernel, stride: as nn.Conv2d's, padded by half the kernel.
        along_time: the kernel is (k, 1), and items come as (B, C, 1, T) with their time in the last place.
    """

    def __init__(
        self, n_in: int, n_out: int, kernel: tuple[int, int], stride: tuple[int, int], along_time: bool = False
    ) -> None:
        super().__init__(n_in, n_out, kernel, stride, (kernel[0] // 2, kernel[1] // 2))
        self.along_time = along_time
        self.folded: Tensor | None = None

    def fold(self) -> Tensor:
        """The weight as the convolution takes it: weight norm multiplied out, cast and laid out in one go."""
        weight = self.weight
        weight = channels_last(weight.transpose(2, 3) if self.along_time else weight)
        return convolution_weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fold() if self.folded is None else self.folded
        if weight.is_contiguous():
            x = x.contiguous()
        if not self.along_time:
            return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)
        return convolve_over_time(x, weight, self.bias, self.stride[0], self.padding[0])


def channels_last(x: Tensor) -> Tensor:
    """A tensor (B, C, H, W) in channels-last layout and autocast's precision."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return x.to(dtype, memory_format=torch.channels_last)


class PeriodDiscriminator(nn.Module):
    """Looks at every P-th sample in columns."""

    def __init__(self, period: int, channels: int, padding: Padding = "zeros") -> None:
        super().__init__()
        self.period, self.padding = period, padding
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels, 32 * channels]
        strides = [3, 3, 3, 3, 1]
        self.layers = nn.ModuleList(
            weight_norm(Conv(a, b, (5, 1), (s, 1), along_time=True))
            for a, b, s in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.verdict = weight_norm(Conv(widths[-1], 1, (3, 1), (1, 1), along_time=True))

    def forward(self, waveform: Tensor) -> list[Tensor]:
        """Maps (B, 1, S) to the feature maps of each layer, each (B * P, C, 1, T)."""
        if self.padding == "reflect":  # as published also where nothing is missing: a period more
            padded = nn.functional.pad(waveform, (0, self.period - waveform.shape[-1] % self.period), mode="reflect")
        else:
            padded = nn.functional.pad(waveform, (0, -waveform.shape[-1] % self.period))
        # No kernel reaches beyond its column: each column as an item of its own is the same convolution, and several
        # times faster than over an image of width P, most of all backward.
        columns = padded.unflatten(-1, (-1, self.period)).transpose(2, 3)  # (B, 1, P, T)
        hidden = channels_last(columns.reshape(-1, 1, 1, columns.shape[-1]))
        features = []
        for layer in self.layers:
            hidden = nn.functional.leaky_relu(layer(hidden), 0.1, inplace=True)
            features.append(hidden)
        return [*features, self.verdict(hidden)]


class BandDiscriminator(nn.Module):
    """Looks at a complex spectrogram in five frequency bands, each with its own layers."""

    def __init__(self, fft_size: int, channels: int, padding: Padding = "zeros") -> None:
        super().__init__()
        self.fft_size, self.padding = fft_size, padding
        bins, border = fft_size // 2 + 1, int if padding == "reflect" else round
        self.bands = [(border(low * bins), border(high * bins)) for low, high in BANDS]
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                [
                    weight_norm(Conv(2, channels, (3, 9), (1, 1))),
                    weight_norm(Conv(channels, channels, (3, 9), (1, 2))),
                    weight_norm(Conv(channels, channels, (3, 9), (1, 2))),
                    weight_norm(Conv(channels, channels, (3, 9), (1, 2))),
                    weight_norm(Conv(channels, channels, (3, 3), (1, 1))),
                ]
            )
            for _ in self.bands
        )
        self.verdict = weight_norm(Conv(channels, 1, (3, 3), (1, 1)))

    def forward(self, waveform: Tensor) -> list[Tensor]:
        """Maps (B, 1, S) to the feature maps of each layer of each band, the verdict over all bands last."""
        with torch.autocast(waveform.device.type, enabled=False):
            transform = stft_by_hops if self.padding == "reflect" else stft
            spectrum = transform(waveform[:, 0].float(), self.window)
            parts = torch.view_as_real(spectrum).movedim(-1, 1)  # (B, 2, T, W), channels last as it is
        features, outputs = [], []
        bands = parts.split([high - low for low, high in self.bands], dim=-1)
        for band, stack in zip(bands, self.stacks, strict=True):
            hidden = channels_last(band)
            for layer in stack:
                hidden = nn.functional.leaky_relu(layer(hidden), 0.1, inplace=True)
                features.append(hidden)
            outputs.append(hidden)
        return [*features, self.verdict(torch.cat(outputs, dim=-1))]


class Discriminator(nn.Module):
    """All discriminators of a configuration."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            [PeriodDiscriminator(period, config.period_channels, config.padding) for period in config.periods]
            + [BandDiscriminator(size, config.band_channels, config.padding) for size in config.fft_sizes]
        )

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, no weight takes a gradient, and each is multiplied out, cast and laid out once for all passes."""
        layers = [module for module in self.modules() if isinstance(module, Conv)]
        self.requires_grad_(False)
        try:
            for layer in layers:
                layer.folded = layer.fold()
            yield
        finally:
            for layer in layers:
                layer.folded = None
            self.requires_grad_(True)

    def forward(self, waveform: Tensor) -> Features:
        """Maps waveforms (B, 1, S) to each part's feature maps."""
        centred = waveform - waveform.mean(dim=-1, keepdim=True)
        scaled = 0.8 * centred / (centred.abs().amax(dim=-1, keepdim=True) + 1e-9)
        return [part(scaled) for part in self.parts]
