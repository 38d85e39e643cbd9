"""The prosody that a text is said with: what the model writes of its words, and what is asked beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError
from recipes.inference.scripts import Request, Script
from slm.generation import SpeechLM, draw_prosody
from slm.prosody import FEATURES, ProsodyControl
from slm.tasks import Task

TASK = "tts-prosody"
MOST_NAMED = 30  # words in a message


def check_prosody(task: Task, control: ProsodyControl, guidance: float) -> None:
    """Raises ConfigError where prosody is asked of a task without, or of one with it what it cannot do."""
    if control.asks and not task.answer_holds_prosody:
        raise ConfigError(f"prosody: {task.name} writes no prosody that could be set; ask task={TASK}")
    if task.answer_holds_prosody and guidance > 1:
        raise ConfigError(f"decoding.guidance: an answer of {task.name} begins with prosody; leave guidance at 1")


def check_emphasis(control: ProsodyControl, scripts: Iterable[Script], normalise: Callable[[str], str]) -> None:
    """Raises ConfigError where what is to be emphasised is no single word, or stands in none of the texts."""
    said = {word for script in scripts for part in script.parts for word in part.said.split()}
    for word in control.emphasis:
        read = normalise(word)
        if len(read.split()) != 1:
            raise ConfigError(f"prosody.emphasis: {word!r} is not one word as the model reads it, but {read!r}")
        if read not in said:
            raise ConfigError(
                f"prosody.emphasis: {word!r} is no word of what is said ({' '.join(sorted(said)[:MOST_NAMED])})"
            )


def with_prosody(
    config: Any, requests: Sequence[Request], speech_lm: SpeechLM, task: Task, by_text: bool
) -> list[Request]:
    """The requests with the prosody that their speech is drawn with, which is noted in their scripts.

    The model writes it, and what is asked is added; where its scores are not finite there is none.

    Args:
        config: Of `slm synthesize`: `prosody` and `decoding`.
        requests: Parts of texts.
        speech_lm: The model.
        task: Whose answers begin with prosody.
        by_text: As of :meth:`recipes.inference.scripts.Script.key`.
    """
    bins, control, settings = speech_lm.vocabulary.prosody, config.prosody, config.decoding
    normalise = get_normaliser(speech_lm.vocabulary.normaliser_of_prompts)
    emphasised = [normalise(word) for word in control.emphasis]
    keys = [one.script.key(one.number, by_text) for one in requests]
    written = draw_prosody(speech_lm, task, [one.utterance for one in requests], settings, keys)
    asked = []
    for request, own in zip(requests, written, strict=True):
        if own is not None:
            words = request.script.parts[request.number].said.split()
            own = control.apply(own, words, bins.n, emphasised)
            request.script.prosody[request.number] = words_with_prosody(words, own, bins.n)
        asked.append(dataclasses.replace(request, utterance=dataclasses.replace(request.utterance, prosody=own)))
    return asked


def words_with_prosody(words: Sequence[str], bins: np.ndarray, n_bins: int) -> list[dict[str, Any]]:
    """`{word, duration, f0, energy}` of each word in bins (W, 3), as predictions hold them; no F0 is None."""
    named = [dict(zip(FEATURES, own, strict=True)) for own in bins.tolist()]
    return [
        {"word": word, **own, "f0": None if own["f0"] == n_bins else own["f0"]}
        for word, own in zip(words, named, strict=True)
    ]
