"""Finite scalar quantization: a book without entries to learn, for the semantic side (an ablation of ours).

Shapes: B items, F frames, D latent channels, E dimensions (one per list of levels), N entries = product of the levels.
Everything here runs in fp32 with autocast off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.model.book import Book, BookOutput
from tokenizer.model.layers import apply_mask
from tokenizer.precision import full_precision

MARGIN = 1e-3  # by which the bounded values overshoot the outer levels, so that these are reached


@lru_cache(maxsize=16)
def digits(levels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels and radix of each dimension (E,); kept, because a copy to a GPU waits for it."""
    with torch.inference_mode(False):
        radix = [math.prod(levels[:index]) for index in range(len(levels))]
        return torch.tensor(levels, device=device), torch.tensor(radix, device=device)


class FiniteScalarQuantizer(Book):
    """Projects to a few dimensions, bounds each by a tanh, rounds to that dimension's levels; straight-through.

    Follows arXiv 2309.15505: no entry is learnt, so there is neither a commitment nor a codebook loss, and no entry
    can be revived. A code is the levels' digits in mixed radix, the first dimension counting ones. Entries lie evenly
    in [-1, 1] (an even number of levels has no +1).

    Args:
        latent_dim: D.
        levels: levels per dimension; the paper advises five or more each, e.g. [8, 5, 5, 5] for 1000 entries.
    """

    def __init__(self, latent_dim: int, levels: Sequence[int]) -> None:
        super().__init__()
        self.project_in = nn.Linear(latent_dim, len(levels))
        self.project_out = nn.Linear(len(levels), latent_dim)
        self.levels = tuple(levels)
        self.register_buffer("usage", torch.ones(math.prod(levels)))

    def forward(self, latents: Tensor, mask: Tensor | None) -> BookOutput:
        """Quantizes latents (B, F, D) under a mask (B, F). Both losses are zero."""
        with full_precision(latents):
            projected = F.linear(latents.float(), self.project_in.weight.float(), self.project_in.bias.float())
            bounded = self._bound(projected)
            rounded = bounded + (bounded.round() - bounded).detach()
            levels, radix = digits(self.levels, latents.device)
            half = levels // 2
            codes = ((bounded.detach().round().long() + half) * radix).sum(dim=-1)
            none = latents.new_zeros(len(latents), dtype=torch.float32)
            return BookOutput(self._out(rounded / half, mask), codes, bounded.detach(), none, none)

    def look_up(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Quantized latents (B, F, D) of codes (B, F), zero past the mask."""
        with full_precision(self.project_out.weight):
            return self._out(self.values(codes), mask)

    def values(self, codes: Tensor) -> Tensor:
        """The entries (..., E) of codes (...), within [-1, 1]."""
        levels, radix = digits(self.levels, codes.device)
        return (codes[..., None] // radix % levels - levels // 2) / (levels // 2)

    def revive(self, candidates: Tensor, generator: torch.Generator, threshold: float, trial: float = 1.0) -> int:
        """Nothing to revive: entries are fixed. Returns 0."""
        return 0

    def _bound(self, projected: Tensor) -> Tensor:
        """(..., E) into just beyond its outermost levels; an even number of levels is shifted by half a level."""
        levels, _ = digits(self.levels, projected.device)
        reach = (levels - 1) * (1 + MARGIN) / 2
        reach = torch.minimum(reach, (levels - 1) / 2 + 0.4)  # a thousand levels must not round to one more
        offset = (levels % 2 == 0) * 0.5
        return torch.tanh(projected + torch.atanh(offset / reach)) * reach - offset

    def _out(self, entries: Tensor, mask: Tensor | None) -> Tensor:
        return apply_mask(F.linear(entries, self.project_out.weight.float(), self.project_out.bias.float()), mask)
