"""How the codes of K codebooks come one after the other: which codes stand at each position of a sequence.

Shapes: K codebooks, F frames, codes (K, F); a grid (T, S) of T positions and S codes that stand at one of them.

`semantic` takes book 0 alone, a position a frame. `flatten` takes the books of a frame in turn, K positions a frame.
`delay` (MusicGen, Copet et al. 2023, arXiv 2306.05284, section 2.2) has a position a frame again, with one code of each
book; book k is k frames late, so that a code is chosen when those of the books before it are known in its frame:

    position   0    1    2    3    4
    book 0    c00  c01  c02   .    .
    book 1     .   c10  c11  c12   .
    book 2     .    .   c20  c21  c22

`parallel` (the channels of dMel, Bai et al. 2024, arXiv 2407.15835) has the K codes of one frame at a position: each is
chosen by itself from what came before, and no position is added. It suits many books that hardly depend on each other.

>>> Delayed(2).apply(np.array([[1, 2, 3], [7, 8, 9]])).tolist()
[[1, -1], [2, 7], [3, 8], [-1, 9]]
>>> Delayed(2, late=0).apply(np.array([[1, 2, 3], [7, 8, 9]])).tolist()
[[1, 7], [2, 8], [3, 9]]
>>> Interleaved(2).apply(np.array([[1, 2, 3], [7, 8, 9]]))[:, 0].tolist()
[1, 7, 2, 8, 3, 9]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

EMPTY = -1  # no code of that book at that position
SEMANTIC, FLATTEN, DELAY, PARALLEL = PATTERNS = ("semantic", "flatten", "delay", "parallel")
LATE = {DELAY: 1, PARALLEL: 0}  # the patterns whose books stand side by side, and how many frames late each one is


class PatternError(ValueError):
    """No such pattern, or not with that number of codebooks; the message says which there are."""


class Pattern(Protocol):
    """A way to lay codes out, and back."""

    n_codebooks: int

    @property
    def name(self) -> str:
        """As in configurations, model folders and predictions."""
        ...

    @property
    def n_streams(self) -> int:
        """S: codes of one position."""
        ...

    def positions(self, n_frames: int) -> int:
        """T of so many frames."""
        ...

    def apply(self, codes: np.ndarray) -> np.ndarray:
        """(K, F) codes -> (T, S) int64, `EMPTY` where there is none."""
        ...

    def undo(self, grid: np.ndarray) -> np.ndarray:
        """(T, S) -> (K, F) int64 codes; frames at the end that are not whole are left out."""
        ...


@dataclass(frozen=True)
class Interleaved:
    """`semantic` of one codebook, `flatten` of more: the codes of a frame in turn."""

    n_codebooks: int

    @property
    def name(self) -> str:
        return SEMANTIC if self.n_codebooks == 1 else FLATTEN

    @property
    def n_streams(self) -> int:
        return 1

    def positions(self, n_frames: int) -> int:
        """As `Pattern`."""
        return n_frames * self.n_codebooks

    def apply(self, codes: np.ndarray) -> np.ndarray:
        """As `Pattern`."""
        return np.asarray(codes, dtype=np.int64).T.reshape(-1, 1)

    def undo(self, grid: np.ndarray) -> np.ndarray:
        """As `Pattern`."""
        whole = len(grid) // self.n_codebooks * self.n_codebooks
        return np.asarray(grid, dtype=np.int64)[:whole, 0].reshape(-1, self.n_codebooks).T


@dataclass(frozen=True)
class Delayed:
    """`delay`: book k is k frames late; `parallel`, where ``late`` is 0: no book is."""

    n_codebooks: int
    late: int = 1

    @property
    def name(self) -> str:
        return DELAY if self.late else PARALLEL

    @property
    def n_streams(self) -> int:
        return self.n_codebooks

    def positions(self, n_frames: int) -> int:
        """As `Pattern`."""
        return n_frames + self.late * (self.n_codebooks - 1)

    def apply(self, codes: np.ndarray) -> np.ndarray:
        """As `Pattern`."""
        n_frames = codes.shape[1]
        grid = np.full((self.positions(n_frames), self.n_codebooks), EMPTY, dtype=np.int64)
        for book in range(self.n_codebooks):
            first = self.late * book
            grid[first : first + n_frames, book] = codes[book]
        return grid

    def undo(self, grid: np.ndarray) -> np.ndarray:
        """As `Pattern`."""
        n_frames = max(0, len(grid) - self.late * (self.n_codebooks - 1))
        books = [grid[self.late * book :][:n_frames, book] for book in range(self.n_codebooks)]
        return np.stack(books).astype(np.int64)


def resolve_pattern(name: str, n_codebooks: int) -> Pattern:
    """The pattern of a name with so many codebooks; `auto` is `semantic` with one and `flatten` with more.

    Raises:
        PatternError: There is none, or it needs another number.
    """
    if name not in ("auto", *PATTERNS):
        raise PatternError(f"pattern: {name!r} is none; there are {', '.join(PATTERNS)}, and auto")
    if name == SEMANTIC and n_codebooks > 1:
        raise PatternError(f"pattern: semantic is book 0 alone; set n_codebooks=1, not {n_codebooks}, or take flatten")
    if name in (FLATTEN, *LATE) and n_codebooks < 2:
        raise PatternError(f"pattern: {name} lays several codebooks out; set n_codebooks=2 or more, or take semantic")
    return Delayed(n_codebooks, LATE[name]) if name in LATE else Interleaved(n_codebooks)
