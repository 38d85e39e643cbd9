"""Answers in text: transcripts, translations, what was asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slm.decoding.batching import buckets
from slm.decoding.decode import decode, decode_beams
from slm.decoding.row_rules import Answer, Grammar, RowLimits
from slm.generation.outputs import TranscribeOutput
from slm.generation.shared import check_modality, default_keys, legal_mask, sampling
from slm.generation.speech_lm import SpeechLM
from slm.settings import TranscribeSettings, text_loop_limit, tokens_allowed
from slm.tasks import Task, get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import make_prompt
from slm.tasks.styles import trained_wording


def transcribe_codes(
    speech_lm: SpeechLM, codes: Sequence[np.ndarray], settings: TranscribeSettings | None = None
) -> list[TranscribeOutput]:
    """Writes the text of each utterance: the task `asr`, asked in its first wording, if it was trained with some.

    Args:
        speech_lm: The model.
        codes: One (K, F) array per utterance, without padding, K at least the codebooks the model uses.
        settings: Decoding.

    Returns:
        One output per utterance, in order.
    """
    task = get_task("asr")
    wording = trained_wording(speech_lm.vocabulary, speech_lm.text_tokenizer, task)
    return generate_text(speech_lm, task, [UtteranceTokens(codes=item, wording=wording) for item in codes], settings)


def generate_text(
    speech_lm: SpeechLM,
    task: Task,
    utterances: Sequence[UtteranceTokens],
    settings: TranscribeSettings | None = None,
    keys: Sequence[str] | None = None,
) -> list[TranscribeOutput]:
    """Writes the answers of a task that answers in text.

    Args:
        speech_lm: The model.
        task: Whose prompts.
        utterances: What the prompts are made of. An answer's budget of tokens follows from the speech and text that
            its prompt holds.
        settings: Decoding.
        keys: What, beside the seed, decides each answer's random stream; their numbers by default.

    Returns:
        One output per utterance, in order.

    Raises:
        GenerationError: The task answers in speech.
        TaskError: An utterance lacks a part of the prompt.
    """
    check_modality(task, "text")
    settings = settings or TranscribeSettings()
    vocabulary, model, text_tokenizer = speech_lm.vocabulary, speech_lm.model, speech_lm.text_tokenizer
    keys = default_keys(utterances) if keys is None else keys
    prompts = [make_prompt(vocabulary, task, item) for item in utterances]
    limits = [RowLimits(tokens_allowed(vocabulary, task, item, settings)) for item in utterances]
    legal = [legal_mask(model, vocabulary.text_ids(text_tokenizer))]
    grammar = Grammar(legal, vocabulary.end_id, loop_limit=text_loop_limit(vocabulary, settings))
    most = settings.batch_seconds * vocabulary.frame_rate * vocabulary.ids_per_frame
    asked = (model, prompts, grammar, limits)
    if settings.num_beams > 1:
        found = _beams(*asked, settings, most)
    else:
        drawn = sampling(settings, settings.seed, keys)
        found = [[answer] for answer in decode(*asked, batch_size=settings.batch_size, most=most, **drawn)]
    outputs = []
    for answers in found:
        texts = tuple(_text(text_tokenizer, answer) for answer in answers)
        n_best = texts if settings.n_best > 1 else ()
        outputs.append(TranscribeOutput(texts[0], answers[0].finish_reason, len(answers[0].ids), n_best))
    return outputs


def _beams(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    grammar: Grammar,
    limits: Sequence[RowLimits],
    settings: TranscribeSettings,
    most: float,
) -> list[list[Answer]]:
    """The likeliest answers of each prompt, batch by batch: a beam's rows end together."""
    found: list[list[Answer]] = [[] for _ in prompts]
    for batch in buckets([len(prompt) for prompt in prompts], settings.batch_size, most):
        of_batch = (model, [prompts[i] for i in batch], grammar, [limits[i] for i in batch])
        for i, answers in zip(batch, decode_beams(*of_batch, settings.num_beams, settings.n_best), strict=True):
            found[i] = answers
    return found


def _text(text_tokenizer: PreTrainedTokenizerBase, answer: Answer) -> str:
    decoded = text_tokenizer.decode(answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decoded.strip()
