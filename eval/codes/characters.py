"""A text that is aligned with its recording, put on the code frames: one character for each frame.

Shapes: F code frames of one utterance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["NOTHING", "Span", "character_spans", "frame_labels"]

NOTHING = 0  # the label of a frame in which nothing is said; a character's is its code point


@dataclass(frozen=True)
class Span:
    """One character from `start` to `end`, in seconds."""

    character: str
    start: float
    end: float


def character_spans(row: Mapping[str, Any]) -> list[Span] | None:
    """The characters of an aligned line of a manifest; None where it is not aligned.

    Args:
        row: with `characters` ([{character, start, end}]), or with `words` ([{word, start, end}]), whose characters
            are then spread evenly from the word's start to its end. Lower case counts for both.

    Raises:
        ValueError: an entry lacks a key, or ends before it starts.
    """
    spans = []
    for column, key in (("characters", "character"), ("words", "word")):
        if not isinstance(row.get(column), list):
            continue
        for entry in row[column]:
            try:
                text, start, end = str(entry[key]).lower(), float(entry["start"]), float(entry["end"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{column}: {entry!r} is not {{{key}, start, end}}") from error
            if not 0 <= start <= end:
                raise ValueError(f"{column}: {entry!r} ends before it starts, or starts below 0")
            for place, character in enumerate(text.replace(" ", "")):
                edges = (start + (end - start) * (place + i) / len(text) for i in (0, 1))
                spans.append(Span(character, *edges))
        return spans
    return None


def frame_labels(spans: Sequence[Span], n_frames: int, frame_rate_hz: float) -> np.ndarray:
    """The character at the middle of each frame as its code point (F,), `NOTHING` where none is said.

    Args:
        spans: the utterance's characters.
        n_frames: F.
        frame_rate_hz: frames a second.
    """
    labels = np.full(n_frames, NOTHING, dtype=np.int64)
    middles = (np.arange(n_frames) + 0.5) / frame_rate_hz
    for span in spans:
        labels[(span.start <= middles) & (middles < span.end)] = ord(span.character[0])
    return labels
