"""The column `words` of a coded corpus -> each word and how many frames say it, for tasks that go word by word.

`slm align` writes the column, in seconds, and `slm encode data.0.columns=[words]` carries it into a corpus of any rate.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from eval.speech.alignment import AlignmentError, word_frames
from recipes.config import ConfigError

WORDS = "words"


def words_of(
    column: str, text: str, n_frames: int, frame_rate: float, read: Callable[[str], str], place: str
) -> list[int] | None:
    """Frames of each word of an utterance.

    All of its frames are some word's: a pause is the word's before it, and what lies before the first word is the
    first's.

    Args:
        column: `[{word, start, end}]` as JSON, in seconds; empty where the utterance is not aligned.
        text: Its transcript, normalised; words between spaces.
        n_frames: F of its codes.
        frame_rate: Of the codes, Hz.
        read: The normaliser. A word that it writes as several shares its time among them by their characters; one that
            it leaves out leaves its time to the one before.
        place: What a message calls the utterance.

    Returns:
        One number of frames, 1 or more, per word of `text`, all together F; None where the aligned words are not the
        text's, or there are more of them than frames.

    Raises:
        ConfigError: The column holds something else.

    >>> words_of('[{"word": "Bin", "start": 0.2, "end": 0.4}, {"word": "it.", "start": 0.5, "end": 0.9}]', "bin it",
    ...     10, 10.0, lambda word: word.strip(".").lower(), "u0")
    [5, 5]
    """
    if not column or not text:
        return None
    said, spans = [], []
    try:
        for one in json.loads(column):
            start, end = float(one["start"]), float(one["end"])
            parts = read(str(one["word"])).split()
            each = (end - start) / max(1, sum(map(len, parts)))
            for part in parts:
                said.append(part)
                spans.append((start, start + each * len(part)))
                start = spans[-1][1]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{place}: its column {WORDS} is no list of words with start and end in seconds ({error}); `slm align` "
            f"writes one, and `slm encode data.0.columns=[{WORDS}]` takes it from that manifest"
        ) from error
    if said != text.split():
        return None
    try:
        firsts = [first for first, _ in word_frames(spans, frame_rate, n_frames)]
    except AlignmentError:
        return None
    borders = [0, *firsts[1:], n_frames]
    return [after - before for before, after in zip(borders, borders[1:], strict=False)]
