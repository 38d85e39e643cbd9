"""Speech that is drawn word by word: each is given in its turn, and the model says it until it closes its speech.

A word that the model does not end is cut where its limit or a loop ends it, and the next is given; the answer's reason
says so. The first word stands in the prompt, with the mark that opens its speech. What came before is read anew with
each word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from slm.decoding.decode import decode_stream
from slm.decoding.row_rules import Answer, FinishReason
from slm.generation.asking import sampling_of_one, speech_grammar
from slm.generation.drawing import draw_codes
from slm.generation.speech_lm import SpeechLM
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings
from slm.vocabulary import SpeechVocabulary

# Why an answer of several stretches counts as ended: the worst of their reasons, which stand here from the best.
_WORST: tuple[FinishReason, ...] = ("stop", "length", "loop", "non_finite")


def draw_words(
    speech_lm: SpeechLM,
    prompts: Sequence[np.ndarray],
    words: Sequence[Sequence[np.ndarray]],
    limits: Sequence[SpeechLimits],
    settings: SynthesizeSettings,
    seed: int,
    keys: Sequence[str],
) -> list[Answer]:
    """Draws the words of several answers, of each answer one after the other.

    Args:
        speech_lm: The model.
        prompts: (P,) ids each.
        words: The ids (T,) of each word, one or more, of each answer.
        limits: One per prompt, for each of its words.
        settings: Decoding.
        seed: That of this attempt.
        keys: One per prompt, for its random streams.

    Raises:
        GenerationError: The model's pattern has books of other frames in a frame.
    """
    vocabulary, prompts = speech_lm.vocabulary, list(prompts)
    _check_pattern(vocabulary)
    ids: list[list[int]] = [[] for _ in prompts]
    n_passes = [0] * len(prompts)
    reasons: list[FinishReason] = ["stop"] * len(prompts)
    for number in range(max(map(len, words))):
        going = [i for i, own in enumerate(words) if number < len(own) and reasons[i] != "non_finite"]
        if not going:
            break
        batch = ([prompts[i] for i in going], None, [limits[i] for i in going])
        said = draw_codes(speech_lm, *batch, settings, seed, [_key(keys[i], number) for i in going])
        for i, one in zip(going, said, strict=True):
            drawn = _whole_frames(vocabulary, one)
            ids[i] += drawn
            n_passes[i] += one.n_passes
            reasons[i] = max(reasons[i], one.finish_reason, key=_WORST.index)
            prompts[i] = _go_on(vocabulary, prompts[i], drawn, words[i][number + 1 : number + 2])
    parts = zip(ids, reasons, n_passes, strict=True)
    return [Answer(own, reason, n_passes=passes) for own, reason, passes in parts]


def stream_words(
    speech_lm: SpeechLM,
    prompt: np.ndarray,
    words: Sequence[np.ndarray],
    limits: SpeechLimits,
    settings: SynthesizeSettings,
    key: str,
    every: int,
) -> Iterator[Answer]:
    """Draws the words of one answer and gives its ids while it does; arguments as in :func:`draw_words`.

    Yields:
        The answer so far after each word, and every so many ids of a long one; at last the whole.

    Raises:
        GenerationError: As in :func:`draw_words`.
    """
    vocabulary = speech_lm.vocabulary
    _check_pattern(vocabulary)
    grammar, rows = speech_grammar(speech_lm, settings), limits.rows(vocabulary)
    said: list[int] = []
    reason: FinishReason = "stop"
    for number in range(len(words)):
        drawn = sampling_of_one(settings, settings.seed, _key(key, number))
        for answer in decode_stream(speech_lm.model, prompt, grammar, rows, every, **drawn):
            if answer.finish_reason == "going":
                yield Answer(said + answer.ids, "going")
        word = _whole_frames(vocabulary, answer)
        said = said + word
        reason = max(reason, answer.finish_reason, key=_WORST.index)
        if reason == "non_finite" or number + 1 == len(words):
            yield Answer(said, reason)
            return
        yield Answer(said, "going")
        prompt = _go_on(vocabulary, prompt, word, words[number + 1 : number + 2])


def _check_pattern(vocabulary: SpeechVocabulary) -> None:
    if vocabulary.further_sizes:
        raise GenerationError(
            f"synthesising: word by word there is no pattern={vocabulary.pattern.name}; train with semantic or flatten"
        )


def _key(key: str, number: int) -> str:
    """What decides the random stream of a word."""
    return f"{key} word {number}"


def _whole_frames(vocabulary: SpeechVocabulary, answer: Answer) -> list[int]:
    """The ids of a word that was perhaps cut within a frame; the next word begins one."""
    return answer.ids[: len(answer.ids) // vocabulary.ids_per_frame * vocabulary.ids_per_frame]


def _go_on(
    vocabulary: SpeechVocabulary, prompt: np.ndarray, drawn: Sequence[int], following: Sequence[np.ndarray]
) -> np.ndarray:
    """The prompt of the next word: what was said of this one, closed, and the next one's ids with its opening mark."""
    opening = [vocabulary.speech_end_id, *(k for word in following for k in word), vocabulary.speech_id]
    return np.concatenate([prompt, drawn, opening]).astype(np.int64)
