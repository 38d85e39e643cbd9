"""A text on its way to speech: the parts that it is said in, what came of them, and the file that holds them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from recipes.inference.long_texts import Part
from recipes.inference.speech_checks import is_silent, speech_warnings
from recipes.inference.speech_files import audio_format
from recipes.runs.files import disk_errors
from slm.generation import SynthesizeOutput
from slm.tasks import Task
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.utterances import Utterance

SINGLE = "text"  # the id of a text that was given by itself


@dataclass
class Script:
    """One text on its way to speech, and what became of it.

    `reference` is what its speech should say, `parts` are that as it is said. `codes` (K, F) or the `recording` are the
    speech of its prompt, where there is any.
    """

    id: str
    text: str
    reference: str
    columns: Mapping[str, str] = field(default_factory=dict)
    codes: np.ndarray | None = None
    recording: Utterance | None = None
    parts: list[Part] = field(default_factory=list)
    unsayable: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    error: str | None = None
    audio: str = ""
    outputs: dict[int, SynthesizeOutput] = field(default_factory=dict)  # by number of the part, until they are written
    segments: list[dict[str, Any]] = field(default_factory=list)
    n_codes: int = 0
    duration_s: float = 0.0
    reasons: set[str] = field(default_factory=set)  # why the model stopped, in each of the parts
    silent: bool = False
    attempts: int = 1
    wall_s: float = 0.0

    @property
    def place(self) -> str:
        """Which text a message is about; a single one needs no name."""
        return "" if self.id == SINGLE else f"{self.id}: "

    def key(self, number: int, by_text: bool) -> str:
        """What decides a part's random stream, beside the seed."""
        whole = self.parts[number].said if by_text else self.id
        return whole if len(self.parts) == 1 else f"{whole} {number}"

    def fail(self, error: str, *reasons: str) -> None:
        """It is not said, for this reason."""
        self.parts, self.error, self.outputs = [], error, {}
        self.reasons.update(reasons)

    def row(self, task: Task) -> dict[str, Any]:
        """Its line of predictions.jsonl; ``segments`` where it was cut."""
        reason = next((r for r in ("non_finite", "loop", "length") if r in self.reasons), "stop")
        row = {
            "id": self.id,
            "task": task.name,
            "text": self.reference,
            "audio": None if self.error else self.audio,
            "n_codes": self.n_codes,
            "duration_s": round(self.duration_s, 3),
            "truncated": reason in ("loop", "length"),
            "finish_reason": None if self.error else reason,
            "faults": sorted(self.reasons - {"stop"}) + ["silence"] * self.silent,
            "attempts": self.attempts,
            "warnings": self.unsayable + self.lost,
            "error": self.error,
            "wall_s": round(self.wall_s, 4),
        }
        return row | ({"segments": self.segments} if len(self.segments) > 1 else {})


def file_name(utterance_id: str) -> str:
    """A file name for an id; ids that are none get a hash, so that two never share a name."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", utterance_id)[:100]
    if plain != utterance_id or plain.startswith("."):
        plain = f"{plain.lstrip('.')}-{hashlib.sha256(utterance_id.encode()).hexdigest()[:8]}"
    return plain + ".wav"


def write_speech(
    script: Script,
    waveforms: Iterator[np.ndarray],
    rate: int,
    vocabulary: SpeechVocabulary,
    folder: Path,
    pause_s: float,
) -> None:
    """Writes the waveforms of a text's parts one behind the other, and notes what looks lost.

    A text with a sample that is not finite fails, and leaves no file.

    Args:
        script: the text, with the outputs of its parts, which are taken out.
        waveforms: (S,) of each part, taken as they are needed.
        rate: Hz.
        vocabulary: of the model.
        folder: where the text's `audio` lies.
        pause_s: silence between two sentences; in a sentence half.
    """
    path, n_samples, finite = folder / script.audio, 0, True
    with disk_errors(path), soundfile.SoundFile(path, "w", rate, 1, **audio_format(script.audio)) as file:
        for number, part in enumerate(script.parts):
            waveform, output = next(waveforms), script.outputs.pop(number)
            finite = finite and bool(np.isfinite(waveform).all())
            file.write(np.nan_to_num(waveform))
            start, n_samples = n_samples, n_samples + len(waveform)
            script.n_codes += int(output.codes.size)
            script.reasons.add(output.finish_reason)
            script.silent |= is_silent(waveform)
            script.segments.append(
                {
                    "start_s": round(start / rate, 3),
                    "end_s": round(n_samples / rate, 3),
                    "text": part.written,
                    "finish_reason": output.finish_reason,
                }
            )
            for warning in speech_warnings(part.said, output, waveform, rate, vocabulary):
                script.lost.append(f"{warning}: {part.written!r}")
            if number + 1 < len(script.parts):
                pause = round(rate * pause_s * (1.0 if part.ends_sentence else 0.5))
                file.write(np.zeros(pause, np.float32))
                n_samples += pause
    script.duration_s = n_samples / rate
    if not finite:
        script.fail("the speech tokenizer's decoder gave samples that are not finite (NaN)", "non_finite")
        path.unlink()
