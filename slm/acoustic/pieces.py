"""How speech is filled: the settings of the drawing, and the pieces that are filled at once.

Shapes: n books that are given, K books, F frames of an answer, P of a voice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from slm.acoustic.configuration import AcousticConfig, AcousticError


@dataclass
class AcousticDecoding:
    """How the stage draws; of a regression nothing is drawn."""

    steps: int = field(
        default=8,
        metadata={"help": "masked: rounds of the first book (SoundStorm: 16); flow, diffusion: steps from noise"},
    )
    fine_steps: int = field(default=1, metadata={"help": "masked: rounds of each book after the first (SoundStorm: 1)"})
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "masked: of the drawing, 0: the likeliest code each time; flow, diffusion: scale of the noise"
        },
    )
    confidence_noise: float = field(
        default=1.0, metadata={"help": "masked: noise on which codes are kept, falling to 0 with the rounds (MaskGIT)"}
    )
    guidance: float = field(
        default=1.0,
        metadata={"help": "not masked: weight of the condition (classifier-free guidance); 1: none, CosyVoice: 1.7"},
    )
    batch_size: int = field(default=16, metadata={"help": "pieces of speech that are filled together"})

    def __post_init__(self) -> None:
        for name in ("steps", "fine_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise AcousticError(f"acoustic_decoding.{name}: {getattr(self, name)} must be at least 1")
        for name in ("temperature", "confidence_noise", "guidance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise AcousticError(f"acoustic_decoding.{name}: {getattr(self, name):g} must be 0 or more")


@dataclass(frozen=True)
class Piece:
    """Codes (n, F) that are given, a voice (K, P), and what decides the random stream."""

    given: np.ndarray
    voice: np.ndarray
    key: str

    @property
    def is_prompt(self) -> np.ndarray:
        """(P + F,) bool, true on the voice's frames, which come first."""
        return np.arange(self.voice.shape[1] + self.given.shape[1]) < self.voice.shape[1]

    @property
    def codes(self) -> np.ndarray:
        """The voice and what is given, (K, P + F) int64; 0 in the books to fill."""
        target = np.zeros((len(self.voice), self.given.shape[1]), dtype=np.int64)
        target[: len(self.given)] = self.given
        return np.concatenate([self.voice, target], axis=1)

    def stream(self) -> torch.Generator:
        """A new random stream, which follows from the key alone."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def cut_pieces(
    config: AcousticConfig, codes: Sequence[np.ndarray], voices: Sequence[np.ndarray], keys: Sequence[str], seed: int
) -> Iterator[tuple[int, Piece]]:
    """Yields the pieces of at most `window_s` of each item, with the item's number.

    Raises:
        AcousticError: A voice is shorter than `min_prompt_s` or has other books.
    """
    least, most, window = (config.frames(s) for s in (config.min_prompt_s, config.max_prompt_s, config.window_s))
    for number, (item, voice, key) in enumerate(zip(codes, voices, keys, strict=True)):
        if len(voice) != config.n_codebooks or voice.shape[1] < least:
            raise AcousticError(
                f"acoustic: a voice of {len(voice)} books and {voice.shape[1] / config.frame_rate:.2f} s; the stage "
                f"needs {config.n_codebooks} books and {config.min_prompt_s:g} s"
            )
        for place, part in enumerate(np.array_split(item, max(1, -(-item.shape[1] // window)), axis=1)):
            yield number, Piece(part, voice[:, :most], f"{seed} {key} {place}")
