"""Speech that is drawn word by word: each is given in its turn, and the model says it until it closes its speech.

A word that the model does not end is drawn again, `word_retries` times at most. One that never ends is cut where its
limit or a loop ends it, and the next is given; the answer's reason says so. The first word stands in the prompt, with
the mark that opens its speech. What came before is read anew with each word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from slm.decoding.decode import decode_stream
from slm.decoding.row_rules import Answer, FinishReason
from slm.generation.drawing import draw_codes
from slm.generation.outputs import SaidWord
from slm.generation.shared import sampling_of_one, speech_grammar
from slm.generation.speech_lm import SpeechLM
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings
from slm.vocabulary import SpeechVocabulary

# Why an answer of several stretches counts as ended: the worst of their reasons, which stand here from the best.
_WORST: tuple[FinishReason, ...] = ("going", "stop", "length", "loop", "non_finite")
_UNENDED: tuple[FinishReason, ...] = ("length", "loop")  # another draw may end


def draw_words(
    speech_lm: SpeechLM,
    prompts: Sequence[np.ndarray],
    words: Sequence[Sequence[np.ndarray]],
    limits: Sequence[SpeechLimits],
    settings: SynthesizeSettings,
    seed: int,
    keys: Sequence[str],
) -> list[list[Answer]]:
    """Draws the words of several answers, of each answer one after the other.

    Args:
        speech_lm: The model.
        prompts: (P,) ids each.
        words: The ids (T,) of each word, one or more, of each answer.
        limits: One per prompt, for each of its words.
        settings: Decoding.
        seed: That of this attempt.
        keys: One per prompt, for its random streams.

    Returns:
        What was drawn of each word, in whole frames; none behind a word whose scores were not finite.

    Raises:
        GenerationError: The model's pattern has books of other frames in a frame.
    """
    vocabulary, prompts = speech_lm.vocabulary, list(prompts)
    _check_pattern(vocabulary)
    said: list[list[Answer]] = [[] for _ in prompts]
    for number in range(max(map(len, words))):
        broken = {i for i, own in enumerate(said) if own and own[-1].finish_reason == "non_finite"}
        going = [i for i, own in enumerate(words) if number < len(own) and i not in broken]
        if not going:
            break
        drawn, todo = {}, going
        for draws in range(1, 2 + _retries(settings)):
            batch = ([prompts[i] for i in todo], None, [limits[i] for i in todo])
            again = draw_codes(speech_lm, *batch, settings, seed, [_key(keys[i], number, draws) for i in todo])
            drawn |= {i: _after(drawn.get(i), word) for i, word in zip(todo, again, strict=True)}
            todo = [i for i in todo if drawn[i].finish_reason in _UNENDED]
            if not todo:
                break
        for i, word in drawn.items():
            said[i].append(_whole_frames(vocabulary, word))
            prompts[i] = _go_on(vocabulary, prompts[i], said[i][-1].ids, words[i][number + 1 : number + 2])
    return said


def joined(said: Sequence[Answer]) -> Answer:
    """The words of an answer as one; its reason is the worst of theirs."""
    ids = [k for word in said for k in word.ids]
    reason = max((word.finish_reason for word in said), key=_WORST.index)
    return Answer(ids, reason, n_passes=sum(word.n_passes for word in said))


def said_words(vocabulary: SpeechVocabulary, said: Sequence[Answer]) -> tuple[SaidWord, ...]:
    """The frames of each word, and why it ended."""
    return tuple(SaidWord(len(word.ids) // vocabulary.ids_per_frame, word.finish_reason, word.draws) for word in said)


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
        The answer so far after each word, and every so many ids of a long one that is not drawn again if it does not
        end: what was given cannot be taken back. At last the whole.

    Raises:
        GenerationError: As in :func:`draw_words`.
    """
    vocabulary = speech_lm.vocabulary
    _check_pattern(vocabulary)
    grammar, rows = speech_grammar(speech_lm, settings), limits.rows(vocabulary)
    said: list[Answer] = []
    retries = _retries(settings)
    for number in range(len(words)):
        answer = None
        for draws in range(1, 2 + retries):
            earlier, drawn = answer, sampling_of_one(settings, settings.seed, _key(key, number, draws))
            for answer in decode_stream(speech_lm.model, prompt, grammar, rows, every, **drawn):
                if answer.finish_reason == "going" and draws > retries:
                    yield replace(joined([*said, answer]), finish_reason="going")
            answer = _after(earlier, answer)
            if answer.finish_reason not in _UNENDED:
                break
        said.append(_whole_frames(vocabulary, answer))
        if answer.finish_reason == "non_finite":
            break
        if number + 1 < len(words):
            yield replace(joined(said), finish_reason="going")
            prompt = _go_on(vocabulary, prompt, said[-1].ids, words[number + 1 : number + 2])
    yield joined(said)


def _check_pattern(vocabulary: SpeechVocabulary) -> None:
    if vocabulary.further_sizes:
        raise GenerationError(
            f"synthesising: word by word there is no pattern={vocabulary.pattern.name}; train with semantic or flatten"
        )


def _retries(settings: SynthesizeSettings) -> int:
    """How often a word is drawn again; a greedy one is always the same."""
    return settings.word_retries if settings.temperature else 0


def _after(earlier: Answer | None, word: Answer) -> Answer:
    """A word with what was spent on drawing it before."""
    if earlier is None:
        return word
    return replace(word, draws=earlier.draws + 1, n_passes=earlier.n_passes + word.n_passes)


def _key(key: str, number: int, draws: int) -> str:
    """What decides the random stream of a word."""
    return f"{key} word {number}" + (f" again {draws - 1}" if draws > 1 else "")


def _whole_frames(vocabulary: SpeechVocabulary, answer: Answer) -> Answer:
    """A word that was perhaps cut within a frame, without that frame; the next word begins one."""
    whole = len(answer.ids) // vocabulary.ids_per_frame * vocabulary.ids_per_frame
    return replace(answer, ids=answer.ids[:whole])


def _go_on(
    vocabulary: SpeechVocabulary, prompt: np.ndarray, drawn: Sequence[int], following: Sequence[np.ndarray]
) -> np.ndarray:
    """The prompt of the next word: what was said of this one, closed, and the next one's ids with its opening mark."""
    opening = [vocabulary.speech_end_id, *(k for word in following for k in word), vocabulary.speech_id]
    return np.concatenate([prompt, drawn, opening]).astype(np.int64)
