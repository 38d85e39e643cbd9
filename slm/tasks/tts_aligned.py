"""Aligned TTS: each word of the text in its turn, and behind it the codes that say it.

The text drives the answer: a word is given, the model speaks it until it closes its speech, and the next word is given.
No word can be skipped and none said for ever (:func:`slm.generation.generate_speech`); the model hears what it has said
and does not see the words to come. Words and their times come from `slm align`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from slm.tasks.registry import Mark, Part, Speech, Task, TaskError, Text, Turn, UtteranceTokens, register

SYNTHESIZE_ALIGNED = "<|synthesize-aligned|>"


def turn(utterance: UtteranceTokens) -> Turn:
    """`<|synthesize-aligned|>` -> word `<|speech|>` its codes `<|/speech|>` for each word; the words are given."""
    words = utterance.words or (None,)
    stretches: Sequence[np.ndarray | None] = [None] * len(words)
    if utterance.codes is not None and utterance.words:
        stretches = split_words(utterance.codes, utterance.word_frames, len(words))
    answer: list[Part] = []
    for ids, codes in zip(words, stretches, strict=True):
        answer += [Text(ids, given=True), Speech(codes)]
    return Turn(prompt=[Mark(SYNTHESIZE_ALIGNED)], answer=answer)


def split_words(codes: np.ndarray, word_frames: Sequence[int] | None, n_words: int) -> list[np.ndarray]:
    """(K, F) codes -> those of each word.

    Args:
        codes: Of the utterance.
        word_frames: Frames of each word; all together F.
        n_words: Words of the text.

    Raises:
        TaskError: The frames are not the words' or the codes'.

    >>> [part.shape[1] for part in split_words(np.zeros((1, 10)), [3, 5, 2], 3)]
    [3, 5, 2]
    """
    if word_frames is None or len(word_frames) != n_words or min(word_frames) < 1:
        raise TaskError(f"task tts-aligned: {n_words} words need a number of frames each, 1 or more; got {word_frames}")
    if sum(word_frames) != codes.shape[1]:
        raise TaskError(f"task tts-aligned: the words have {sum(word_frames)} frames, the codes {codes.shape[1]}")
    return np.split(codes, np.cumsum(word_frames)[:-1], axis=1)


def word_ids(encode: Callable[[str], np.ndarray], text: str) -> tuple[np.ndarray, ...]:
    """A normalised text -> the ids (T,) of each word, the space in front of it being the word's.

    Args:
        encode: From a text to its ids.
        text: Words between spaces.
    """
    return tuple(encode(word if number == 0 else f" {word}") for number, word in enumerate(text.split()))


TTS_ALIGNED = register(Task("tts-aligned", "speech", turn, marks=(SYNTHESIZE_ALIGNED,), by_word=True))
