"""Forced alignment: where in the audio each character or token of a known text stands, by the best path.

Of CTC scores through the trellis of the text (Graves et al. 2006, section 4.1; the path in place of the sum, as in
Kürzinger et al. 2020, "CTC-Segmentation").

Shapes: T frames of a recogniser, V its vocabulary, L tokens of the text; S = 2 L + 1 states, a blank around each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    "Alignment",
    "AlignmentError",
    "ctc_align",
    "even_characters",
    "frames_needed",
    "monotonic_spans",
    "word_frames",
]


@dataclass(frozen=True)
class Alignment:
    """`words` and `characters` of one utterance, each with its start and end in seconds; `phones` where known."""

    words: list[dict[str, Any]]
    characters: list[dict[str, Any]]
    phones: list[dict[str, Any]] = field(default_factory=list)


class AlignmentError(ValueError):
    """A text cannot be aligned to its audio; the message says why."""


def frames_needed(tokens: Sequence[int]) -> int:
    """Fewest frames that a CTC path of these tokens takes: one a token, and a blank between two that are the same."""
    return len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))


def ctc_align(log_probs: np.ndarray, tokens: Sequence[int], blank: int) -> np.ndarray:
    """The likeliest CTC path of a token sequence.

    Args:
        log_probs: (T, V) natural logarithms of the frames' probabilities.
        tokens: (L,) ids of the text, none of them the blank.
        blank: the blank's id.

    Returns:
        (L, 2) int64: first frame of each token and the one behind its last; they follow each other and none is empty.

    Raises:
        AlignmentError: there are no tokens, more than the frames can hold, or the scores are not finite.
    """
    needed = frames_needed(tokens)
    if not needed:
        raise AlignmentError("the text has nothing to align")
    if needed > len(log_probs):
        raise AlignmentError(
            f"the text is longer than the audio: it takes {needed} frames of the recogniser and there are "
            f"{len(log_probs)}"
        )
    if not np.isfinite(log_probs).all():
        raise AlignmentError("the recogniser's scores are not finite")
    states = np.full(2 * len(tokens) + 1, blank)
    states[1::2] = tokens
    emitted = log_probs[:, states].astype(np.float64)  # (T, S)
    # A blank may be passed over between two different tokens, never between two that are the same.
    may_skip = np.zeros(len(states), dtype=bool)
    may_skip[3::2] = states[3::2] != states[1:-2:2]
    score = np.full(len(states), -np.inf)
    score[:2] = emitted[0, :2]
    steps = np.zeros(emitted.shape, dtype=np.int8)  # states that the best path into each came forward
    for t in range(1, len(emitted)):
        ways = np.full((3, len(states)), -np.inf)
        ways[0] = score
        ways[1, 1:] = score[:-1]
        ways[2, 2:] = np.where(may_skip[2:], score[:-2], -np.inf)
        steps[t] = ways.argmax(0)
        score = ways.max(0) + emitted[t]
    state = len(states) - 1 if score[-1] >= score[-2] else len(states) - 2
    spans = np.zeros((len(tokens), 2), dtype=np.int64)
    for t in range(len(emitted) - 1, -1, -1):
        if state % 2:
            token = state // 2
            spans[token, 0] = t
            spans[token, 1] = spans[token, 1] or t + 1
        state -= int(steps[t, state])
    return spans


def monotonic_spans(weights: np.ndarray) -> np.ndarray:
    """The tokens' frames in order, each frame of one token, that have the greatest weight together.

    Args:
        weights: (L, T) of each token and frame, T >= L.

    Returns:
        (L, 2) int64: first frame of each token and the one behind its last; none is empty and none is left out.
    """
    n_tokens, n_frames = weights.shape
    score = np.full(n_tokens, -np.inf)
    score[0] = weights[0, 0]
    moved = np.zeros((n_frames, n_tokens), dtype=bool)  # whether the best path into it came from the token before
    for t in range(1, n_frames):
        before = np.concatenate([[-np.inf], score[:-1]])
        moved[t] = before > score
        score = np.maximum(score, before) + weights[:, t]
    spans, token = np.zeros((n_tokens, 2), dtype=np.int64), n_tokens - 1
    spans[token, 1] = n_frames
    for t in range(n_frames - 1, 0, -1):
        if moved[t, token]:
            spans[token, 0] = spans[token - 1, 1] = t
            token -= 1
    return spans


def even_characters(letters: str, start: float, end: float) -> list[dict[str, Any]]:
    """Characters of which only their word's time is known, in seconds: each has an even share of it."""
    edges = np.linspace(start, end, len(letters) + 1).round(4).tolist()
    return [{"character": c, "start": a, "end": b} for c, a, b in zip(letters, edges[:-1], edges[1:], strict=True)]


def word_frames(spans_s: Sequence[tuple[float, float]], frame_rate: float, n_frames: int) -> list[list[int]]:
    """Spans in seconds as frames of a coded utterance.

    Args:
        spans_s: start and end of each word, in order.
        frame_rate: of the codes, Hz.
        n_frames: F of the utterance.

    Returns:
        First frame of each word and the one behind its last: in order, none empty, none shared by two.

    Raises:
        AlignmentError: there are fewer frames than words.
    """
    if len(spans_s) > n_frames:
        raise AlignmentError(f"{len(spans_s)} words have no frame each in {n_frames} frames of codes")
    frames: list[list[int]] = []
    before = 0
    for i, (start, end) in enumerate(spans_s):
        after = len(spans_s) - i - 1  # words that still need a frame
        first = min(max(before, round(start * frame_rate)), n_frames - after - 1)
        before = min(max(first + 1, round(end * frame_rate)), n_frames - after)
        frames.append([first, before])
    return frames
