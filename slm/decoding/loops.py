"""Sequences that repeat themselves: how long a whole one does so at most, and, token by token, one that just does.

What repeats may be one frame, a phrase of codes or some words. It is a loop from `TURNS` turns on: the same sounds
twice are a stutter or a doubled word, the same codes four times on end are no speech, silence apart.

Shapes: B rows, n tokens of a frame (one for text), F frames.
"""

from __future__ import annotations

import numpy as np
import torch

TURNS = 4


def longest_loop(frames: np.ndarray) -> int:
    """Frames of the longest stretch of (n, F) that repeats itself at least `TURNS` times; 0 without one."""
    longest = 0
    for period in range(1, frames.shape[1] // TURNS + 1):
        same = longest_run((frames[:, period:] == frames[:, :-period]).all(axis=0))
        if same >= (TURNS - 1) * period:
            longest = max(longest, same + period)
    return longest


def longest_run(flags: np.ndarray) -> int:
    """The longest run of true in (F,) bool."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return int((edges[1::2] - edges[::2]).max(initial=0))


class LoopWatch:
    """Tells of each row whether its newest tokens are the end of a loop.

    It counts, for each period, how many tokens on end are those of one period before: a few operations on (B, periods)
    a token, and nothing is read back from the device.

    Args:
        n_rows: B.
        n_places: Tokens of a frame; a period is a number of whole frames.
        limit: Frames that a loop must be longer than.
        most: Frames that there will be, at most: a period longer than a `TURNS`-th of them has no time to come round.
        device: Where the tokens are.
    """

    def __init__(self, n_rows: int, n_places: int, limit: int, most: int, device: torch.device) -> None:
        self.n_places = n_places
        self.periods = n_places * torch.arange(1, max(1, most // TURNS) + 1, device=device)
        # Tokens that must equal those before them: all turns but the first, and what the limit asks for beyond.
        self.enough = torch.maximum((TURNS - 1) * self.periods, n_places * (limit + 1) - self.periods)
        self.counts = torch.zeros(n_rows, len(self.periods), dtype=torch.long, device=device)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone."""
        self.counts = self.counts[rows]

    def join(self, other: LoopWatch) -> None:
        """Takes the rows of another, of the same periods, behind its own."""
        self.counts = torch.cat([self.counts, other.counts])

    def update(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Takes all tokens (B, T) that came so far, the last of them new; returns (B,) bool, true in a loop.

        Of a row whose `lengths` (B,) is less than T only its last so many count.
        """
        n_there = min(len(self.periods), (tokens.shape[1] - 1) // self.n_places)
        if not n_there:
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        there = self.periods[:n_there]
        same = tokens[:, -1:] == tokens[:, tokens.shape[1] - 1 - there]
        if lengths is not None:
            same &= there < lengths[:, None]
        counts = self.counts[:, :n_there]
        counts.copy_((counts + 1) * same)
        return (counts >= self.enough[:n_there]).any(dim=1)
