"""The codes of a batch of prompts, each an answer that goes on until the model ends it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slm.decoding.batching import buckets
from slm.decoding.decode import decode
from slm.decoding.multi_token import decode_multi_token
from slm.decoding.row_rules import Answer
from slm.generation.shared import sampling, speech_grammar
from slm.generation.speech_lm import SpeechLM
from slm.settings import SpeechLimits, SynthesizeSettings


def draw_codes(
    speech_lm: SpeechLM,
    prompts: Sequence[np.ndarray],
    bare: Sequence[np.ndarray] | None,
    limits: Sequence[SpeechLimits],
    settings: SynthesizeSettings,
    seed: int,
    keys: Sequence[str],
) -> list[Answer]:
    """Draws an answer to each prompt, in order.

    Args:
        speech_lm: The model.
        prompts: (P,) ids each.
        bare: The same without what they ask for, where guidance needs them.
        limits: One per prompt.
        settings: Decoding.
        seed: That of this attempt.
        keys: One per prompt, for its random stream.
    """
    vocabulary, model = speech_lm.vocabulary, speech_lm.model
    rows = [one.rows(vocabulary) for one in limits]
    grammar = speech_grammar(speech_lm, settings)
    if settings.multi_token == 1:
        drawn = sampling(settings, seed, keys)
        if bare is not None:
            drawn |= {"bare_prompts": bare, "guidance": settings.guidance}
        return decode(model, prompts, grammar, rows, batch_size=settings.batch_size, **drawn)
    answers: list[Answer | None] = [None] * len(prompts)
    proposing = (settings.multi_token, settings.multi_token_verify)
    for batch in buckets([len(prompt) for prompt in prompts], settings.batch_size):
        drawn = sampling(settings, seed, [keys[i] for i in batch])
        of_batch = (model, [prompts[i] for i in batch], grammar, [rows[i] for i in batch])
        for i, answer in zip(batch, decode_multi_token(*of_batch, *proposing, **drawn), strict=True):
            answers[i] = answer
    return answers
