"""A text that is written as sound while its codes still come, sentence after sentence."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from recipes.config import ConfigError
from recipes.inference.predictions import NON_FINITE_SCORES
from recipes.inference.scripts import NON_FINITE_SAMPLES, Request, Script
from recipes.inference.speech_files import audio_format, decoded_stream
from recipes.runs.files import disk_errors
from slm.generation import SpeechLM, SynthesizeOutput, stream_speech
from slm.settings import SynthesizeSettings
from slm.tasks import Task

CHUNK_S = 0.5  # of speech that is waited for, beside what the tokenizer's decoder waits for


def write_stream(
    script: Script,
    requests: Sequence[Request],
    task: Task,
    speech_lm: SpeechLM,
    tokenizer: Any,
    device: str,
    settings: SynthesizeSettings,
    pause_s: float,
) -> float:
    """Says a text's parts one after the other into its file, which grows meanwhile.

    Args:
        script: the text, with its parts and the file's name.
        requests: what the model is asked, a part each.
        task: whose prompts.
        speech_lm: the model.
        tokenizer: of its codes.
        device: the tokenizer's.
        settings: decoding.
        pause_s: silence between two sentences; in a sentence half.

    Returns:
        Seconds until the first sound was in the file.

    Raises:
        ConfigError: scores or samples are not finite; what was said before stays in the file.
    """
    rate, vocabulary, path = tokenizer.config.sampling_rate, speech_lm.vocabulary, Path(script.audio)
    started, first_s = time.perf_counter(), 0.0
    with disk_errors(path), soundfile.SoundFile(path, "w", rate, 1, **audio_format(script.audio)) as file:
        for request in sorted(requests, key=lambda one: one.number):
            part, drawn, played = script.parts[request.number], [], []

            def codes(request: Request = request, drawn: list[SynthesizeOutput] = drawn) -> Iterator[np.ndarray]:
                key = script.key(request.number, by_text=True)
                for output in stream_speech(speech_lm, task, request.utterance, request.limits, settings, key, CHUNK_S):
                    drawn.append(output)
                    yield output.codes

            for waveform in decoded_stream(tokenizer, codes(), device):
                if not np.isfinite(waveform).all():
                    raise ConfigError(f"text: {NON_FINITE_SAMPLES}")
                file.write(waveform)
                file.flush()
                played.append(waveform)
                first_s = first_s or (time.perf_counter() - started if len(waveform) else 0.0)
            if drawn[-1].finish_reason == "non_finite":
                raise ConfigError(f"text: {NON_FINITE_SCORES}")
            whole = np.concatenate([output.codes for output in drawn], axis=1)
            output = SynthesizeOutput(whole, drawn[-1].finish_reason)
            script.note(part, output, np.concatenate(played), rate, vocabulary)
            if request.number + 1 < len(script.parts):
                file.write(script.pause(part, rate, pause_s))
    return first_s
