"""Which character is spoken when: a manifest's aligned column `characters`, and its frames in a training crop.

The column is a list of {"character": "a", "start": 0.12, "end": 0.2}, in seconds of the recording.

Shapes: F code frames of a crop.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from tokenizer.data.utterances import DataError, Utterance

COLUMN = "characters"
KNOWN = " 'abcdefghijklmnopqrstuvwxyz"  # the space stands for silence too, in front of the words and between them
OTHER = len(KNOWN)  # every other character
N_CLASSES = len(KNOWN) + 1
Span = tuple[int, float, float]  # class, start and end in seconds


def read_spans(utterance: Utterance) -> list[Span]:
    """The aligned characters of a recording.

    Raises:
        DataError: it has none, or they cannot be read as such; the message says the way out.
    """
    written = utterance.columns.get(COLUMN, "")
    if not written:
        raise DataError(
            f"{utterance.name}: no column {COLUMN}, which distillation.kind=contrastive learns from; give a manifest "
            'that holds aligned characters ([{"character", "start", "end"}] in seconds, as `slm align` writes them), '
            "or take another distillation.kind"
        )
    try:
        return [_span(item) for item in json.loads(written)]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{utterance.name}: the column {COLUMN} is no list of characters with start and end in seconds ({error}); "
            "align the corpus anew"
        ) from None


def _span(item: dict[str, object]) -> Span:
    start, end = float(item["start"]), float(item["end"])
    if not 0 <= start <= end < float("inf"):
        raise ValueError(f"from {start} to {end}")
    place = KNOWN.find(str(item["character"]).lower()) if item["character"] else 0
    return (OTHER if place < 0 else place), start, end


def frame_characters(spans: Sequence[Span], start_s: float, frame_s: float, n_frames: int) -> np.ndarray:
    """The class of each frame: the character that fills most of it, the space where none does.

    Args:
        spans: of the recording.
        start_s: where the first frame begins in it.
        frame_s: how much of the recording a frame holds, which is more than its own length in a faster copy.
        n_frames: F.

    Returns:
        (F,) int64.

    >>> frame_characters([(2, 0.1, 0.22), (3, 0.22, 0.3)], 0.0, 0.1, 4).tolist()
    [0, 2, 3, 0]
    """
    filled = np.zeros((n_frames, N_CLASSES))
    begins = start_s + frame_s * np.arange(n_frames)
    for character, start, end in spans:
        filled[:, character] += np.clip(np.minimum(begins + frame_s, end) - np.maximum(begins, start), 0.0, None)
    filled[:, 0] += 1e-6 * frame_s  # nothing spoken at all
    return filled.argmax(axis=1)
