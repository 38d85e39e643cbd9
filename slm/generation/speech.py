"""Answers in codes: what a text sounds like, how speech goes on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slm.generation.drawing import draw_codes
from slm.generation.outputs import SaidWord, SynthesizeOutput
from slm.generation.prosody import speech_prompts
from slm.generation.shared import check_speech, default_keys
from slm.generation.speech_lm import SpeechLM
from slm.generation.words import draw_words, joined, said_words
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings, speech_limits
from slm.tasks import Task, get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import make_prompt
from slm.tasks.styles import trained_wording


def synthesize_codes(
    speech_lm: SpeechLM,
    texts: Sequence[str],
    settings: SynthesizeSettings | None = None,
    keys: Sequence[str] | None = None,
) -> list[SynthesizeOutput]:
    """Draws the speech tokens of each text: the task `tts`, asked in its first wording, if it was trained with some.

    Args:
        speech_lm: The model.
        texts: What to say.
        settings: Decoding.
        keys: What, beside the seed, decides each text's random stream: utterance ids; the texts themselves by default.

    Returns:
        One output per text, in order.

    Raises:
        GenerationError: A text is empty.
    """
    settings = settings or SynthesizeSettings()
    vocabulary = speech_lm.vocabulary
    for i, text in enumerate(texts):
        if not text.strip():
            raise GenerationError(f"text {i + 1} of {len(texts)} is empty: there is nothing to say")
    task, text_tokenizer = get_task("tts"), speech_lm.text_tokenizer
    wording = trained_wording(vocabulary, text_tokenizer, task)
    utterances = [UtteranceTokens(text=vocabulary.encode_text(text_tokenizer, text), wording=wording) for text in texts]
    limits = [speech_limits(vocabulary, text, settings) for text in texts]
    return generate_speech(speech_lm, task, utterances, limits, settings, texts if keys is None else keys)


def generate_speech(
    speech_lm: SpeechLM,
    task: Task,
    utterances: Sequence[UtteranceTokens],
    limits: Sequence[SpeechLimits],
    settings: SynthesizeSettings | None = None,
    keys: Sequence[str] | None = None,
) -> list[SynthesizeOutput]:
    """Draws the answers of a task that answers in speech.

    Args:
        speech_lm: The model.
        task: Whose prompts.
        utterances: What the prompts are made of. Of a task with prosody that which an utterance has is taken; where it
            has none, it is drawn (:func:`slm.generation.draw_prosody`).
        limits: How long each answer may be and must be; of a task by word each of its words.
        settings: Decoding. With `retries` an answer that the model did not end is drawn again with the next seed, and
            the last attempt counts.
        keys: What, beside the seed, decides each answer's random stream; their numbers by default.

    Returns:
        One output per utterance, in order.

    Raises:
        GenerationError: The task answers in text, or is by word or with prosody and guidance is set.
        TaskError: An utterance lacks a part of the prompt.
    """
    settings = settings or SynthesizeSettings()
    check_speech(task, settings)
    vocabulary, keys = speech_lm.vocabulary, default_keys(utterances) if keys is None else keys
    prompts = speech_prompts(speech_lm, task, utterances, settings, keys)
    guided = settings.guidance > 1
    bare = [make_prompt(vocabulary, task, item, bare=True) for item in utterances] if guided else []
    unsaid = SynthesizeOutput(np.zeros((vocabulary.n_codebooks, 0), dtype=np.int64), "non_finite")
    outputs = [unsaid if prompt is None else None for prompt in prompts]
    todo = [i for i, prompt in enumerate(prompts) if prompt is not None]
    for attempt in range(1 + settings.retries):
        asked, seed = [prompts[i] for i in todo], settings.seed + attempt
        drawing = ([limits[i] for i in todo], settings, seed, [keys[i] for i in todo])
        words: list[tuple[SaidWord, ...]] = [()] * len(todo)
        if task.by_word:
            said = draw_words(speech_lm, asked, [utterances[i].words for i in todo], *drawing)
            answers, words = [joined(own) for own in said], [said_words(vocabulary, own) for own in said]
        else:
            answers = draw_codes(speech_lm, asked, [bare[i] for i in todo] if guided else None, *drawing)
        for i, answer, own in zip(todo, answers, words, strict=True):
            codes = vocabulary.codes_from_ids(answer.ids, answer.further)
            outputs[i] = SynthesizeOutput(codes, answer.finish_reason, attempt + 1, answer.n_passes, own)
        todo = [i for i in todo if outputs[i].truncated]
    return outputs
