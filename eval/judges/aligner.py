"""A recogniser's CTC output as an aligner: audio and its text -> words and characters with their times.

Shapes: S samples, T frames of the recogniser, V its vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.judges.config import JudgeConfig, JudgeError
from eval.judges.judge import check_judge
from eval.judges.readers import CTC_HEAD_FILE, OPEN_WINDOW_S, CTCHead
from eval.judges.whisper_aligner import WhisperAligner, is_whisper
from eval.speech.alignment import Alignment, AlignmentError, ctc_align
from eval.speech.audio import split_at_quiet
from eval.text.normalisers import normalise_basic

_FRAME_S = 0.02  # of a Whisper encoder


@dataclass
class Aligner:
    """A loaded recogniser.

    Args:
        identity: what :func:`eval.judges.judge.check_judge` says of it.
        sampling_rate: of the audio that it takes, Hz.
        window_s: longer audio is cut at quiet places.
        vocabulary: ids of characters; `separator` stands between words, None where the recogniser has none.
        blank: the CTC blank's id.
        scores: from a waveform (S,) to log probabilities (T, V).
    """

    identity: dict[str, Any]
    sampling_rate: int
    window_s: float
    vocabulary: dict[str, int]
    separator: int | None
    blank: int
    scores: Callable[[np.ndarray], np.ndarray]

    def align(self, audio: np.ndarray, text: str) -> Alignment:
        """Finds each word of a text in its audio (S,) at `sampling_rate`.

        Words are as the text writes them between spaces; characters are those that the recogniser reads, so that "371"
        is one word of the characters of "three hundred seventy one". What is punctuation alone is no word.

        Raises:
            AlignmentError: the text is empty or too long for the audio, or a word has no character that the recogniser
                knows.
        """
        words, tokens, owners, letters = [], [], [], []
        for word in text.split():
            read = normalise_basic(word)
            if not read:
                continue
            known = [(letter, self._id(letter)) for letter in read]
            known = [(letter, token) for letter, token in known if token is not None]
            if not known:
                raise AlignmentError(f"the recogniser knows no character of {word!r}")
            if words and self.separator is not None:
                tokens.append(self.separator)
                owners.append(-1)
                letters.append(" ")
            tokens += [token for _, token in known]
            letters += [letter for letter, _ in known]
            owners += [len(words)] * len(known)
            words.append(word)
        scores, times = self._frames(audio)
        spans = ctc_align(scores, tokens, self.blank)
        characters: list[dict[str, Any]] = []
        found = [{"word": word, "start": math.inf, "end": 0.0} for word in words]
        for letter, owner, (first, last) in zip(letters, owners, spans, strict=True):
            if owner < 0:
                continue
            start, end = round(float(times[first]), 4), round(float(times[last]), 4)
            characters.append({"character": letter, "start": start, "end": end})
            found[owner]["start"] = min(found[owner]["start"], start)
            found[owner]["end"] = max(found[owner]["end"], end)
        return Alignment(found, characters)

    def _id(self, letter: str) -> int | None:
        if letter == " ":  # inside a word: a numeral that is read as several
            return self.separator
        return next((self.vocabulary[form] for form in (letter, letter.upper()) if form in self.vocabulary), None)

    def _frames(self, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T, V) log probabilities of all pieces, and the T + 1 times between their frames, in seconds."""
        scores, times, begin = [], [np.zeros(1)], 0
        for piece in split_at_quiet(audio, self.sampling_rate, self.window_s):
            part = self.scores(piece)
            ends = np.arange(1, len(part) + 1) / max(1, len(part)) * len(piece)
            scores.append(part)
            times.append((begin + ends) / self.sampling_rate)
            begin += len(piece)
        return np.concatenate(scores), np.concatenate(times)


def delay_error(aligner: Any, audio: np.ndarray, text: str, delay_s: float = 0.4) -> float:
    """How far an aligner's words do not move with the audio: all should be later by the silence put in front.

    An encoder that sees the whole window may write a text correctly at places of its own choice; CTC does not
    forbid it, and such times say nothing about the audio.

    Returns:
        Median over the words of |shift - delay_s|, in seconds.

    Raises:
        AlignmentError: as `aligner.align`.
    """
    silence = np.zeros(round(delay_s * aligner.sampling_rate), dtype=np.float32)
    before = aligner.align(audio, text).words
    after = aligner.align(np.concatenate([silence, audio]), text).words
    return float(np.median([abs(b["start"] - a["start"] - delay_s) for a, b in zip(before, after, strict=True)]))


def aligner_config(name: str, label: str | None = None, revision: str | None = None) -> JudgeConfig:
    """A recogniser as a judge that aligns: by CTC where it has a head for that, else by what it was made for."""
    by_head = (Path(name) / CTC_HEAD_FILE).is_file()
    return JudgeConfig(name=name, label=label, decoding="ctc" if by_head else "auto", revision=revision)


def load_aligner(config: JudgeConfig, device: str = "cpu") -> Aligner | WhisperAligner:
    """Load a recogniser of `aligner_config`: our recogniser's folder, a Whisper, any `AutoModelForCTC` of characters.

    Raises:
        JudgeError: there is none of that name, or it has neither CTC scores nor attention that is known to align.
    """
    identity = check_judge(config)
    from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": config.name, "revision": config.revision}
    if identity["kind"] not in ("ctc", "ctc-head"):
        if identity["kind"] == "seq2seq" and is_whisper(config):
            return WhisperAligner(config, identity, device)
        raise JudgeError(
            f"aligner {config.name!r} has no CTC scores: name a CTC model, a recogniser with a CTC head, or a Whisper"
        )
    by_head = identity["kind"] == "ctc-head"
    auto = AutoModelForSpeechSeq2Seq if by_head else AutoModelForCTC
    try:
        model = auto.from_pretrained(**source, dtype=torch.float32).eval().to(device)
        extractor = AutoFeatureExtractor.from_pretrained(**source)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # each library has errors of its own for a torn file
        raise JudgeError(f"aligner {config.name!r} cannot be loaded ({error}): copy or download it anew") from error
    rate = extractor.sampling_rate
    vocabulary = tokenizer.get_vocab()
    space = getattr(tokenizer, "word_delimiter_token", None) or " "
    if by_head:
        head = CTCHead(model, Path(config.name), tokenizer.pad_token_id)
        window_s, blank = model.config.max_source_positions * _FRAME_S, head.blank

        def scores(piece: np.ndarray) -> np.ndarray:
            length = {"padding": "max_length", "max_length": round(window_s * rate)}
            inputs = extractor([piece], sampling_rate=rate, return_tensors="pt", **length)
            with torch.inference_mode():
                logits = head(inputs["input_features"].to(device))[0]
            valid = max(1, round(len(piece) / rate / _FRAME_S))
            return logits[:valid].log_softmax(-1).cpu().numpy()
    else:
        window_s = OPEN_WINDOW_S
        blank = model.config.pad_token_id if model.config.pad_token_id is not None else tokenizer.pad_token_id

        def scores(piece: np.ndarray) -> np.ndarray:
            inputs = extractor([piece], sampling_rate=rate, return_tensors="pt", padding=True).to(device)
            with torch.inference_mode():
                return model(**inputs).logits[0].log_softmax(-1).cpu().numpy()

    return Aligner(identity, rate, window_s, vocabulary, vocabulary.get(space), blank, scores)
