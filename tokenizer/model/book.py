"""What every codebook of the quantizer can do, whatever its entries are made of.

Shapes: B items, F frames, D latent channels, E codebook dimension, N entries.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizer.model.code_use import count_codes

DEAD_USAGE = 0.05  # running use, relative to even use, under which an entry counts as dead


@dataclass
class BookOutput:
    """What one book makes of its input. Losses are per item: (B,)."""

    quantized: Tensor  # (B, F, D), straight-through
    codes: Tensor  # (B, F) int64
    projected: Tensor  # (B, F, E), detached: the candidates for revival
    commitment_loss: Tensor  # (B,)
    codebook_loss: Tensor  # (B,)


class Book(nn.Module):
    """One codebook. `usage` is a running mean of an entry's fraction of the frames, times N: 1 is even use, 0 dead."""

    usage: Tensor  # (N,), a buffer of the subclass

    @property
    def size(self) -> int:
        """N, the number of entries."""
        return len(self.usage)

    @abstractmethod
    def forward(self, latents: Tensor, mask: Tensor | None) -> BookOutput:
        """Quantizes latents (B, F, D) under a mask (B, F)."""

    @abstractmethod
    def look_up(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Quantized latents (B, F, D) of codes (B, F), zero past the mask."""

    @abstractmethod
    def revive(self, candidates: Tensor, generator: torch.Generator, threshold: float, trial: float = 1.0) -> int:
        """Replaces entries used less than `threshold` by some of the candidates (any, E), which begin with the use
        `trial`; returns how many."""

    def update_usage(self, codes: Tensor, mask: Tensor | None = None, decay: float = 0.99) -> None:
        """Moves `usage` towards the frequencies of codes (B, F) among valid frames."""
        valid = codes if mask is None else codes.masked_fill(~mask, -1)
        self.follow(count_codes(valid[:, None], [self.size])[0], decay)

    @torch.no_grad()
    def follow(self, counts: Tensor, decay: float = 0.99) -> None:
        """Moves `usage` towards the frequencies of counts (N,); where they are all zero it stays as it is."""
        frames = counts.sum()
        frequencies = counts.to(self.usage) * (self.size / frames.to(self.usage))
        self.usage.copy_(torch.where(frames > 0, self.usage.lerp(frequencies, 1 - decay), self.usage))
