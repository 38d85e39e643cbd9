"""Which recogniser judges, and how it reads: the settings, and the error where one cannot be had."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from eval.judges.no_speech import NoSpeechRule


class JudgeError(ValueError):
    """The judge cannot be had as configured; the message says what is missing and the way out."""


@dataclass
class JudgeConfig:
    """Which recogniser reads the audio, and how."""

    name: str = field(
        default="pocketsphinx",
        metadata={
            "help": "folder or hub name of a transformers ASR model, our recogniser's folder, 'pocketsphinx', "
            "'faster-whisper:SIZE' or 'paraformer-zh'"
        },
    )
    label: str | None = field(default=None, metadata={"help": "name in tables; default: taken from `name`"})
    decoding: str = field(
        default="auto",
        metadata={
            "help": "'attention' (generate), 'ctc' (greedy), 'joint' (both), or 'auto': what the model was made for"
        },
    )
    num_beams: int = field(default=1, metadata={"help": "beams of 'attention' and 'joint' decoding"})
    ctc_weight: float = field(default=0.3, metadata={"help": "share of the CTC head in 'joint' decoding, 0 to 1"})
    batch_size: int = field(default=8, metadata={"help": "clips read at a time, at most"})
    batch_seconds: float = field(
        default=240.0, metadata={"help": "seconds of audio read at a time, padding included, at most"}
    )
    processes: int = field(default=1, metadata={"help": "pocketsphinx: processes that read side by side"})
    revision: str | None = field(
        default=None, metadata={"help": "commit or tag of a hub model; pin it to compare scores"}
    )
    language: str | None = field(
        default=None,
        metadata={"help": "of a multilingual Whisper: a code such as 'de'; null: en; 'auto': guessed for each clip"},
    )
    no_speech: NoSpeechRule = field(
        default="v2",
        metadata={
            "help": "rule for what is no speech and is read as nothing: v2 (level; Whisper's own probabilities; "
            "repetition, see eval/judges/no_speech.py), or off"
        },
    )
    max_tokens_per_second: float = field(
        default=25.0,
        metadata={"help": "bound on the text tokens heard in a second: stops a decoder that repeats itself"},
    )

    def __post_init__(self) -> None:
        ways = ("auto", "attention", "ctc", "joint")
        if self.decoding not in ways:
            raise JudgeError(f"judge {self.name!r}: decoding must be one of {', '.join(ways)}, not {self.decoding!r}")
        if self.no_speech not in get_args(NoSpeechRule):
            rules = ", ".join(get_args(NoSpeechRule))
            raise JudgeError(f"judge {self.name!r}: no_speech must be one of {rules}, not {self.no_speech!r}")
        if not 0 <= self.ctc_weight <= 1:
            raise JudgeError(f"judge {self.name!r}: ctc_weight={self.ctc_weight} must lie between 0 and 1")
        for key in ("num_beams", "batch_size", "batch_seconds", "max_tokens_per_second", "processes"):
            if getattr(self, key) <= 0:
                raise JudgeError(f"judge {self.name!r}: {key} must be positive, not {getattr(self, key)}")

    def display_name(self) -> str:
        """The name in tables; of ``runs/recogniser/model`` that is "recogniser"."""
        if self.label:
            return self.label
        parts = [part for part in Path(self.name).parts if part not in ("model", "/", ".")]
        return parts[-1] if Path(self.name).is_dir() and parts else self.name
