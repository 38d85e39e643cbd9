"""Recognisers that transformers does not load and published protocols read with: each through the package that does.

Shapes: B clips, S samples of one waveform at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import numpy as np
import torch

from eval.judges.config import JudgeConfig, JudgeError

__all__ = ["LIBRARIES", "faster_whisper_reader", "package_kind", "paraformer_reader"]

PARAFORMER, FASTER_WHISPER = "paraformer-zh", "faster-whisper:"
LIBRARIES = {"paraformer": ("funasr", "zhconv"), "faster-whisper": ("faster-whisper",)}


def package_kind(config: JudgeConfig) -> str | None:
    """Which of LIBRARIES' kinds a judge's name means; None for one that transformers loads.

    Raises:
        JudgeError: it means one, and its package is not installed, or the settings are not for it.
    """
    if config.name == PARAFORMER:
        kind = "paraformer"
    elif config.name.startswith(FASTER_WHISPER):
        kind = "faster-whisper"
    else:
        return None
    for name in LIBRARIES[kind]:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            raise JudgeError(
                f"judge {config.name!r} needs the package {name}, which is not installed: pip install "
                f"{' '.join(LIBRARIES[kind])}, or name another judge"
            ) from None
    if config.decoding != "auto":
        raise JudgeError(f"judge {config.name!r}: decoding={config.decoding} is not for it; leave it at auto")
    if kind == "paraformer" and config.language not in (None, "zh"):
        raise JudgeError(f"judge {config.name!r} knows Chinese and cannot be told language={config.language}")
    return kind


def paraformer_reader(config: JudgeConfig, device: str) -> Callable[[list[np.ndarray]], list[str]]:
    """FunASR's Paraformer, its text in simplified characters, as seed-tts-eval reads Chinese."""
    import zhconv
    from funasr import AutoModel

    model = AutoModel(model=config.name, device=device, disable_update=True)

    def read(clips: list[np.ndarray]) -> list[str]:
        found = [model.generate(input=clip, batch_size_s=300, disable_pbar=True)[0]["text"] for clip in clips]
        return [zhconv.convert(text, "zh-cn") for text in found]

    return read


def faster_whisper_reader(config: JudgeConfig, device: str) -> Callable[[list[np.ndarray]], list[str]]:
    """A Whisper through CTranslate2, with that package's own rules for silence and repetition, in fp32."""
    from faster_whisper import WhisperModel

    size = config.name.removeprefix(FASTER_WHISPER)
    model = WhisperModel(size, device=torch.device(device).type, compute_type="float32", revision=config.revision)
    language = None if config.language == "auto" else config.language or "en"

    def read(clips: list[np.ndarray]) -> list[str]:
        texts = []
        for clip in clips:
            segments, _ = model.transcribe(clip, beam_size=config.num_beams, language=language)
            texts.append(" ".join(segment.text for segment in segments))
        return texts

    return read
