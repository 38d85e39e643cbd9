"""flite through its command: text to a waveform in the four small voices that Debian's package `flite` carries.

A recogniser trained on people understands flite's voices far better than espeak-ng's, which are made by rule; flite's
are built from recordings. It is free software (a BSD-like licence of CMU's) and no part of this package.

Shapes: S samples of one mono waveform, float32 in [-1, 1].
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import soundfile

PREFIX = "flite:"


class FliteError(RuntimeError):
    """flite is not installed, or refused a text or a voice; the message says which."""


def is_flite(voice: str) -> bool:
    """Whether a voice's name asks for flite: ``flite:slt``."""
    return voice.startswith(PREFIX)


def missing_message() -> str | None:
    """What to install where flite is not there, else None."""
    if shutil.which("flite") is None:
        return (
            "a voice asks for flite, which is not installed: install the system package flite, or choose other voices"
        )
    return None


@cache
def voices() -> tuple[str, ...]:
    """The voices of the installed flite, without the prefix.

    Raises:
        FliteError: flite does not list them.
    """
    done = subprocess.run(["flite", "-lv"], capture_output=True, text=True, check=False)
    if done.returncode or ":" not in done.stdout:
        raise FliteError(f"flite -lv lists no voices: {(done.stdout + done.stderr).strip()}")
    return tuple(done.stdout.split(":", 1)[1].split())


def unknown_voice(voice: str) -> str | None:
    """What is wrong with a voice's name, else None. Raises FliteError as `voices` does."""
    name = voice.removeprefix(PREFIX)
    return None if name in voices() else f"flite has no voice {name}; it has {', '.join(voices())}"


def synthesise(text: str, voice: str, *, duration_stretch: float = 1.0) -> tuple[np.ndarray, int]:
    """Speaks one text.

    Args:
        text: words.
        voice: ``flite:`` and one of flite's voices (``flite -lv``), such as ``flite:slt``.
        duration_stretch: above 1 is slower.

    Returns:
        (S,) and its sampling rate.

    Raises:
        FliteError: an unknown voice, or no audio.
    """
    name = voice.removeprefix(PREFIX)
    if message := unknown_voice(voice):  # flite itself would speak with another one
        raise FliteError(message)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "speech.wav"
        command = ["flite", "-voice", name, "--setf", f"duration_stretch={duration_stretch:.3f}", "-t", text, "-o"]
        done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False)
        if done.returncode or not file.is_file():
            raise FliteError(f"flite cannot say {text!r} with voice {name}: {(done.stdout + done.stderr).strip()}")
        samples, rate = soundfile.read(file, dtype="float32")
    if not len(samples):
        raise FliteError(f"flite made no audio of {text!r} with voice {name}")
    return samples, rate
