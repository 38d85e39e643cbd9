"""How evenly the entries of each book are used: counted codes, their perplexity, and what even use would show.

Shapes: B items, K books, F frames, N entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BookUse:
    """What some frames say about one book."""

    size: int  # N
    frames: int
    entries: int  # that occur at all
    perplexity: float  # 2 ** entropy in bits: as many evenly used entries would be as hard to guess

    @property
    def used(self) -> float:
        """Share of the entries that occur."""
        return self.entries / self.size

    @property
    def even(self) -> float:
        """How many entries would be expected to occur in as many frames if all were equally likely."""
        return self.size * -math.expm1(-self.frames / self.size)


def book_use(counts: Tensor) -> BookUse:
    """The use of a book whose entries occurred `counts` (N,) times; a perplexity of 0 where there were no frames."""
    counts = counts.double().cpu()
    frames = counts.sum()
    shares = counts[counts > 0] / frames
    perplexity = float((-(shares * shares.log()).sum()).exp()) if frames else 0.0
    return BookUse(len(counts), int(frames), len(shares), perplexity)


class CodeCounts:
    """Counts codes on their own device, without waiting for it, until `take` reads them off.

    A book's running `usage` cannot show a collapse while dead codes are revived: what is revived counts as used for a
    hundred steps. These counts are of frames alone.
    """

    def __init__(self) -> None:
        self._counts: list[Tensor] = []

    @torch.no_grad()
    def add(self, codes: Tensor, sizes: Sequence[int]) -> None:
        """Counts codes (B, K, F) of books with `sizes` entries; -1 counts nowhere."""
        if not self._counts:
            self._counts = [torch.zeros(size, dtype=torch.int64, device=codes.device) for size in sizes]
        valid = (codes >= 0).long()
        for book, counts in enumerate(self._counts):
            counts.index_add_(0, codes[:, book].clamp_min(0).flatten(), valid[:, book].flatten())

    def take(self) -> list[BookUse]:
        """The use of each book since the last call; an empty list where nothing was counted."""
        found, self._counts = [book_use(counts) for counts in self._counts], []
        return found
