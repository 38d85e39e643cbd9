"""Multi-period and multi-band complex STFT discriminators.

Shapes: B batch, S samples, P period, T frames, W frequency bins of a band.

Source: the published configuration (periods 2, 3, 5, 7, 11; STFT 2048, 1024, 512; input DC-removed, peak 0.8), whose
discriminators are those of the Descript Audio Codec (arXiv 2306.06546).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tokenizer.losses import Features

BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


@dataclass
class DiscriminatorConfig:
    """Which discriminators judge, how wide they are, and from which step on. Widths default to the published ones."""

    enabled: bool = field(default=True, metadata={"help": "false: no adversarial training"})
    start_step: int = field(default=0, metadata={"help": "the generator trains alone before this step"})
    periods: list[int] = field(
        default_factory=lambda: [2, 3, 5, 7, 11], metadata={"help": "multi-period discriminators"}
    )
    fft_sizes: list[int] = field(
        default_factory=lambda: [2048, 1024, 512], metadata={"help": "multi-band STFT discriminators"}
    )
    period_channels: int = field(default=32, metadata={"help": "channels of the first period layer, x4 x4 x2 after it"})
    band_channels: int = field(default=32, metadata={"help": "channels of every band layer"})


def _conv(n_in: int, n_out: int, kernel: tuple[int, int], stride: tuple[int, int]) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return weight_norm(nn.Conv2d(n_in, n_out, kernel, stride, padding))


class PeriodDiscriminator(nn.Module):
    """Looks at every P-th sample in columns."""

    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels, 32 * channels]
        strides = [3, 3, 3, 3, 1]
        self.layers = nn.ModuleList(
            _conv(a, b, (5, 1), (s, 1)) for a, b, s in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.verdict = _conv(widths[-1], 1, (3, 1), (1, 1))

    def forward(self, waveform: Tensor) -> list[Tensor]:
        """Maps (B, 1, S) to the feature maps of each layer."""
        padded = nn.functional.pad(waveform, (0, -waveform.shape[-1] % self.period))
        hidden = padded.unflatten(-1, (-1, self.period))
        features = []
        for layer in self.layers:
            hidden = nn.functional.leaky_relu(layer(hidden), 0.1)
            features.append(hidden)
        return [*features, self.verdict(hidden)]


class BandDiscriminator(nn.Module):
    """Looks at a complex spectrogram in five frequency bands, each with its own layers."""

    def __init__(self, fft_size: int, channels: int) -> None:
        super().__init__()
        self.fft_size = fft_size
        bins = fft_size // 2 + 1
        self.bands = [(round(low * bins), round(high * bins)) for low, high in BANDS]
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                [
                    _conv(2, channels, (3, 9), (1, 1)),
                    _conv(channels, channels, (3, 9), (1, 2)),
                    _conv(channels, channels, (3, 9), (1, 2)),
                    _conv(channels, channels, (3, 9), (1, 2)),
                    _conv(channels, channels, (3, 3), (1, 1)),
                ]
            )
            for _ in self.bands
        )
        self.verdict = _conv(channels, 1, (3, 3), (1, 1))

    def forward(self, waveform: Tensor) -> list[Tensor]:
        """Maps (B, 1, S) to the feature maps of each layer of each band, the verdict over all bands last."""
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = torch.stft(
                waveform[:, 0].float(), self.fft_size, self.fft_size // 4, window=self.window, pad_mode="constant",
                return_complex=True,
            )  # fmt: skip
            parts = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (B, 2, T, W)
        features, outputs = [], []
        for (low, high), stack in zip(self.bands, self.stacks, strict=True):
            hidden = parts[..., low:high]
            for layer in stack:
                hidden = nn.functional.leaky_relu(layer(hidden), 0.1)
                features.append(hidden)
            outputs.append(hidden)
        return [*features, self.verdict(torch.cat(outputs, dim=-1))]


class Discriminator(nn.Module):
    """All discriminators of a configuration."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            [PeriodDiscriminator(period, config.period_channels) for period in config.periods]
            + [BandDiscriminator(size, config.band_channels) for size in config.fft_sizes]
        )
        if not self.parts:
            raise ValueError(
                "discriminator: no periods and no fft_sizes; set discriminator.enabled=false to train without"
            )

    def forward(self, waveform: Tensor) -> Features:
        """Maps waveforms (B, 1, S) to each part's feature maps."""
        centred = waveform - waveform.mean(dim=-1, keepdim=True)
        scaled = 0.8 * centred / (centred.abs().amax(dim=-1, keepdim=True) + 1e-9)
        return [part(scaled) for part in self.parts]
