"""An answer's codes while they come."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from slm.decoding.decode import decode_stream
from slm.decoding.row_rules import Answer
from slm.generation.outputs import SynthesizeOutput
from slm.generation.prosody import speech_prompts
from slm.generation.shared import check_speech, sampling_of_one, speech_grammar
from slm.generation.speech_lm import SpeechLM
from slm.generation.words import stream_words
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings
from slm.tasks import Task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import make_prompt


def stream_speech(
    speech_lm: SpeechLM,
    task: Task,
    utterance: UtteranceTokens,
    limits: SpeechLimits,
    settings: SynthesizeSettings | None = None,
    key: str = "0",
    chunk_s: float = 0.5,
) -> Iterator[SynthesizeOutput]:
    """Draws one answer and gives its codes while it does; without retries those of `slm.generation.generate_speech`.

    Args:
        speech_lm: The model.
        task: Whose prompt.
        utterance: What the prompt is made of.
        limits: How long the answer may be and must be; of a task by word each of its words.
        settings: Decoding.
        key: What, beside the seed, decides the random stream.
        chunk_s: Seconds of speech that are waited for.

    Yields:
        The codes that are new, (n, f), f >= 0; `finish_reason` is `going` but for the last.

    Raises:
        GenerationError: The task answers in text, or not with these settings; `multi_token` or `retries` are set: what
            was given cannot be taken back.
        TaskError: The utterance lacks a part of the prompt.
    """
    settings, vocabulary = settings or SynthesizeSettings(), speech_lm.vocabulary
    check_speech(task, settings)
    if settings.multi_token > 1:
        raise GenerationError("synthesising: multi_token: a stream gives a token a pass so far; set it to 1")
    if settings.retries:
        raise GenerationError("synthesising: retries: what a stream has given cannot be taken back; set it to 0")
    (prompt,) = speech_prompts(speech_lm, task, [utterance], settings, [key])
    if prompt is None:
        yield SynthesizeOutput(np.zeros((vocabulary.n_codebooks, 0), dtype=np.int64), "non_finite")
        return
    every = max(1, round(chunk_s * vocabulary.frame_rate)) * vocabulary.ids_per_frame
    if task.by_word:
        answers = stream_words(speech_lm, prompt, utterance.words, limits, settings, key, every)
    else:
        answers = _stream_codes(speech_lm, task, utterance, prompt, limits, settings, key, every)
    n_given = 0
    for answer in answers:
        codes = vocabulary.codes_from_ids(answer.ids, answer.further)
        yield SynthesizeOutput(codes[:, n_given:], answer.finish_reason)
        n_given = codes.shape[1]


def _stream_codes(
    speech_lm: SpeechLM,
    task: Task,
    utterance: UtteranceTokens,
    prompt: np.ndarray,
    limits: SpeechLimits,
    settings: SynthesizeSettings,
    key: str,
    every: int,
) -> Iterator[Answer]:
    vocabulary = speech_lm.vocabulary
    drawn = sampling_of_one(settings, settings.seed, key)
    if settings.guidance > 1:
        bare = make_prompt(vocabulary, task, utterance, bare=True)
        drawn |= {"bare_prompt": bare, "guidance": settings.guidance}
    grammar, rows = speech_grammar(speech_lm, settings), limits.rows(vocabulary)
    return decode_stream(speech_lm.model, prompt, grammar, rows, every, **drawn)
