"""Word codes that an SLM writes from text, each word's behind the word.

Shapes: K books of a word, W words; word codes (K, W).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError
from recipes.inference.tasks import check_marks
from recipes.runs.inputs import digest
from slm.generation import SpeechLM, generate_speech
from slm.settings import SpeechLimits, SynthesizeSettings
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.tts_aligned import word_ids
from slm.text_aligned.decoding import RebuildSettings

TASK = "tts-aligned"


def load_writer(name: str, model: str, word_books: int, device: str) -> SpeechLM:
    """The SLM `name`, which was fine-tuned on the word codes of the text-aligned model in the folder `model`.

    Raises:
        ConfigError: None is named, it writes other books, or has not learnt the task.
        VocabularyError: It has learnt the codes of something else, or is no SLM.
    """
    if not name:
        raise ConfigError(
            "speech_lm: not set; word_codes=slm needs an SLM, by `slm finetune` on the corpus of `slm "
            "encode-text-aligned`"
        )
    speech_lm = SpeechLM.load(name, device)
    speech_lm.vocabulary.check_fingerprint(digest(Path(model)), f"text-aligned model {model}")
    check_marks(get_task(TASK), speech_lm.vocabulary, name)
    if speech_lm.vocabulary.n_codebooks != word_books:
        raise ConfigError(
            f"speech_lm: {name} writes {speech_lm.vocabulary.n_codebooks} of the {word_books} books of a word; "
            f"fine-tune it with n_codebooks={word_books}"
        )
    return speech_lm


def write_words(
    speech_lm: SpeechLM, texts: Sequence[str], keys: Sequence[str], settings: RebuildSettings
) -> list[np.ndarray]:
    """Word codes (K, W) of each text.

    Args:
        speech_lm: Of :func:`load_writer`.
        texts: As the corpus writes them.
        keys: What, beside the seed, decides each text's random stream.
        settings: How codes are drawn.

    Raises:
        ConfigError: The SLM's scores are not finite, so that a text has no word codes.
    """
    vocabulary = speech_lm.vocabulary
    normalise = get_normaliser(vocabulary.normaliser_of_prompts)
    encode = functools.partial(vocabulary.encode_text, speech_lm.text_tokenizer)
    spoken = [UtteranceTokens(text=encode(text), words=word_ids(encode, text)) for text in map(normalise, texts)]
    one_frame = SpeechLimits(0.5 / vocabulary.frame_rate, 1.5 / vocabulary.frame_rate)  # rounded up, and down
    drawing = SynthesizeSettings(
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
        loop_s=0.0,
    )
    outputs = generate_speech(speech_lm, get_task(TASK), spoken, [one_frame] * len(spoken), drawing, keys)
    if broken := [key for key, output in zip(keys, outputs, strict=True) if output.finish_reason == "non_finite"]:
        raise ConfigError(
            f"speech_lm: its scores are not finite for {len(broken)} of {len(texts)} texts, such as {broken[0]!r}: "
            "its weights are broken"
        )
    return [output.codes for output in outputs]
