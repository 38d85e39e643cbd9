"""What `slm evaluate` scores: a system is recordings, what a tokenizer makes of them, or the SLM's predictions.

Audio comes a batch at a time, as :class:`SystemAudio`, and is gone with it: memory does not grow with the test set.

Shapes: waveforms (S,) of S samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass
class System:
    """One thing to score: audio that judges read, or ``texts``, the SLM's own: utterance id -> text, None: failed.

    ``transcripts``: judge -> utterance id -> its transcript. ``facts`` are further fields of :class:`eval.schema.Row`.
    ``answers`` says which of the two. ``references``: utterance id -> what it is scored against, where those are not
    the test set's texts but another ``column``; empty texts, and no column, where nothing is known that it should say.
    ``translates``: whether its texts are translations.
    """

    name: str
    kind: str
    model: str
    sampling_rate: int = 0
    answers: Literal["text", "speech"] = "speech"
    column: str = "text"
    references: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str | None] = field(default_factory=dict)
    transcripts: dict[str, dict[str, str | None]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None  # of the tokenizer that the audio went through
    translates: bool = False

    @property
    def codes_per_second(self) -> float | None:
        """Of all books: more than the LLM reads in a second, where several stand at one of its positions."""
        made = self.facts.get("generation", {})
        if made.get("frame_rate") is None:
            return self.facts.get("tokens_per_second")
        return made["frame_rate"] * made.get("n_codebooks", 1)


@dataclass(frozen=True)
class SystemAudio:
    """Waveforms (S,) of one system, by utterance id; the ``recordings`` that they were made from, where there are any.

    A system that failed on an utterance has no waveform of it.
    """

    system: System
    audios: dict[str, np.ndarray]
    recordings: dict[str, np.ndarray] = field(default_factory=dict)
