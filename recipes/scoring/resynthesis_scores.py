"""How close what ``slm resynthesize`` made is to the recording: measured, and by the ear of a judge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from eval.judges.judge import Judge
from eval.speech.quality import compare_audio, summarise_quality
from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs

PIECE_S, MOST_PIECES = 30.0, 20  # a long recording is scored in such pieces, spread over it


def pieces(duration_s: float) -> list[tuple[float, float]]:
    """(start, length) in seconds of the equal pieces that are scored, spread evenly where there are too many."""
    n = max(1, math.ceil(duration_s / PIECE_S))
    chosen = dict.fromkeys(np.linspace(0, n - 1, min(n, MOST_PIECES)).round().astype(int).tolist())
    return [(index * duration_s / n, duration_s / n) for index in chosen]


def scores(reference: Path, audio: Path, label: str) -> dict[str, Any]:
    """How close a clip is to the recording, as fields of a row."""
    compared, scored_s = [], 0.0
    with soundfile.SoundFile(reference) as one, soundfile.SoundFile(audio) as other:
        rates = one.samplerate, other.samplerate
        for start_s, length_s in pieces(one.frames / one.samplerate):
            pair = []
            for file in (one, other):
                file.seek(min(round(start_s * file.samplerate), file.frames))
                pair.append(file.read(max(1, round(length_s * file.samplerate)), dtype="float32"))
            if all(len(part) for part in pair):  # published lengths may fall a few samples short
                compared.append(compare_audio(*pair, *rates))
                scored_s += length_s
    found = summarise_quality(audio.name, label, compared)
    measures = ("mel_distance_db", "stoi", "pesq", "level_difference_db", "n_measured")
    notes = list(dict.fromkeys(note for piece in compared for note in piece.notes))
    return {key: getattr(found, key) for key in measures} | {"scored_s": scored_s, "notes": notes}


def hear(judge: Judge | None, path: Path, excerpt_s: float) -> str | None:
    """What the judge hears in the excerpt; None where there is no judge."""
    if judge is None:
        return None
    with soundfile.SoundFile(path) as file:
        return judge.transcribe([file.read(round(excerpt_s * file.samplerate), dtype="float32")], file.samplerate)[0]


def heard_otherwise(in_recording: str | None, heard: str | None) -> float | None:
    """CER of what the judge hears against what it hears in the recording; None where it hears no word there."""
    if not in_recording or heard is None:
        return None
    return score_pairs([in_recording], [heard], get_normaliser("basic")).cer
