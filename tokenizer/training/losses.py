"""The losses of the codec training: multi-scale mel, least-squares adversarial, feature matching; and their weights.

Shapes: B batch, S samples, N mel channels, T frames.

Sources: weights, windows and the form of each term are the published 12.5 Hz configuration's (kakaocorp/lmspt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from tokenizer.model.cpu_kernels import mean_absolute_difference
from tokenizer.precision import full_precision
from tokenizer.training.stft import Padding, magnitudes


@dataclass
class LossWeights:
    """What each term counts. Defaults are the published ones but for `distillation`, which depends on the teacher."""

    mel: float = field(default=15.0, metadata={"help": "multi-scale mel reconstruction"})
    adversarial: float = field(default=1.0, metadata={"help": "least-squares generator loss"})
    feature_matching: float = field(default=2.0, metadata={"help": "L1 between the discriminators' features"})
    commitment: float = field(default=0.25, metadata={"help": "latents towards their entries, both kinds of book"})
    codebook: float = field(default=1.0, metadata={"help": "entries towards their latents, both kinds of book"})
    distillation: float | None = field(
        default=None,
        metadata={
            "help": "MSE between the teacher's encodings (published: 500 at whisper-large-v3 in windows of 30 s, and "
            "in v1 of the paper 100 at whisper-small); null: 100 / variance of this teacher's encoding, each channel "
            "around its own mean, measured once at the start"
        },
    )


class MultiScaleMelLoss(nn.Module):
    """L1 on log10 power plus L1 on magnitude of mel spectrograms at several windows, summed over the windows.

    Args:
        sampling_rate: of the waveforms, in Hz.
        windows: STFT lengths in samples; the hop is a quarter of each.
        n_mels: mel channels of each window.
        padding: what the first and last frames see beyond the ends, `zeros` or (published) `reflect`.
    """

    def __init__(
        self,
        sampling_rate: int,
        windows: Sequence[int] = (256, 512, 1024, 2048),
        n_mels: Sequence[int] = (40, 80, 160, 320),
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        self.windows, self.padding = tuple(windows), padding
        for window, channels in zip(windows, n_mels, strict=True):
            filters = mel_filter_bank(
                1 + window // 2, channels, 0.0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney"
            )
            # Narrow low channels of a short window fall between two bins: an empty filter would only dilute the mean.
            filters = torch.tensor(filters.T, dtype=torch.float32)
            self.register_buffer(f"filters_{window}", filters[filters.sum(1) > 0], persistent=False)
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar loss between waveforms (B, 1, S) and (B, 1, S)."""
        with full_precision(output):
            total = output.new_zeros((), dtype=torch.float32)
            for window in self.windows:
                with torch.no_grad():
                    wanted = self._features(target.float()[:, 0], window)
                made = self._features(output.float()[:, 0], window)
                for one, other in zip(made, wanted, strict=True):
                    total = total + nn.functional.l1_loss(one, other)
            return total

    def _features(self, waveform: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Mel magnitudes and their log10 power, each (B, T, N), of waveforms (B, S)."""
        filters, taper = getattr(self, f"filters_{window}"), getattr(self, f"window_{window}")
        magnitude = magnitudes(waveform, taper, self.padding) @ filters.T
        return magnitude, 2 * magnitude.clamp(min=1e-5).log10()


Features = list[list[Tensor]]  # per discriminator: the maps after each layer, the last one its verdict


def discriminator_loss(real: Features, fake: Features) -> Tensor:
    """Least squares (LSGAN, arXiv 1611.04076): real towards 1, fake towards 0, summed over discriminators.

    Args:
        real: Of each discriminator its layers' outputs for real crops, the last of them the scores.
        fake: The same for generated crops.

    Returns:
        () fp32.
    """
    return sum(
        (1 - r[-1].float()).square().mean() + f[-1].float().square().mean() for r, f in zip(real, fake, strict=True)
    )


def generator_losses(real: Features, fake: Features) -> tuple[Tensor, Tensor]:
    """The adversarial term (fake towards 1) and the feature matching term, each summed over discriminators.

    Feature matching is the L1 distance of all outputs but the scores; no gradient reaches those of real crops.

    Args:
        real: As in :func:`discriminator_loss`.
        fake: The same for generated crops.

    Returns:
        Both (), fp32.
    """
    adversarial = sum((1 - f[-1].float()).square().mean() for f in fake)
    matching = sum(
        mean_absolute_difference(made, wanted.detach())
        for r, f in zip(real, fake, strict=True)
        for made, wanted in zip(f[:-1], r[:-1], strict=True)
    )
    return adversarial, matching
