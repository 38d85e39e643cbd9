"""What speech codes cost and how well the codebooks are used.

Shapes: K codebooks (book 0 semantic), F frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["BookStatistics", "CodeStatistics", "code_statistics", "most_frames", "nominal_bitrate"]


@dataclass(frozen=True)
class BookStatistics:
    """Use of one codebook: share of its entries seen, entropy of their distribution, and perplexity 2 ** entropy."""

    size: int
    used: int
    use: float
    entropy_bits: float
    perplexity: float


@dataclass(frozen=True)
class CodeStatistics:
    """Cost and use of the codes of one tokenizer on some recordings, which ``data`` names.

    ``tokens_per_second`` is what an LLM reads when it gets book 0 only; ``tokens_per_second_all`` with every book.
    Use is bounded by the number of frames: ``n_frames`` belongs beside it. ``n_scored`` recordings have codes;
    ``n_failed`` have none, and nothing of them is in any figure. ``cell`` is that of a comparison.
    """

    name: str
    frame_rate_hz: float
    tokens_per_second: float
    tokens_per_second_all: float
    bitrate_semantic_bps: float
    bitrate_bps: float
    n_scored: int
    n_frames: int
    books: list[BookStatistics]
    data: str = ""
    n_failed: int = 0
    cell: str = ""

    @property
    def label(self) -> str:
        """The name in tables; the cell's stands before it unless it is in the path that names the tokenizer."""
        return self.name if self.cell in ("", *self.name.split("/")) else f"{self.cell}: {self.name}"


def nominal_bitrate(frame_rate_hz: float, codebook_sizes: Sequence[int]) -> float:
    """Bits per second when every code is sent with log2(size) bits, without entropy coding."""
    return frame_rate_hz * sum(math.log2(size) for size in codebook_sizes)


def code_statistics(
    codes: Iterable[np.ndarray],
    codebook_sizes: Sequence[int],
    frame_rate_hz: float,
    name: str = "",
    data: str = "",
    n_failed: int = 0,
) -> CodeStatistics:
    """Statistics of the codes of a test set, or of any other set of recordings.

    Args:
        codes: one integer array (K, F) for each utterance; negative entries (padding) are left out.
        codebook_sizes: entries of each book, book 0 first.
        frame_rate_hz: exact frame rate.
        name: the tokenizer, as tables name it.
        data: the recordings, as tables name them.
        n_failed: recordings that have no codes.

    Raises:
        ValueError: an array is not (K, F), or holds a code that its book has not.
    """
    counts = [np.zeros(size, dtype=np.int64) for size in codebook_sizes]
    n_frames = n_scored = 0
    for position, array in enumerate(codes):
        if array.ndim != 2 or array.shape[0] != len(codebook_sizes):
            raise ValueError(
                f"codes of utterance {position} have shape {array.shape}, not ({len(codebook_sizes)}, frames)"
            )
        n_frames += int((array[0] >= 0).sum())
        n_scored += 1
        for book, row in enumerate(array):
            valid = row[row >= 0]
            if valid.size and valid.max() >= codebook_sizes[book]:
                raise ValueError(
                    f"code {valid.max()} of utterance {position} is not in book {book} of {codebook_sizes[book]} "
                    "entries: the codes come from another tokenizer"
                )
            counts[book] += np.bincount(valid, minlength=codebook_sizes[book])
    books = []
    for count in counts:
        share = count[count > 0] / max(count.sum(), 1)
        entropy = float(-(share * np.log2(share)).sum()) + 0.0
        used = int((count > 0).sum())
        books.append(BookStatistics(len(count), used, used / len(count), entropy, 2**entropy if used else 0.0))
    return CodeStatistics(
        name=name,
        frame_rate_hz=float(frame_rate_hz),
        tokens_per_second=float(frame_rate_hz),
        tokens_per_second_all=float(frame_rate_hz) * len(codebook_sizes),
        bitrate_semantic_bps=nominal_bitrate(frame_rate_hz, codebook_sizes[:1]),
        bitrate_bps=nominal_bitrate(frame_rate_hz, codebook_sizes),
        n_scored=n_scored,
        n_frames=n_frames,
        books=books,
        data=data,
        n_failed=n_failed,
    )


def most_frames(codes: Sequence[CodeStatistics]) -> list[CodeStatistics]:
    """For each tokenizer the statistics of its largest set of recordings, which tell most of how its books are used."""
    largest: dict[tuple[str, str], CodeStatistics] = {}
    for item in codes:
        key = (item.cell, item.name)
        if key not in largest or item.n_frames > largest[key].n_frames:
            largest[key] = item
    return list(largest.values())
