"""A text on its way to speech: the parts that it is said in, what came of them, and the file that holds them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from recipes.inference.long_texts import Part
from recipes.inference.speech_checks import is_silent, speech_warnings
from recipes.inference.speech_files import audio_format
from recipes.runs.files import disk_errors
from slm.generation import SynthesizeOutput
from slm.settings import SpeechLimits
from slm.tasks import Task
from slm.tasks.registry import UtteranceTokens
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.utterances import Utterance

SINGLE = "text"  # the id of a text that was given by itself
NON_FINITE_SAMPLES = "the speech tokenizer's decoder gave samples that are not finite (NaN)"


@dataclass
class Script:
    """One text on its way to speech, and what became of it.

    `reference` is what its speech should say, `parts` are that as it is said. `codes` (K, F) or the `recording` are the
    speech of its prompt, where there is any; `expected_s` is how long the speech is that did follow it, where that is
    known.
    """

    id: str
    text: str
    reference: str
    columns: Mapping[str, str] = field(default_factory=dict)
    codes: np.ndarray | None = None
    recording: Utterance | None = None
    expected_s: float | None = None
    parts: list[Part] = field(default_factory=list)
    unsayable: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    error: str | None = None
    audio: str = ""
    outputs: dict[int, SynthesizeOutput] = field(default_factory=dict)  # by number of the part, until they are written
    segments: list[dict[str, Any]] = field(default_factory=list)
    prosody: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # of each word, by number of the part
    n_codes: int = 0
    duration_s: float = 0.0
    reasons: set[str] = field(default_factory=set)  # why the model stopped, in each of the parts
    silent: bool = False
    attempts: int = 1
    n_passes: int = 0  # of the model, where one may give several tokens
    n_words_redrawn: int | None = None  # None: not said word by word
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

    def note(
        self, part: Part, output: SynthesizeOutput, waveform: np.ndarray, rate: int, vocabulary: SpeechVocabulary
    ) -> None:
        """Takes down what came of its next part: (S,) samples at `rate` Hz, and what of them looks lost."""
        start_s = self.duration_s
        self.duration_s += len(waveform) / rate
        self.n_codes += int(output.codes.size)
        self.n_passes += output.n_passes
        if output.words:
            self.n_words_redrawn = (self.n_words_redrawn or 0) + output.n_words_redrawn
        self.reasons.add(output.finish_reason)
        self.silent |= is_silent(waveform)
        self.segments.append(
            {
                "start_s": round(start_s, 3),
                "end_s": round(self.duration_s, 3),
                "text": part.written,
                "finish_reason": output.finish_reason,
            }
        )
        for warning in speech_warnings(part.said, output, waveform, rate, vocabulary):
            self.lost.append(f"{warning}: {part.written!r}")

    def pause(self, part: Part, rate: int, pause_s: float) -> np.ndarray:
        """The silence (S,) behind a part that another follows; it is taken down too."""
        silence = np.zeros(round(rate * pause_s * (1.0 if part.ends_sentence else 0.5)), np.float32)
        self.duration_s += len(silence) / rate
        return silence

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
        if self.n_words_redrawn is not None:
            row["n_words_redrawn"] = self.n_words_redrawn
        if self.n_passes:
            row["n_passes"] = self.n_passes
        if self.expected_s is not None:
            row["expected_s"] = round(self.expected_s, 3)
        if self.prosody:
            row["prosody"] = [word for _, words in sorted(self.prosody.items()) for word in words]
        return row | ({"segments": self.segments} if len(self.segments) > 1 else {})


def joined(scripts: Iterable[Script], count: int) -> Iterator[Script]:
    """So many texts in a row as one, under their ids with "+" between; what is left over at the end is left out.

    >>> [(one.id, one.text) for one in joined([Script(i, f"say {i}", f"say {i}") for i in "abcde"], 2)]
    [('a+b', 'say a say b'), ('c+d', 'say c say d')]
    """
    scripts = iter(scripts)
    while len(some := list(islice(scripts, count))) == count:
        text, reference = (" ".join(getattr(one, name) for one in some) for name in ("text", "reference"))
        yield Script("+".join(one.id for one in some), text, reference, some[0].columns)


@dataclass(frozen=True)
class Request:
    """One part of a text, what its prompt is made of, and how long its answer may be and must be."""

    script: Script
    number: int
    utterance: UtteranceTokens
    limits: SpeechLimits


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
    path, finite = folder / script.audio, True
    with disk_errors(path), soundfile.SoundFile(path, "w", rate, 1, **audio_format(script.audio)) as file:
        for number, part in enumerate(script.parts):
            waveform, output = next(waveforms), script.outputs.pop(number)
            finite = finite and bool(np.isfinite(waveform).all())
            file.write(np.nan_to_num(waveform))
            script.note(part, output, waveform, rate, vocabulary)
            if number + 1 < len(script.parts):
                file.write(script.pause(part, rate, pause_s))
    if not finite:
        script.fail(NON_FINITE_SAMPLES, "non_finite")
        path.unlink()
