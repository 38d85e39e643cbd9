"""The prosody that an answer begins with, before its speech."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slm.decoding.decode import decode
from slm.decoding.row_rules import Grammar, RowLimits
from slm.generation.shared import default_keys, legal_mask, sampling
from slm.generation.speech_lm import SpeechLM
from slm.settings import GenerationError, SynthesizeSettings
from slm.tasks import Task, TaskError
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import make_prompt


def draw_prosody(
    speech_lm: SpeechLM,
    task: Task,
    utterances: Sequence[UtteranceTokens],
    settings: SynthesizeSettings | None = None,
    keys: Sequence[str] | None = None,
) -> list[np.ndarray | None]:
    """Draws the prosody with which a task's answers begin: of each word a token of each feature, in their order.

    Args:
        speech_lm: The model.
        task: One whose answers begin with prosody.
        utterances: What the prompts are made of, with the `words` of their texts.
        settings: Decoding.
        keys: As of :func:`~slm.generation.speech.generate_speech`.

    Returns:
        (W, 3) bins of each utterance, in order; None where the model's scores were not finite.

    Raises:
        TaskError: An utterance lacks a part of the prompt, or its words.
    """
    settings, vocabulary, model = settings or SynthesizeSettings(), speech_lm.vocabulary, speech_lm.model
    keys = default_keys(utterances) if keys is None else keys
    if any(not one.words for one in utterances):
        raise TaskError(f"task {task.name}: an utterance without words, each of which has its prosody")
    prompts = [make_prompt(vocabulary, task, one) for one in utterances]
    grammar = Grammar([legal_mask(model, ids) for ids in vocabulary.prosody_ids()], vocabulary.speech_id)
    n_ids = [len(one.words) * len(grammar.legal) for one in utterances]
    # Not to end before its budget is spent: the mark that opens the speech is given.
    limits = [RowLimits(n, least=n + 1) for n in n_ids]
    drawn = sampling(settings, settings.seed, [f"{key} prosody" for key in keys])
    found = decode(model, prompts, grammar, limits, batch_size=settings.batch_size, **drawn)
    return [None if one.finish_reason == "non_finite" else vocabulary.prosody_from_ids(one.ids) for one in found]


def speech_prompts(
    speech_lm: SpeechLM,
    task: Task,
    utterances: Sequence[UtteranceTokens],
    settings: SynthesizeSettings,
    keys: Sequence[str],
) -> list[np.ndarray | None]:
    """What stands before the first code of each answer: prompts, and prosody that the model writes where none is given.

    Args:
        speech_lm: Whose vocabulary and answers.
        task: Whose prompts; without prosody in its answers they are all there is.
        utterances: What is to be said, one for each answer.
        settings: How prosody is drawn.
        keys: One for each answer, which its random stream follows from.

    Returns:
        (P,) ids for each answer; None where the scores of its prosody were not finite.

    Raises:
        GenerationError: The model's pattern has books beside the ids, where no prosody is written.
    """
    vocabulary = speech_lm.vocabulary
    prompts = [make_prompt(vocabulary, task, item) for item in utterances]
    if not task.answer_holds_prosody:
        return prompts
    if vocabulary.further_sizes:
        raise GenerationError(
            f"synthesising: with prosody there is no pattern={vocabulary.pattern.name}; train with semantic or flatten"
        )
    bins = [item.prosody for item in utterances]
    unwritten = [i for i, own in enumerate(bins) if own is None]
    asked = ([utterances[i] for i in unwritten], settings, [keys[i] for i in unwritten])
    for i, own in zip(unwritten, draw_prosody(speech_lm, task, *asked), strict=True):
        bins[i] = own
    return [
        None if own is None else np.concatenate([prompt, vocabulary.ids_from_prosody(own), [vocabulary.speech_id]])
        for prompt, own in zip(prompts, bins, strict=True)
    ]
