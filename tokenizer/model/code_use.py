"""How evenly the entries of each book are used: counted codes, their perplexity, and what even use would show.

Shapes: B items, K books, F frames, N entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
        """Fraction of the entries that occur."""
        return self.entries / self.size

    @property
    def even(self) -> float:
        """How many entries would be expected to occur in as many frames if all were equally likely."""
        return self.size * -math.expm1(-self.frames / self.size)


def book_use(counts: Tensor) -> BookUse:
    """The use of a book whose entries occurred `counts` (N,) times; a perplexity of 0 where there were no frames."""
    counts = counts.double().cpu()
    frames = counts.sum()
    frequencies = counts[counts > 0] / frames
    perplexity = float((-(frequencies * frequencies.log()).sum()).exp()) if frames else 0.0
    return BookUse(len(counts), int(frames), len(frequencies), perplexity)


@torch.no_grad()
def count_codes(codes: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """How often each entry occurs in codes (B, K, F), one (N,) int64 for each of K books with `sizes` entries.

    All on the codes' device, which nobody waits for. -1 counts nowhere.
    """
    starts = torch.tensor([0, *accumulate(sizes[:-1])]).to(codes.device, non_blocking=True)
    places = codes.clamp_min(0) + starts[:, None]
    counts = torch.zeros(sum(sizes), dtype=torch.int64, device=codes.device)
    counts.scatter_add_(0, places.flatten(), (codes >= 0).long().flatten())
    return list(counts.split(list(sizes)))


class CodeCounts:
    """Adds up counts of codes on their own device, without waiting for it, until `take` reads them off.

    A book's running `usage` cannot show a collapse while dead codes are revived: what is revived counts as used for a
    hundred steps. These counts are of frames alone.
    """

    def __init__(self) -> None:
        self._counts: list[Tensor] = []

    def add(self, counts: Sequence[Tensor]) -> None:
        """Takes the counts (N,) of each book, as `count_codes` gives them."""
        before = self._counts or [torch.zeros_like(book) for book in counts]
        self._counts = [one + other for one, other in zip(before, counts, strict=True)]

    def take(self) -> list[BookUse]:
        """The use of each book since the last call; an empty list where nothing was counted."""
        found, self._counts = [book_use(counts) for counts in self._counts], []
        return found
