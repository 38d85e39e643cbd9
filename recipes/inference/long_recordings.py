"""Recordings longer than an SLM has learnt to hear, cut at quiet places into pieces that it can.

A recording is read from its file block by block, and of what was read only the codes stay: hours take no more memory
than a minute but for them.

Shapes: S samples, s samples of a piece, K books, F code frames; waveforms (S,), codes (K, F).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.speech.audio import cut_blocks
from recipes.encoding.encoder import encode_batch
from slm.decoding.row_rules import FinishReason
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.audio import SILENCE_PEAK, load_audio
from tokenizer.data.utterances import Utterance
from tokenizer.long_form.long_audio import LongAudio

UNKNOWN_LONGEST_S = 10.0  # of a piece, where a model does not tell how long its training's utterances were
ENCODED_S = 60.0  # of recordings encoded together, padding included
SHORTEST_PIECE_S = 0.5  # that may be asked for
# A pause between words is longer than the closure of a stop consonant inside one, which is about 0.08 s.
QUIET_S = 0.2
# A piece whose peak lies so far below the recording's holds no speech. Where a room is noisier than that, it goes
# through the model as all else does: better a word too many than a sentence lost.
SILENT_BELOW = 10 ** (-50 / 20)


@dataclass
class Piece:
    """A stretch of a recording, in seconds from its start: codes (K, F), None where it is silent, its text and why that
    ended; the likeliest texts where several were asked for.
    """

    start_s: float
    end_s: float
    codes: np.ndarray | None
    text: str = ""
    finish_reason: FinishReason = "stop"
    n_best: tuple[str, ...] = ()


def longest_piece_s(vocabulary: SpeechVocabulary, asked: float | None) -> float:
    """The most seconds of a piece: what was asked for, else as long as the utterances that the model learnt from."""
    if asked is not None:
        return asked
    return max(vocabulary.trained_on.longest_s, SHORTEST_PIECE_S) if vocabulary.trained_on else UNKNOWN_LONGEST_S


def read_short(
    utterance: Utterance, sampling_rate: int, longest_s: float, max_duration_s: float | None
) -> np.ndarray | None:
    """The samples (S,) of a recording that is one piece; None of one that is longer than `longest_s`.

    Raises:
        AudioError: the recording cannot be used, or is longer than `max_duration_s`.
    """
    if LongAudio(utterance, sampling_rate, max_duration_s).duration_s > longest_s:
        return None
    return load_audio(utterance, sampling_rate)


def encode_short(
    tokenizer: Any, waveforms: Sequence[np.ndarray], precision: str, device: str
) -> Iterator[tuple[int, Piece]]:
    """Yields the number and the one piece of each recording (S,), those of like length encoded together.

    A batch takes up to `ENCODED_S` seconds, padding included.
    """
    rate = tokenizer.config.sampling_rate
    batch: list[int] = []
    order = sorted(range(len(waveforms)), key=lambda number: len(waveforms[number]))
    for place, number in enumerate(order):
        batch.append(number)
        following = len(waveforms[order[place + 1]]) if place + 1 < len(order) else 0
        if not following or (len(batch) + 1) * following > ENCODED_S * rate:
            codes = encode_batch(tokenizer, [waveforms[one] for one in batch], precision, device)
            for one, own in zip(batch, codes, strict=True):
                yield one, Piece(0.0, len(waveforms[one]) / rate, own)
            batch = []


def encode_pieces(
    tokenizer: Any,
    utterance: Utterance,
    longest_s: float,
    max_duration_s: float | None,
    precision: str,
    device: str,
) -> Iterator[Piece]:
    """Yields the pieces of a recording in their order, encoded; a recording of at most `longest_s` is one piece.

    They touch, and together they are the whole recording. A longer one is cut between half of `longest_s` and the
    whole, in the middle of the quietest `QUIET_S` seconds there.

    Raises:
        AudioError: the recording cannot be used, or is longer than `max_duration_s`.
    """
    rate = tokenizer.config.sampling_rate
    recording = LongAudio(utterance, rate, max_duration_s)
    if recording.duration_s <= longest_s:
        waveform = load_audio(utterance, rate)
        codes = encode_batch(tokenizer, [waveform], precision, device)[0]
        yield Piece(0.0, len(waveform) / rate, codes)
        return
    silent = max(SILENCE_PEAK, recording.peak * SILENT_BELOW)
    start = 0
    for waveform in cut_blocks(recording.blocks(), rate, longest_s, share=2, quiet_s=QUIET_S):
        audible = float(np.abs(waveform).max()) >= silent
        codes = encode_batch(tokenizer, [waveform], precision, device)[0] if audible else None
        yield Piece(start / rate, (start + len(waveform)) / rate, codes)
        start += len(waveform)
