"""Neural voices of Piper (VITS, in ONNX) through its package: text to a waveform, several times real time on a CPU.

They sound like the people whose recordings they were trained on, so that recognisers of people read them well. The
package `piper-tts` is GPL-3 (extra `piper`) and no part of this one; voices come with licences of their own.

Shapes: S samples of one mono waveform, float32 in [-1, 1].
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = "piper:"


class PiperError(RuntimeError):
    """Piper is not installed, or refused a text or a voice; the message says which."""


def is_piper(voice: str) -> bool:
    """Whether a voice's name asks for Piper: ``piper:voices/en_US-joe-medium.onnx``."""
    return voice.startswith(PREFIX)


def voice_name(voice: str) -> str:
    """What manifests and folders call a voice: ``piper:en_US-joe-medium``."""
    return PREFIX + Path(voice.removeprefix(PREFIX)).stem


def missing_message() -> str | None:
    """What to install where Piper is not there, else None."""
    if importlib.util.find_spec("piper") is None:
        return "a voice asks for Piper, which is not installed: pip install 'lmspt-slm[piper]', or choose other voices"
    return None


def unknown_voice(voice: str) -> str | None:
    """What is wrong with a voice's name, else None."""
    file = Path(voice.removeprefix(PREFIX)).expanduser()
    missing = [str(path) for path in (file, Path(f"{file}.json")) if not path.is_file()]
    if missing:
        return f"{voice}: no such file: {', '.join(missing)} (a Piper voice is FILE.onnx with FILE.onnx.json)"
    return None


@lru_cache(maxsize=2)
def _load(file: str) -> Any:
    import onnxruntime
    from piper import PiperVoice

    onnxruntime.set_seed(0)  # VITS draws rhythm and timbre: in a fresh process the same in every run
    return PiperVoice.load(file)


def synthesise(text: str, voice: str, *, duration_stretch: float = 1.0) -> tuple[np.ndarray, int]:
    """Speaks one text.

    Args:
        text: words; punctuation is followed.
        voice: ``piper:`` and the path of a voice's ``.onnx`` file, its ``.onnx.json`` beside it.
        duration_stretch: above 1 is slower.

    Returns:
        (S,) and its sampling rate.

    Raises:
        PiperError: an unknown voice, or no audio.
    """
    if message := unknown_voice(voice):
        raise PiperError(message)
    from piper.config import SynthesisConfig

    engine = _load(str(Path(voice.removeprefix(PREFIX)).expanduser()))
    settings = SynthesisConfig(length_scale=duration_stretch, volume=0.9)
    parts = [chunk.audio_float_array for chunk in engine.synthesize(text, settings)]
    if not parts or not sum(map(len, parts)):
        raise PiperError(f"Piper made no audio of {text!r} with voice {voice}")
    return np.concatenate(parts).astype(np.float32), engine.config.sample_rate
