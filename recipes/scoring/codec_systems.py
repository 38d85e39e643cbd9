"""What a tokenizer makes of recordings: each encoded once, decoded in every way that it has, with its cost.

Shapes: B items, S samples, K books, F frames; waveforms (S,), codes (K, F).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from eval.codes import nominal_bitrate
from recipes.encoding.encoder import encode_batch
from recipes.inference.speech_files import padded
from recipes.runs.machine import describe_machine, machine_text
from recipes.scoring.acoustic import SpeakerVoices
from recipes.scoring.systems import System, SystemAudio
from tokenizer.long_form.chunking import decode_latents_long, decode_long, resynthesize_long
from tokenizer.precision import LOWER


def precision_of(tokenizer: Any, fingerprints: Iterable[str | None]) -> str:
    """The precision in which a tokenizer makes the codes of these fingerprints; fp32 where there is none or none fits.

    What is made from codes is compared with what the same codes give, so it is the codes that decide.
    """
    given = set(fingerprints)
    return next((name for name in ("fp32", *LOWER) if tokenizer.fingerprint(name) in given), "fp32")


class CodecSystems:
    """What a tokenizer makes of recordings: each encoded once, and decoded in the ways that the tokenizer has.

    Reconstruction (main decoder, all books), semantic reconstruction (main decoder, book 0), with `voices` the acoustic
    stage (main decoder, book 0 and what the stage fills in the speaker's voice) and resynthesis (auxiliary
    decoder, book 0), in ``systems``, each with its cost; ``codes`` (K, F) of every recording.

    Args:
        tokenizer: any tokenizer behind the codec protocol, on ``device``.
        label: its name in tables.
        chunk_s: longer recordings go through in chunks, where the tokenizer allows it.
        precision: of the encoder.
        device: where the tokenizer is.
        voices: an acoustic stage; None: no such row.
    """

    def __init__(
        self,
        tokenizer: Any,
        label: str,
        chunk_s: float,
        precision: str,
        device: str,
        voices: SpeakerVoices | None = None,
    ) -> None:
        self.voices = voices
        self.tokenizer, self.chunk_s, self.precision, self.device = tokenizer, chunk_s, precision, device
        config, fingerprint = tokenizer.config, tokenizer.fingerprint(precision)
        kinds = ("reconstruction", "semantic_reconstruction", "acoustic_stage", "resynthesis")
        rates = {"resynthesis": getattr(config, "auxiliary_sampling_rate", None)}
        if voices is not None:
            rates["acoustic_stage"] = voices.decoder.config.sampling_rate
        self.systems = [
            System(
                kind.replace("_", " "),
                kind,
                label,
                rates.get(kind, config.sampling_rate),
                fingerprint=fingerprint,
            )
            for kind in kinds
            if kind in tokenizer.decode_paths or (kind == "acoustic_stage" and voices is not None)
        ]
        self.codes: list[np.ndarray] = []
        self._audio_s = self._encode_s = 0.0
        self._decode_s = dict.fromkeys((system.kind for system in self.systems), 0.0)

    def audio_batches(self, recordings: dict[str, np.ndarray]) -> Iterator[SystemAudio]:
        """Each way's audio of one batch of recordings, one way after the other.

        Args:
            recordings: Waveforms (S,) at the tokenizer's rate, by id.
        """
        rate = self.tokenizer.config.sampling_rate
        started = time.perf_counter()
        waveforms = list(recordings.values())
        codes = encode_batch(self.tokenizer, waveforms, self.precision, self.device, chunk_s=self.chunk_s)
        self._encode_s += time.perf_counter() - started
        self._audio_s += sum(map(len, waveforms)) / rate
        self.codes += [item.astype(np.int32) for item in codes]  # all are kept: half of int64
        frames, _ = padded(codes)
        for system in self.systems:
            started = time.perf_counter()
            kept = recordings
            if system.kind == "acoustic_stage":
                filled = self.voices.filled(list(recordings), codes)
                kept = {name: recordings[name] for name in filled}
                if not kept:
                    continue
                values = self._decode_filled(list(filled.values()))
            else:
                values = self._decode(system.kind, frames)
            self._decode_s[system.kind] += time.perf_counter() - started
            audios = {}
            for row, (name, waveform) in enumerate(kept.items()):
                audio = values[row, : -(-len(waveform) * system.sampling_rate // rate)].copy()
                if np.isfinite(audio).all():
                    audios[name] = audio
            yield SystemAudio(system, audios, recordings)

    @torch.inference_mode()
    def _decode(self, kind: str, codes: torch.Tensor) -> np.ndarray:
        """Codes (B, K, F) to waveforms (B, S)."""
        if kind == "resynthesis":
            output = resynthesize_long(self.tokenizer, codes, self.chunk_s)
        else:
            books = codes[:, :1] if kind == "semantic_reconstruction" else codes
            output = decode_long(self.tokenizer, books, self.chunk_s)
        return output.audio_values[:, 0].float().cpu().numpy()

    @torch.inference_mode()
    def _decode_filled(self, filled: Sequence[np.ndarray]) -> np.ndarray:
        """All codes (K, F), or the latents (D, F) in their place, of what a stage filled, to waveforms (B, S)."""
        frames, mask = padded(filled)
        decoder = self.voices.decoder
        if frames.is_floating_point():
            output = decode_latents_long(decoder, frames, mask, self.chunk_s)
        else:
            output = decode_long(decoder, frames, self.chunk_s)
        return output.audio_values[:, 0].float().cpu().numpy()

    def finish(self) -> None:
        """Fill in each system's cost, when every batch went through."""
        config, machine = self.tokenizer.config, machine_text({"machine": describe_machine()})
        for system in self.systems:
            sizes = list(config.codebook_sizes)[: None if system.kind == "reconstruction" else 1]
            decode_s = self._decode_s[system.kind]
            system.facts = {
                "frame_rate_hz": float(config.frame_rate),
                "tokens_per_second": float(config.frame_rate) * len(sizes),
                "bitrate_bps": nominal_bitrate(config.frame_rate, sizes),
                "encode_s": self._encode_s,
                "decode_s": decode_s,
                "audio_s": self._audio_s,
                "wall_s": self._encode_s + decode_s,
                "real_time_factor": (self._encode_s + decode_s) / self._audio_s if self._audio_s else None,
                "timed": "encode + decode",
                "machine": machine,
            }
