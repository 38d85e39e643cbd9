"""One utterance to be spoken, and speaking them: what `prepare-corpus` does in processes of its own.

Kept apart from the rest because each such process imports this file anew: nothing here needs torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import soundfile
import soxr

from recipes.runs.files import disk_errors
from recipes.voices import espeak, flite, piper

SAMPLING_RATE_HZ = 16000
UNSTRETCHED_WORDS_PER_MINUTE = 165  # about what flite and Piper speak by themselves


def engine_of(voice: str) -> ModuleType:
    """The module that speaks with a voice: each has `missing_message` and `unknown_voice`."""
    return flite if flite.is_flite(voice) else piper if piper.is_piper(voice) else espeak


def voice_name(voice: str) -> str:
    """What manifests and folders call a voice."""
    return piper.voice_name(voice) if piper.is_piper(voice) else voice


@dataclass(frozen=True)
class Line:
    """One utterance to be spoken."""

    id: str
    text: str
    split: str
    voice: str
    words_per_minute: int
    pitch: int

    @property
    def file(self) -> str:
        return f"audio/{voice_name(self.voice).replace(':', '-')}/{self.id}.flac"

    @property
    def spoken(self) -> str:
        """What the engine gets: the letter a as a letter, not as an article."""
        letter = "[[e'I]]" if engine_of(self.voice) is espeak else "ay"
        return (
            re.sub(r"\b(at|by|in|with) a (?=\w+ \w+$)", rf"\1 {letter} ", self.text)
            if "command" in self.id
            else self.text
        )


def speak(lines: list[Line], folder: Path) -> dict[str, float]:
    """Synthesise one voice's lines to FLAC files, in a process of its own.

    espeak-ng carries state from one utterance to the next, so a voice is always spoken whole, from a fresh engine.

    Returns:
        id -> duration in seconds.
    """
    module = engine_of(lines[0].voice)
    engine = espeak.Espeak() if module is espeak else None
    durations = {}
    for line in lines:
        if engine is None:
            stretch = UNSTRETCHED_WORDS_PER_MINUTE / line.words_per_minute
            waveform, rate = module.synthesise(line.spoken, line.voice, duration_stretch=stretch)
        else:
            rate, speed = engine.sampling_rate, line.words_per_minute
            waveform = engine.synthesise(line.spoken, line.voice, words_per_minute=speed, pitch=line.pitch)
        waveform = soxr.resample(waveform, rate, SAMPLING_RATE_HZ)
        file = folder / line.file
        temporary = file.with_suffix(".tmp")
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(temporary, 0.9 * waveform, SAMPLING_RATE_HZ, format="FLAC", subtype="PCM_16")
            temporary.replace(file)
        durations[line.id] = round(len(waveform) / SAMPLING_RATE_HZ, 4)
    return durations
