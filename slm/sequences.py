"""ASR and TTS as token sequences: pure functions from codes and text ids to `input_ids` and `labels`.

Shapes: codes (K, F); text ids (T,); `input_ids` and `labels` (L,) int64, labels -100 wherever no loss is taken.

    ASR   before <|speech|> codes <|/speech|> <|transcribe|> between | text end
    TTS   before text <|synthesize|> between <|speech|> | codes <|/speech|> end

`before` and `between` are the chat template's ids (or bos, and nothing); what follows the bar is the answer, the only
part with loss. Generation uses the same prompt functions.

A vocabulary of 100 text ids (eos is 2, bos is 1) and one codebook of 8:

>>> from slm.vocabulary import SpeechVocabulary
>>> vocabulary = SpeechVocabulary(codebook_sizes=(8,), first_id=100, end_id=2, before=(1,))
>>> codes, text = np.array([[0, 7, 3]]), np.array([40, 41])
>>> asr = asr_example(vocabulary, codes, text)
>>> asr.input_ids.tolist()
[1, 100, 104, 111, 107, 101, 102, 40, 41, 2]
>>> asr.labels.tolist()
[-100, -100, -100, -100, -100, -100, -100, 40, 41, 2]
>>> tts = tts_example(vocabulary, codes, text)
>>> tts.input_ids.tolist()
[1, 40, 41, 103, 100, 104, 111, 107, 101, 2]
>>> tts.labels.tolist()
[-100, -100, -100, -100, -100, 104, 111, 107, 101, 2]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slm.vocabulary import SpeechVocabulary

IGNORE = -100
TASKS = ("asr", "tts")


@dataclass(frozen=True)
class Example:
    """One training sequence: `input_ids` (L,) and `labels` (L,), both int64."""

    input_ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


def asr_prompt(vocabulary: SpeechVocabulary, codes: np.ndarray) -> np.ndarray:
    """(K, F) codes -> (P,) ids, after which the model writes the transcript."""
    speech = [vocabulary.speech_id, *vocabulary.ids_from_codes(codes), vocabulary.speech_end_id]
    return np.array([*vocabulary.before, *speech, vocabulary.transcribe_id, *vocabulary.between], dtype=np.int64)


def tts_prompt(vocabulary: SpeechVocabulary, text_ids: np.ndarray) -> np.ndarray:
    """(T,) text ids -> (P,) ids, after which the model writes speech tokens."""
    turn = [*vocabulary.before, *text_ids, vocabulary.synthesize_id, *vocabulary.between]
    return np.array([*turn, vocabulary.speech_id], dtype=np.int64)


def asr_example(vocabulary: SpeechVocabulary, codes: np.ndarray, text_ids: np.ndarray) -> Example:
    """Speech in, text out: loss on the text and the end."""
    return answer(asr_prompt(vocabulary, codes), np.array([*text_ids, vocabulary.end_id], dtype=np.int64))


def tts_example(vocabulary: SpeechVocabulary, codes: np.ndarray, text_ids: np.ndarray) -> Example:
    """Text in, speech out: loss on the codes, the end of speech and the end."""
    target = [*vocabulary.ids_from_codes(codes), vocabulary.speech_end_id, vocabulary.end_id]
    return answer(tts_prompt(vocabulary, text_ids), np.array(target, dtype=np.int64))


def answer(prompt: np.ndarray, target: np.ndarray) -> Example:
    """(P,) prompt and (A,) answer -> a sequence of P + A with loss on the answer."""
    return Example(
        np.concatenate([prompt, target]), np.concatenate([np.full(len(prompt), IGNORE, dtype=np.int64), target])
    )


def example_length(vocabulary: SpeechVocabulary, n_frames: int, n_text: int) -> int:
    """Length L of an example of either task (both take three marks and the end), without building it."""
    around = len(vocabulary.before) + len(vocabulary.between)
    return around + n_frames * vocabulary.n_codebooks + n_text + 4
