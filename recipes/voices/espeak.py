"""espeak-ng through ctypes: text to a waveform with no download and no system package.

Shapes: S samples of one mono waveform, float32 in [-1, 1].

espeak-ng is GPL-3 and comes with the extra `synthesis` (espeakng-loader); nothing else here needs it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SYNCHRONOUS, DONT_EXIT = 2, 0x8000
UTF8, PHONEMES = 1, 0x100
RATE, PITCH, RANGE = 1, 3, 4
CHARACTER_POSITION = 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class EspeakError(RuntimeError):
    """espeak-ng refused a call; the message says which."""


def missing_message() -> str | None:
    """What to install where espeak-ng is not there, else None."""
    try:
        import espeakng_loader  # noqa: F401
    except ModuleNotFoundError:
        return (
            "the embedded corpus is synthesised with espeak-ng, which is not installed: "
            "pip install 'lmspt-slm[synthesis]' (GPL-3, which is why it is an extra)"
        )
    return None


@cache
def _engine() -> Espeak:
    """The engine that answers questions in this process, made once."""
    return Espeak()


def unknown_voice(voice: str) -> str | None:
    """What is wrong with a voice's name (`en-us+f2`: a voice and, where need be, a variant), else None.

    Raises:
        ModuleNotFoundError, EspeakError: as `Espeak` does.
    """
    name, plus, variant = voice.partition("+")
    engine = _engine()
    if name in engine.variants or not engine.has_voice(voice):
        return f"espeak-ng has no voice {name or repr(name)} ({voice})"
    if plus and variant not in engine.variants:  # it would speak without one
        return f"espeak-ng has no variant {variant or repr(variant)} ({voice}); it has {', '.join(engine.variants)}"
    return None


class Espeak:
    """One espeak-ng engine in this process (the library keeps global state: make one and keep it).

    Raises:
        ModuleNotFoundError: espeakng-loader is not installed; the message says what to install.
        EspeakError: the library does not start.
    """

    def __init__(self) -> None:
        if message := missing_message():
            raise ModuleNotFoundError(message)
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._declare()
        data = espeakng_loader.get_data_path()
        self.sampling_rate = self._library.espeak_Initialize(SYNCHRONOUS, 500, data.encode(), DONT_EXIT)
        if self.sampling_rate <= 0:
            raise EspeakError(f"espeak_Initialize failed ({self.sampling_rate}) with the data in {data}")
        self.variants = sorted(path.name for path in Path(data, "voices", "!v").glob("*"))
        self._blocks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._collect)  # kept: ctypes would free it under the library's feet
        self._library.espeak_SetSynthCallback(self._callback)

    def has_voice(self, voice: str) -> bool:
        """Whether there is such a voice, whatever its variant."""
        return self._library.espeak_SetVoiceByName(voice.encode()) == 0

    def synthesise(
        self, text: str, voice: str, *, words_per_minute: int = 165, pitch: int = 50, pitch_range: int = 50
    ) -> np.ndarray:
        """Speak one text.

        Args:
            text: words; phonemes may stand in double square brackets.
            voice: a voice and variant, such as ``en-us+f2``.
            words_per_minute: speed, 80 to 450.
            pitch: 0 to 100.
            pitch_range: 0 (monotone) to 100.

        Returns:
            (S,) at `sampling_rate`.

        Raises:
            EspeakError: an unknown voice, or no audio.
        """
        # The engine seeds its flutter and noise from the clock: seeded anew, a text sounds the same in every run.
        self._call("espeak_ng_SetRandSeed", 1)
        self._call("espeak_SetVoiceByName", voice.encode())
        for parameter, value in ((RATE, words_per_minute), (PITCH, pitch), (RANGE, pitch_range)):
            self._call("espeak_SetParameter", parameter, value, 0)
        self._blocks = []
        data = text.encode("utf-8") + b"\0"
        self._call("espeak_Synth", data, len(data), 0, CHARACTER_POSITION, 0, UTF8 | PHONEMES, None, None)
        self._call("espeak_Synchronize")
        if not self._blocks:
            raise EspeakError(f"espeak-ng made no audio of {text!r} with voice {voice}")
        return np.concatenate(self._blocks).astype(np.float32) / 32768.0

    def _collect(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            what = ", ".join(str(item.rstrip(b"\0").decode()) for item in arguments if isinstance(item, bytes))
            raise EspeakError(f"{name}({what}) failed with code {code}")

    def _declare(self) -> None:
        integer, unsigned, pointer, text = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p
        declare = self._signature
        declare("espeak_Initialize", integer, integer, text, integer)
        declare("espeak_SetSynthCallback", _CALLBACK, returns=None)
        declare("espeak_SetVoiceByName", text)
        declare("espeak_SetParameter", integer, integer, integer)
        numbers = (ctypes.c_size_t, unsigned, integer, unsigned, unsigned)
        declare("espeak_Synth", text, *numbers, pointer, pointer)
        declare("espeak_Synchronize")
        declare("espeak_ng_SetRandSeed", ctypes.c_long)

    def _signature(self, name: str, *arguments: Any, returns: Any = ctypes.c_int) -> None:
        function = getattr(self._library, name)
        function.argtypes, function.restype = list(arguments), returns
