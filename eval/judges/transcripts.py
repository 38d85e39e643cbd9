"""A judge that reads nothing twice and goes on where it cannot read a clip.

Shapes: S samples of one waveform.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor
from typing import Protocol

import numpy as np

from eval.judges.config import JudgeError
from eval.judges.judge import Judge

__all__ = ["CachedJudge", "Transcripts", "audio_sha256"]

log = logging.getLogger(__name__)
_HOPELESS = 8  # a judge that has failed so often and read nothing is taken for broken


class Transcripts(Protocol):
    """What a judge has heard already: audio's digest -> text."""

    def __contains__(self, key: object) -> bool: ...

    def __getitem__(self, key: str) -> str: ...

    def add(self, answers: Mapping[str, str]) -> None:
        """Keep more of them."""


def audio_sha256(audio: np.ndarray, sampling_rate: int) -> str:
    """Digest of a waveform (S,): its rate, its type and every sample."""
    digest = hashlib.sha256(f"{sampling_rate} {audio.dtype.str}\0".encode())
    digest.update(np.ascontiguousarray(audio).data)
    return digest.hexdigest()


class CachedJudge:
    """A judge with what it has heard already.

    Args:
        judge: the recogniser.
        transcripts: what it heard before, under the same conditions (:func:`eval.judges.judge.conditions_of`); more is
            added.
        strict: raise at the first clip that cannot be read.

    Attributes:
        errors: on each clip that could not be read, in order.
        n_read: clips of which there is a transcript.
    """

    def __init__(self, judge: Judge, transcripts: Transcripts, strict: bool = False) -> None:
        self.judge, self.transcripts, self.strict = judge, transcripts, strict
        self.errors: list[str] = []
        self.n_read = 0

    @property
    def name(self) -> str:
        return self.judge.name

    def transcribe(
        self, audios: Mapping[str, np.ndarray], sampling_rate: int, source: str = ""
    ) -> dict[str, str | None]:
        """Read waveforms (S,), each under its name; None where the judge cannot, and why is in ``errors``.

        Args:
            audios: the waveforms.
            sampling_rate: their rate in Hz.
            source: what they are, for messages.

        Raises:
            JudgeError: with ``strict`` the first clip that cannot be read; or the judge reads none at all.
        """
        keys = {name: audio_sha256(audio, sampling_rate) for name, audio in audios.items()}
        new = {key: name for name, key in keys.items() if key not in self.transcripts}
        found = self._read({name: audios[name] for name in new.values()}, sampling_rate, source)
        self.transcripts.add({key: found[name] for key, name in new.items() if name in found})
        texts = {name: self.transcripts[key] if key in self.transcripts else None for name, key in keys.items()}
        self.n_read += sum(text is not None for text in texts.values())
        if len(self.errors) >= _HOPELESS:
            self.check()
        return texts

    def check(self) -> None:
        """Raises JudgeError where the judge has read none of the clips that it was given."""
        if self.errors and not self.n_read:
            raise JudgeError(f"judge {self.name!r} can read no clip at all; the first: {self.errors[0]}")

    def _read(self, audios: dict[str, np.ndarray], sampling_rate: int, source: str) -> dict[str, str]:
        """Texts of those that can be read: together, or, where one of them cannot be, each alone."""
        if not audios:
            return {}
        try:
            return dict(zip(audios, self.judge.transcribe(list(audios.values()), sampling_rate), strict=True))
        except BrokenExecutor as error:  # its processes are gone: no clip's fault
            raise JudgeError(f"judge {self.name!r}: a process that reads was ended from outside ({error})") from error
        except Exception as error:  # whatever a model's code raises
            if len(audios) > 1:
                singles = ({name: audio} for name, audio in audios.items())
                return {name: text for one in singles for name, text in self._read(one, sampling_rate, source).items()}
            name, audio = next(iter(audios.items()))
            what = f"{source} {name} ({len(audio) / sampling_rate:.1f} s)".strip()
            message = f"{what}: judge {self.name!r} cannot read it: {type(error).__name__}: {error}"
            if self.strict:
                raise JudgeError(message) from error
            log.warning("counted as failed: %s", message)
            self.errors.append(message)
            return {}
