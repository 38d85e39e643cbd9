"""pocketsphinx as an aligner: its hidden Markov models of phones, on frames of 10 ms.

It knows the words of its dictionary (CMUdict, American English), needs no download, and gives phones too. Unlike a CTC
model with a view of the whole recording it cannot say a word where it is not.

Shapes: S samples.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

import numpy as np

from eval.judges.config import JudgeError
from eval.speech.alignment import Alignment, AlignmentError, even_characters
from eval.text.normalisers import normalise_basic

__all__ = ["SphinxAligner"]

_HZ, _FRAME_S = 16_000, 0.01
_FILLER = re.compile(r"^[<\[+]")  # silence and noises
_VARIANT = re.compile(r"\(\d+\)$")  # the second pronunciation of a word is a(2)


class SphinxAligner:
    """Aligns as `eval.judges.aligner.Aligner` does; characters share a word's time evenly.

    Attributes:
        sampling_rate: of the audio that it takes, Hz.

    Raises:
        JudgeError: pocketsphinx is not installed.
    """

    sampling_rate = _HZ

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder

            self.identity = {"name": "pocketsphinx", "revision": f"pocketsphinx {metadata.version('pocketsphinx')}"}
        except ImportError as error:
            raise JudgeError("aligner 'pocketsphinx' is not installed: pip install 'lmspt-slm[eval]'") from error
        self._decoder: Any = Decoder(samprate=_HZ, loglevel="FATAL", bestpath=False)

    def align(self, audio: np.ndarray, text: str) -> Alignment:
        """Finds each word of a text in its audio (S,) at 16 kHz.

        Words are as the text writes them between spaces; "371" is one word of four of the dictionary's.

        Raises:
            AlignmentError: the text is empty, a word is not in the dictionary, or the audio cannot say it.
        """
        words = [word for word in text.split() if normalise_basic(word)]
        read = [normalise_basic(word).split() for word in words]
        if not words:
            raise AlignmentError("nothing to align: the text has no words")
        if unknown := [one for parts in read for one in parts if self._decoder.lookup_word(one) is None]:
            raise AlignmentError(f"pocketsphinx's dictionary does not know {', '.join(map(repr, unknown))}")
        found = self._spoken(audio, [one for parts in read for one in parts])
        if len(found) != sum(map(len, read)):
            raise AlignmentError("pocketsphinx cannot find the text in the audio")
        alignment, at = Alignment([], []), 0
        for word, parts in zip(words, read, strict=True):
            own, at = found[at : at + len(parts)], at + len(parts)
            start, end = own[0][1], own[-1][2]
            alignment.words.append({"word": word, "start": start, "end": end})
            alignment.phones.extend(phone for _, _, _, phones in own for phone in phones)
            alignment.characters.extend(even_characters("".join(parts), start, end))
        return alignment

    def _spoken(self, audio: np.ndarray, words: list[str]) -> list[tuple[str, float, float, list[dict[str, Any]]]]:
        """(word, start, end, phones) of each word that is found, in order; nothing where the text does not fit."""
        peak = float(np.abs(audio).max(initial=0.0))
        if not peak:
            raise AlignmentError("the audio is silent")
        # It was trained on speech at full level and takes 16-bit samples: a quiet recording is brought up.
        samples = (audio * (0.9 * 32767 / peak)).astype(np.int16).tobytes()
        decoder = self._decoder
        decoder.set_align_text(" ".join(words))
        self._decode(samples)
        if decoder.hyp() is None:
            return []
        decoder.set_alignment()  # from the words that were found to their phones
        self._decode(samples)
        found = []
        for word in decoder.get_alignment():
            if not _FILLER.match(word.name):
                phones = [{"phone": phone.name} | _times(phone) for phone in word]
                times = _times(word)
                found.append((_VARIANT.sub("", word.name), times["start"], times["end"], phones))
        return found

    def _decode(self, samples: bytes) -> None:
        self._decoder.reinit_feat()  # its front end carries state on from what it heard before
        self._decoder.start_utt()
        try:
            self._decoder.process_raw(samples, full_utt=True)
        finally:
            self._decoder.end_utt()


def _times(entry: Any) -> dict[str, float]:
    return {"start": round(entry.start * _FRAME_S, 2), "end": round((entry.start + entry.duration) * _FRAME_S, 2)}
